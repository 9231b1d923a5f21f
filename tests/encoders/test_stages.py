"""Features of stages while other threads use the same model."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from modules import ImageEncoder


@pytest.fixture
def threads_in_turns():
    """Threads change so often that one of two forward passes is interrupted by the other one."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_use_one_model_get_the_features_of_their_own_pictures(threads_in_turns):
    """As a picture that is dropped on the page while its folder is embedded: the numbers of pictures differ."""
    torch.manual_seed(0)
    encoder = ImageEncoder("test_resnet", size=32, feature_stages=("layer1", "layer3")).eval()
    images = [torch.randint(256, (n, 3, 32, 32)) for n in (1, 2, 5, 8)] * 10
    with torch.no_grad():
        expected = [encoder(image) for image in images]

    @torch.no_grad()
    def features(image):
        return encoder(image)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(features, images))
    for alone, together in zip(expected, found):
        torch.testing.assert_close(together, alone)
    assert not any(module._forward_hooks for module in encoder.modules())
