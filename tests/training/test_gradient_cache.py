"""Gradient caching against the gradient of one graph over the whole batch."""

import copy

import pytest
import torch
import transformers

from clip import CLIPModel, contrastive_loss, loss_over_captions
from encoders.build import random_text_config
from encoders.tokenizer import train_tokenizer
from modules import ImageEncoder, TextEncoder
from training import gradient_cache

CPU, N, MICRO, SEEDS = torch.device("cpu"), 12, 4, [5, 6, 7]
SCALER = torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    text = transformers.AutoModel.from_config(random_text_config("distilbert", 32, 2, 4, 60, 16))
    tokenizer = train_tokenizer(["a red circle", "a blue square"], 60, 16)
    return CLIPModel(
        ImageEncoder("test_resnet", size=64), TextEncoder(text), tokenizer, 16, feature_dropouts=(0.3, 0.3)
    ).train()


@pytest.fixture
def micro_batches():
    torch.manual_seed(1)
    image = torch.randint(256, (N, 3, 64, 64), dtype=torch.uint8)
    text, mask = torch.randint(1, 60, (N, 9)), torch.ones(N, 9, dtype=torch.long)
    parts = zip(image.split(MICRO), text.split(MICRO), mask.split(MICRO), (torch.arange(N) // 2).split(MICRO))
    names = "image", "text", "attention_mask", "image_id"
    return [dict(zip(names, part)) for part in parts]


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def cached(model, micro_batches, seeds=SEEDS):
    model.zero_grad()
    return gradient_cache.backward(
        model, gradient_cache.Embedder(model), iter(micro_batches * 2), seeds, CPU, torch.float32, SCALER
    )


def test_the_gradient_is_the_whole_batchs_with_dropout_on(model, micro_batches):
    loss = cached(model, micro_batches)
    found = gradient(model)
    model.zero_grad()
    embedded = [
        gradient_cache.embed(gradient_cache.Embedder(model), b, CPU, torch.float32, seed)
        for b, seed in zip(micro_batches, SEEDS)
    ]
    I_e, T_e = (torch.cat(embeddings) for embeddings in zip(*embedded))
    expected = contrastive_loss(model.logit_scale.exp() * I_e @ T_e.T)  # one graph over all
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ((found - gradient(model)).norm() / gradient(model).norm()).item() < 1e-5
    cached(model, micro_batches, [8, 9, 10])  # other masks
    assert ((gradient(model) - found).norm() / found.norm()).item() > 1e-2


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_without_randomness_it_is_the_plain_steps_gradient(model, micro_batches, captions_per_image):
    model.eval()
    for batch in micro_batches:
        batch["text"] = torch.randint(1, 60, (captions_per_image * MICRO, 9))
        batch["attention_mask"] = torch.ones_like(batch["text"])
    loss = cached(model, micro_batches)
    found = gradient(model)
    model.zero_grad()
    logits, _ = model(*(torch.cat([batch[name] for batch in micro_batches]) for name in ("image", "text", "attention_mask")))
    expected = loss_over_captions(logits)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert ((found - gradient(model)).norm() / gradient(model).norm()).item() < 1e-5


def test_statistics_count_each_micro_batch_once(model, micro_batches):
    reference = copy.deepcopy(model.image_encoder)
    for batch in micro_batches:
        reference(batch["image"])
    cached(model, micro_batches)
    expected, found = dict(reference.named_buffers()), dict(model.image_encoder.named_buffers())
    moved = [name for name in expected if name.endswith(("running_mean", "running_var"))]
    assert moved
    for name in moved:
        torch.testing.assert_close(found[name], expected[name])
