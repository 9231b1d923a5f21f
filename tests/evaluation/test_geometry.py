import math

import pytest
import torch

from evaluation.geometry import alignment, uniformity


def test_alignment_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert alignment(a, a) == 0
    assert alignment(a, b) == pytest.approx(1)  # the mean of 0 and 2


def test_uniformity_by_hand():
    assert uniformity(torch.tensor([[1.0, 0.0]] * 3)) == 0  # all the same
    assert uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-8)  # a distance of 2
    three = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert uniformity(three) == pytest.approx(math.log((math.exp(-8) + 2 * math.exp(-4)) / 3))
