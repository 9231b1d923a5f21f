"""The loss, its gradients and the model's forward pass against independent references."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip import ClipLoss
from torch import nn

from clip import CLIPModel, contrastive_loss, loss_over_captions
from modules import ProjectionHead
from utils.device import autocast


def loss_by_hand(logits):
    """The pseudocode with explicit loops."""
    n, total = len(logits), 0.0
    for i in range(n):
        for line in (logits[i], logits[:, i]):
            total -= line[i] - math.log(sum(math.exp(value) for value in line))
    return total / (2 * n)


def test_loss_and_gradient_equal_a_numpy_loop():
    logits = np.random.default_rng(0).normal(size=(5, 5)) * 3
    tensor = torch.tensor(logits, requires_grad=True)
    loss = contrastive_loss(tensor)
    loss.backward()
    assert loss.item() == pytest.approx(loss_by_hand(logits), abs=1e-12)
    step = 1e-6
    for i, j in np.ndindex(5, 5):
        moved = logits.copy()
        moved[i, j] += step
        slope = (loss_by_hand(moved) - loss_by_hand(logits)) / step
        assert tensor.grad[i, j].item() == pytest.approx(slope, abs=1e-5)


def test_loss_and_gradients_equal_open_clip():
    generator = torch.Generator().manual_seed(0)
    start = [F.normalize(torch.randn(7, 16, generator=generator), dim=1) for _ in range(2)]
    results = []
    for ours in (True, False):
        images, texts = (features.clone().requires_grad_() for features in start)
        scale = torch.tensor(14.0, requires_grad=True)
        loss = contrastive_loss(scale * images @ texts.T) if ours else ClipLoss()(images, texts, scale)
        results.append([loss.detach(), *torch.autograd.grad(loss, [images, texts, scale])])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_loss_of_equal_logits_is_chance():
    assert contrastive_loss(torch.zeros(64, 64)).item() == pytest.approx(math.log(64))


def test_an_images_own_captions_are_no_wrong_answers():
    logits = np.random.default_rng(0).normal(size=(4, 12)) * 3  # captions 3 i to 3 i + 2 are those of image i
    expected = np.mean([loss_by_hand(logits[:, k::3]) for k in range(3)])
    assert loss_over_captions(torch.tensor(logits)).item() == pytest.approx(expected, abs=1e-12)


class Encoder(nn.Module):
    """Passes its input on, which is normalised with a mean of 0 and a standard deviation of 1."""

    width, mean, std = 6, torch.tensor(0.0), torch.tensor(1.0)

    def forward(self, x, mask=None):
        return x.flatten(1)

    encode_normalized = forward
    normalize = staticmethod(lambda x: x)


def test_logits_are_scaled_cosines_of_features_however_they_are_given():
    torch.manual_seed(0)
    model = CLIPModel(Encoder(), Encoder(), None, projection_dim=4).eval()
    images, texts = torch.randn(3, 6), torch.randn(3, 6)
    per_image = model.logits(*model.features({"image_features": images, "text_features": texts}))
    pixels, ids, mask = images.view(3, 6, 1, 1), texts, torch.ones(3, 6)
    assert torch.equal(per_image, model.logits(*model.features({"image": pixels, "text": ids, "attention_mask": mask})))
    forward, per_text = model(pixels, ids, mask)
    assert torch.equal(forward, per_image)
    W_i, W_t = model.image_projection.projection.weight, model.text_projection.projection.weight
    for i in range(3):
        for j in range(3):
            a, b = W_i @ images[i], W_t @ texts[j]
            expected = (a @ b / a.norm() / b.norm() / 0.07).item()
            assert per_image[i, j].item() == pytest.approx(expected, rel=1e-5)
            assert per_text[j, i].item() == pytest.approx(expected, rel=1e-5)


def test_one_layer_head_is_linear_without_bias():
    head = ProjectionHead(6, 4).eval()
    assert [tuple(parameter.shape) for parameter in head.parameters()] == [(4, 6)]
    assert not head(torch.zeros(2, 6)).any()


def test_two_layer_head_is_the_residual_one_of_the_teaching_scripts():
    torch.manual_seed(0)
    head = ProjectionHead(6, 4, layers=2).eval()
    x = torch.randn(3, 6)
    projected = x @ head.projection.weight.T
    linear = head.residual[1]
    inner = projected + F.gelu(projected) @ linear.weight.T + linear.bias
    expected = (inner - inner.mean(1, keepdim=True)) / (inner.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), expected)


def test_a_hidden_layer_is_added_to_the_linear_map_and_is_0_at_first():
    torch.manual_seed(0)
    head, x = ProjectionHead(6, 4, hidden_width=5, dropout=0.5).eval(), torch.randn(3, 6)
    linear, (first, _, _, last) = x @ head.projection.weight.T, head.hidden
    assert torch.equal(head(x), linear)
    torch.nn.init.normal_(last.weight)
    expected = linear + F.gelu(x @ first.weight.T + first.bias) @ last.weight.T
    torch.testing.assert_close(head(x), expected)


def test_standardised_features_have_mean_0_and_deviation_1():
    features = torch.randn(50, 6) * torch.tensor([1, 5, 10, 0.5, 2, 1]) + 7
    head = ProjectionHead(6, 4)
    head.standardize(features)
    scaled = (features - head.mean) / head.std
    torch.testing.assert_close(scaled.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_logits_are_of_fp32_embeddings_under_autocast(dtype, temperature):
    """Only the heads are in 16 bits: the gradient is that of micro-batches, and near the one in fp32, at any temperature."""
    torch.manual_seed(0)
    encoder = Encoder()
    encoder.width = 32
    model = CLIPModel(encoder, encoder, None, 64, feature_dropouts=(0.0, 0.0))
    model.logit_scale.data.fill_(-math.log(temperature))
    I_f = torch.randn(64, 32)
    T_f = I_f + 0.5 * torch.randn(64, 32)

    def gradient(dtype):
        model.zero_grad()
        with autocast(torch.device("cpu"), dtype):
            logits = model.logits(I_f, T_f)
        assert logits.dtype == torch.float32
        contrastive_loss(logits).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    exact, found = gradient(torch.float32), gradient(dtype)
    assert (found - exact).norm() < 0.03 * exact.norm()
