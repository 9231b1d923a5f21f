"""Whether what runs on a GPU keeps its tensors there, checked without one.

Under torch's FakeTensorMode tensors on "cuda" have a shape, a dtype and a device, but no values, and an operation between
two devices raises. The backward pass and what reads values need a real GPU.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import clip
import embedding
from config import PRESETS, Config, parse_config
from encoders.stages import unfreeze_from
from evaluation import retrieval
from generation.joint import Joint
from generation.networks import (
    IMAGE_SIZE,
    NOISE_DIM,
    Discriminator,
    Generator,
    discriminator_loss,
    draw_pictures,
    generator_loss,
)
from search import occlusion
from training import feature_cache, gradient_cache
from training.data import Split
from utils.device import autocast

CUDA = torch.device("cuda:0")
N, K, LENGTH = 8, 2, 9  # images, captions each, tokens


def to_fake(module, mode):
    """Puts a module's parameters and buffers on the GPU that is not there, in place."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(mode.from_tensor(value).to(CUDA).detach(), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = mode.from_tensor(value).to(CUDA)
    return module


@pytest.fixture(autouse=True)
def autocast_as_on_a_gpu(monkeypatch):
    """Without a GPU torch leaves autocast for CUDA out."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


@pytest.fixture(params=["shapes", "gpt2", "paper", "mixer"])
def config(request, sample):
    return parse_config([request.param, "--data-dir", str(sample)], "shapes")[0]


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture
def made(config):
    """A small model of each preset, and the mode in which it is on a GPU."""
    torch.manual_seed(0)
    return clip.create_model(config, ["a red circle", "a blue star"])


@pytest.fixture
def values_of_nothing(monkeypatch):
    """Fake tensors have no values: where code leaves torch for NumPy, it goes on with the tensor."""
    monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: tensor.detach())


def batch_of(model, count=N, captions=1):
    size = model.image_encoder.size
    return {
        "image": torch.zeros(count, 3, size, size, dtype=torch.uint8),
        "image_id": torch.arange(count),
        "text": torch.ones(captions * count, LENGTH, dtype=torch.int64),
        "attention_mask": torch.ones(captions * count, LENGTH, dtype=torch.int64),
    }


def on_gpu(batch):
    return {name: value.to(CUDA) for name, value in batch.items()}


def assert_on_gpu(*tensors):
    assert all(tensor.device == CUDA for tensor in tensors)


def test_an_operation_between_devices_raises():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="same device"):
        torch.zeros(2, device=CUDA) + torch.zeros(2)


@pytest.mark.parametrize("captions", [1, K])
def test_a_plain_step(made, dtype, captions):
    with FakeTensorMode() as mode:
        model = to_fake(made, mode).train()
        batch = on_gpu(batch_of(model, captions=captions))
        with autocast(CUDA, dtype):
            logits = model.logits(*model.features(batch))
        loss = clip.loss_over_captions(logits)
        assert logits.shape == (N, captions * N) and logits.dtype == torch.float32
        assert loss.shape == () and loss.dtype == torch.float32
        assert_on_gpu(logits, loss)


def test_a_step_in_micro_batches(config, made, dtype, monkeypatch):
    """All of `gradient_cache.backward` but the backward passes, which leave no gradients here."""
    backwards, width = Counter(), config.projection_dim
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: backwards.update([loss.device]))
    monkeypatch.setattr(
        torch.autograd, "backward", lambda embeddings, gradients: backwards.update(e.device for e in embeddings)
    )
    with FakeTensorMode() as mode:
        model = to_fake(made, mode).train()
        batches = iter([batch_of(model, 4, K), batch_of(model, 4, K)] * 2)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        no_gradient = torch.zeros(K * N, width, device=CUDA)
        monkeypatch.setattr(gradient_cache.distributed, "all_reduce_sum", lambda value: no_gradient if value is None else value)
        loss = gradient_cache.backward(model, gradient_cache.Embedder(model), batches, [1, 2], CUDA, dtype, scaler)
        assert_on_gpu(loss)
    assert backwards == {CUDA: 2 * K + 2 * 2}  # of two chunks of rows for each caption, and of both micro-batches' embeddings


def test_a_step_on_cached_features(made, dtype):
    with FakeTensorMode() as mode:
        model = to_fake(made, mode).train()
        widths = {"image_features": model.image_encoder.width, "text_features": model.text_encoder.width}
        batch = {name: torch.zeros(N, width) for name, width in widths.items()}
        with autocast(CUDA, dtype):
            logits = model.logits(*model.features(on_gpu(batch)))
        assert_on_gpu(clip.loss_over_captions(logits.float()))


STAGES = {"shapes": "layer3", "gpt2": "layer3", "paper": "stages.2", "mixer": "blocks.2"}


def test_a_step_on_cached_activations_and_what_keeps_them(config, made, dtype, sample, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        feature_cache, "cached_tensor", lambda path, shape, dtype, compute, _: kept.append(torch.cat(list(compute())))
    )
    monkeypatch.setattr(feature_cache, "model_key", lambda encoder: "")
    monkeypatch.setattr(feature_cache, "note_use", lambda *_: None)
    preset = next(name for name, of_preset in PRESETS.items() if of_preset.image_encoder == config.image_encoder)
    unfreeze_from(made.image_encoder, STAGES[preset])
    pictures = [np.zeros((made.image_encoder.size, made.image_encoder.size, 3), np.uint8)] * 3
    split = Split(["a", "b", "c"], pictures, [], np.array([]), pictures, [])
    with FakeTensorMode() as mode:
        model = to_fake(made, mode).train()
        with pytest.raises(AttributeError):  # None has no unflatten: the tensor went to `kept`
            config = Config(cache_dir=str(tmp_path), cached_crops=2)
            feature_cache.cache_image_features(config, model.image_encoder, split, sample, True, CUDA, dtype)
        [activations] = kept
        assert activations.shape[0] == 6 and activations.dtype == dtype and activations.device.type == "cpu"
        batch = batch_of(model, 6) | {"image_activations": activations}
        with autocast(CUDA, dtype):
            logits = model.logits(*model.features(on_gpu(batch)))
        assert_on_gpu(clip.loss_over_captions(logits.float()))


def test_scoring(made, dtype, values_of_nothing):
    with FakeTensorMode() as mode:
        model = to_fake(made, mode)
        size = model.image_encoder.size
        pictures = [np.zeros((size, size, 3), np.uint8)] * 3
        I_f = embedding.image_features(model, pictures, CUDA, dtype, 3)
        T_f = embedding.text_features(model, [[1, 2, 3], [4, 5]], CUDA, dtype)
        assert (I_f.device.type, T_f.device.type) == ("cpu", "cpu") and I_f.dtype == T_f.dtype == torch.float32
        similarity = retrieval.similarities(model, I_f, T_f, CUDA)
        assert similarity.shape == (2, 3) and similarity.device.type == "cpu"


def test_search_classes_and_heat_maps(made, dtype, values_of_nothing, monkeypatch):
    with FakeTensorMode() as mode:
        model = to_fake(made, mode)
        query = embedding.embed_texts(model, ["a red circle"])[0]
        assert query.device.type == "cpu" and query.shape == (model.text_projection.out_features,)
        size = model.image_encoder.size
        falls = []
        monkeypatch.setattr(
            occlusion, "project_and_normalize", lambda *given: falls.append(embedding.project_and_normalize(*given)) or falls[0]
        )
        monkeypatch.setattr(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape))
        heat = occlusion.occlusion_map(model, np.zeros((size, size, 3), np.uint8), np.zeros(len(query)), CUDA, dtype)
        assert heat.shape == (size, size) and falls[0].shape == (occlusion.STEPS**2 + 1, len(query))


def test_the_generators_losses(dtype, values_of_nothing):
    generator, discriminator = Generator(16), Discriminator(16)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:  # the loss chooses by a mask, whose number of ones is not known
        to_fake(generator, mode), to_fake(discriminator, mode)
        embeddings, real = torch.zeros(N, 16).to(CUDA), torch.zeros(N, 3, IMAGE_SIZE, IMAGE_SIZE).to(CUDA)
        with autocast(CUDA, dtype):
            fake = generator(torch.randn(N, NOISE_DIM).to(CUDA), embeddings)
            losses = [
                discriminator_loss(discriminator, real, fake, embeddings),
                generator_loss(discriminator, fake, embeddings),
            ]
        assert_on_gpu(fake, *losses)
        pictures = draw_pictures(generator, torch.randn(N, NOISE_DIM).to(CUDA), embeddings)
        assert pictures.shape == (N, IMAGE_SIZE, IMAGE_SIZE, 3) and pictures.device.type == "cpu"


def test_the_joint_step(config, made, dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: assert_on_gpu(loss))
    monkeypatch.setattr(
        "generation.joint.gradient_penalty", lambda discriminator, real, embedding: assert_on_gpu(real, embedding) or 0.0
    )
    joint = Joint(config.projection_dim, 4, 1.0, torch.device("cpu"), dtype)
    joint.device = CUDA
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        model = to_fake(made, mode).train()
        to_fake(joint.generator, mode), to_fake(joint.discriminator, mode)
        batch = on_gpu(batch_of(model))
        mixed, adversarial = joint.insert_generated(model, batch, torch.amp.GradScaler("cuda", enabled=False))
        assert_on_gpu(mixed["image"], adversarial)
        assert mixed["image"].shape == batch["image"].shape
        with autocast(CUDA, dtype):
            logits = model.logits(*model.features(mixed))
        assert_on_gpu(clip.loss_over_captions(logits.float()) + adversarial)
