"""The other losses and targets against open_clip, tables worked by hand, and in micro-batches against the whole matrix."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from clip import contrastive_loss, create_model
from config import Config, parse_config, validate
from dataset import RepeatingSampler
from training import gradient_cache
from training.losses import CLIP, Objective
from utils.errors import UserError

ROWS = torch.arange(3)
LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])  # a row per picture, a column per caption


def embeddings(n=6, width=8):
    generator = torch.Generator().manual_seed(0)
    return [F.normalize(torch.randn(n, width, generator=generator), dim=1).requires_grad_() for _ in range(2)]


def softmax_loss(logits, right):
    """The mean of -log of each row's probability of what is right, by explicit sums."""
    rows = [[math.exp(value) for value in row] for row in logits.tolist()]
    return -sum(math.log(row[i] / sum(row)) for row, i in zip(rows, right)) / len(rows)


def of(objective, logits=LOGITS, targets=ROWS, bias=None):
    return (objective.rows_loss(logits, logits.T, targets, bias) / len(logits)).item()


def test_clips_own_loss_is_that_of_the_paper():
    assert of(CLIP) == pytest.approx(contrastive_loss(LOGITS).item(), abs=1e-6)


def test_one_side_alone_by_hand():
    assert of(Objective("image")) == pytest.approx(softmax_loss(LOGITS, [0, 1, 2]), abs=1e-6)
    assert of(Objective("text")) == pytest.approx(softmax_loss(LOGITS.T, [0, 1, 2]), abs=1e-6)
    assert of(Objective("image")) != pytest.approx(of(Objective("text")), abs=1e-3)


def test_the_sigmoid_loss_and_its_gradients_are_open_clips():
    (I_e, T_e), scale, bias = embeddings(), torch.tensor(10.0).log().requires_grad_(), torch.tensor(-10.0, requires_grad=True)
    found = Objective("sigmoid").batch_loss(I_e, T_e, scale, bias)
    expected = SigLipLoss()(I_e, T_e, scale.exp(), bias)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, [I_e, T_e, scale, bias]) for loss in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bce_is_the_mean_over_all_pairs_by_hand():
    total = 0.0
    for i, j in np.ndindex(3, 3):
        probability = 1 / (1 + math.exp(-LOGITS[i, j].item()))
        total -= math.log(probability if i == j else 1 - probability)
    assert of(Objective("bce")) == pytest.approx(total / 9, abs=1e-6)
    assert of(Objective("sigmoid")) == pytest.approx(total / 3, abs=1e-6)


def test_targets_by_hand():
    I_e, T_e = (e.detach()[:3] for e in embeddings())
    ids, scale = torch.tensor([7, 5, 7]), torch.tensor(math.log(2.0))  # the first and the last are pairs of one picture
    given = {name: Objective("softmax", name).rows_targets(ROWS, ids, I_e, T_e, scale) for name in ("image", "smooth", "soft")}
    assert Objective().rows_targets(ROWS, ids, I_e, T_e, scale) is ROWS
    assert given["image"].tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    torch.testing.assert_close(given["smooth"], torch.full((3, 3), 0.1 / 3) + 0.9 * torch.eye(3))
    for i in range(3):
        weights = [math.exp(2 * ((I_e[i] @ I_e[j] + T_e[i] @ T_e[j]).item() / 2)) for j in range(3)]
        assert given["soft"][i].tolist() == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5)


def test_captions_of_one_image_are_right_together_by_hand():
    same = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    log_rows, log_columns = F.log_softmax(LOGITS, 1), F.log_softmax(LOGITS, 0)
    expected = -(same * (log_rows + log_columns)).sum().item() / 6
    assert of(Objective("softmax", "image"), targets=same) == pytest.approx(expected, abs=1e-6)
    right = torch.tensor([[1, -1, 1], [-1, 1, -1], [1, -1, 1]])
    expected = -F.logsigmoid(right * (LOGITS - 1)).sum().item() / 3
    assert of(Objective("sigmoid", "image"), targets=same, bias=torch.tensor(-1.0)) == pytest.approx(expected, abs=1e-6)


def test_several_captions_are_all_right_for_the_sigmoid_loss():
    """The mean over the k square matrices is that of the whole (n, k n) matrix with k right captions per image."""
    torch.manual_seed(0)
    n, k, scale, bias = 4, 3, torch.tensor(1.2), torch.tensor(-3.0)
    I_e, T_e = F.normalize(torch.randn(n, 5), dim=1), F.normalize(torch.randn(n * k, 5), dim=1)
    rounds = T_e.unflatten(0, (n, k)).unbind(1)
    found = sum(Objective("sigmoid").batch_loss(I_e, T_k, scale, bias) for T_k in rounds) / k
    total = 0.0
    for image in range(n):
        for caption in range(n * k):
            logit = (scale.exp() * I_e[image] @ T_e[caption] + bias).item()
            total += math.log(1 + math.exp(-logit if caption // k == image else logit))
    assert found.item() == pytest.approx(total / (n * k), rel=1e-5)


OBJECTIVES = [Objective(loss) for loss in ("image", "text", "sigmoid", "bce")]
OBJECTIVES += [Objective("softmax", targets) for targets in ("image", "smooth", "soft")] + [Objective("sigmoid", "image")]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: f"{objective.loss}-{objective.targets}")
def test_in_micro_batches_the_gradient_is_the_whole_matrix(objective):
    (I_e, T_e), ids = embeddings(), torch.tensor([0, 1, 0, 2, 3, 3])
    scale, bias = torch.tensor(1.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    uses_bias = objective.loss == "sigmoid"
    targets = objective.rows_targets(torch.arange(6), ids, I_e, T_e, scale)
    logits = scale.exp() * I_e @ T_e.T
    loss = objective.rows_loss(logits, logits.T, targets, bias if uses_bias else None) / 6
    expected = torch.autograd.grad(loss, [I_e, T_e, scale] + ([bias] if uses_bias else []))
    model = torch.nn.Module()
    model.logit_scale = torch.nn.Parameter(torch.tensor(1.0))
    model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0)) if uses_bias else None
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    found, *gradients = gradient_cache.loss_and_gradients(I_e.detach(), T_e.detach(), ids, model, objective, 2, scaler)
    gradients += [model.logit_scale.grad] + ([model.logit_bias.grad] if uses_bias else [])
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_temperature_and_the_bias_start_as_said():
    shapes, _ = parse_config(["shapes", "--text-width", "32", "--text-layers", "1"], "shapes")
    model = create_model(replace(shapes, loss="sigmoid"), ["a red circle"])
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == (pytest.approx(10), -10)
    model = create_model(replace(shapes, temperature=0.2), ["a red circle"])
    assert model.logit_scale.exp().item() == pytest.approx(5) and not model.logit_scale.requires_grad
    model = create_model(shapes, ["a red circle"])
    assert model.logit_bias is None and model.logit_scale.requires_grad


def test_repeated_images_are_drawn_from_all_pairs_without_replacement():
    captions_of = [np.arange(5 * i, 5 * i + 5) for i in range(200)]
    sampler = RepeatingSampler(captions_of, 100, seed=0)
    batches = list(sampler)
    pairs = [(image, caption) for batch in batches for image, (caption,), _ in batch]
    assert len(batches) == 2 and len(set(pairs)) == len(pairs) == 200
    assert all(caption // 5 == image for image, caption in pairs)
    assert all(len({image for image, _, _ in batch}) < 100 for batch in batches)
    assert list(sampler) == batches


@pytest.mark.parametrize(
    "flags",
    [
        {"gan": "joint", "loss": "sigmoid"},
        {"loss": "bce", "targets": "soft"},
        {"unique_images": False, "captions_per_image": 3},
        {"flip_left_right": True},
        {"temperature": 0.001},
        {"steps": -1},
    ],
)
def test_what_does_not_go_together_is_refused(flags):
    with pytest.raises(UserError):
        validate(Config(**{"batch_size": 8, "epochs": 1, "head_lr": 1.0} | flags))
