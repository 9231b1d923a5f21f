"""Several processes against one: the same steps on the same batches."""

import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from clip import CLIPModel
from config import Config
from dataset import CLIPDataset, PairSampler
from encoders.build import random_text_config
from encoders.tokenizer import train_tokenizer
from modules import ImageEncoder, TextEncoder
from training import distributed
from training.data import batch_loader
from training.state import TrainState
from training.steps import train_epoch

CPU, N, BATCH, STEPS = torch.device("cpu"), 140, 14, 10
SCALER = torch.amp.GradScaler("cpu", enabled=False)
RUNS = (  # micro-batch size, loss, targets
    (0, "softmax", "pair"),
    (2, "softmax", "pair"),
    (2, "sigmoid", "image"),
    (0, "image", "soft"),
)


def train_some(micro_batch_size, loss, targets):
    """(loss, weights, gradients) of a small model after ten steps, as the processes of this one's group take them together.

    Two captions of each image are sampled per step.

    The optimizer is plain SGD: Adam makes full steps of the rounding errors of gradients that are zero but for those.
    """
    torch.manual_seed(0)
    text = transformers.AutoModel.from_config(random_text_config("clip", 32, 1, 2, 60, 16))
    tokenizer = train_tokenizer(["a red circle", "a blue square"], 60, 16)
    model = CLIPModel(ImageEncoder("vit", size=32, sizes=(8, 32, 2, 2)), TextEncoder(text), tokenizer, 16)
    model.logit_bias = nn.Parameter(torch.tensor(-2.0)) if loss == "sigmoid" else None
    images = list(np.random.default_rng(0).integers(256, size=(N, 32, 32, 3), dtype=np.uint8))
    texts = [torch.randint(1, 60, (4 + i % 5,)).tolist() for i in range(N)]
    ranks = distributed.rank(), distributed.size()
    captions_of = [[i, (i + 1) % N] for i in range(N)]
    sampler = PairSampler(captions_of, BATCH, 0, micro_batch_size, ranks=ranks, captions_per_image=2)
    loader = batch_loader(CLIPDataset(images, texts, 32, 1.0), sampler, 0)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "base_lr": 1e-2}], lr=0)
    config = Config(schedule="plateau", warmup=0, epochs=1, loss=loss, targets=targets)  # a constant rate
    state = TrainState(config, model, optimizer, SCALER, average=None, joint=None, data_key="", frozen_key="")
    loss = train_epoch(state, loader, CPU, torch.float32, threading.Event())["loss"]
    return loss, model.state_dict(), {name: parameter.grad for name, parameter in model.named_parameters()}


def normalise_some(layer):
    """(output, gradients, statistics) of a BatchNorm, of this process's rows of 14 pictures."""
    torch.manual_seed(0)
    x, weight = torch.randn(BATCH, 3, 5, 5, requires_grad=True), torch.randn(BATCH, 3, 5, 5)
    net = nn.Sequential(layer)
    distributed.synchronize_batch_norm(net)
    own = distributed.shard(BATCH)
    rows = slice(own.start, own.stop)
    out = net(x[rows])
    (out * weight[rows]).sum().backward()
    distributed.all_reduce_gradients(net)
    gradients = [distributed.all_reduce_sum(x.grad), layer.weight.grad, layer.bias.grad]
    return distributed.all_gather(out.detach()), gradients, [layer.running_mean, layer.running_var]


def be_one_of(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.set_num_threads(1)
    trained = [train_some(*run) for run in RUNS]
    torch.save((trained, normalise_some(nn.BatchNorm2d(3))), folder / f"{rank}.pt")
    distributed.destroy_distributed()


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 4])
def test_the_steps_of_several_processes_are_those_of_one(forked, size, tmp_path):
    """Of batches of 14 four processes have unequal shares, and of the 7 micro-batches two have; fp32, ten steps."""
    for process in [forked(be_one_of, rank, size, tmp_path) for rank in range(size)]:
        process.join()
    expected = [train_some(*run) for run in RUNS]
    normalised = normalise_some(nn.BatchNorm2d(3))  # alone, so torch's own
    for rank in range(size):
        found, found_normalised = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for (loss, weights, gradients), (loss_of_one, weights_of_one, gradients_of_one) in zip(found, expected):
            assert loss == pytest.approx(loss_of_one, rel=1e-6, abs=1e-6)
            assert_close(weights, weights_of_one)
            assert_close(gradients, gradients_of_one)
        torch.testing.assert_close(found_normalised, normalised, atol=1e-5, rtol=1e-5)


def test_the_processes_see_each_image_once_between_them():
    samplers = [PairSampler([[i] for i in range(100)], 14, 0, ranks=(rank, 4)) for rank in range(4)]
    batches = list(zip(*samplers))
    assert {tuple(sorted(map(len, parts))) for parts in batches} == {(3, 3, 4, 4)}
    assert [sum(parts, []) for parts in batches] == list(PairSampler([[i] for i in range(100)], 14, 0))
    assert len({image for parts in batches for part in parts for image, _, _ in part}) == 98
