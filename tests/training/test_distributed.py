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
from training.optimization import create_optimizer
from training.state import TrainState
from training.steps import train_epoch

CPU, N, BATCH, STEPS = torch.device("cpu"), 140, 14, 10
SCALER = torch.amp.GradScaler("cpu", enabled=False)
RUNS = (  # micro-batch size, loss, targets, image encoder
    (0, "softmax", "pair", "vit"),
    (2, "softmax", "pair", "vit"),
    (2, "sigmoid", "image", "vit"),
    (0, "image", "soft", "vit"),
)
SHARES = (0, "softmax", "pair", "test_resnet")  # a BatchNorm takes its statistics over each process's share of the batch


def plain_sgd(groups, device):
    return torch.optim.SGD(groups, lr=0)


def train_some(micro_batch_size, loss, targets, image_encoder, optimizer=plain_sgd):
    """(loss, weights, gradients) of a small model after ten steps, as the processes of this one's group take them together.

    Two captions of each image are sampled per step.

    The optimizer is plain SGD: Adam makes full steps of the rounding errors of gradients that are zero but for those.
    """
    torch.manual_seed(0)
    text = transformers.AutoModel.from_config(random_text_config("clip", 32, 1, 2, 60, 16))
    tokenizer = train_tokenizer(["a red circle", "a blue square"], 60, 16)
    model = CLIPModel(ImageEncoder(image_encoder, size=32, sizes=(8, 32, 2, 2)), TextEncoder(text), tokenizer, 16)
    model.logit_bias = nn.Parameter(torch.tensor(-2.0)) if loss == "sigmoid" else None
    images = list(np.random.default_rng(0).integers(256, size=(N, 32, 32, 3), dtype=np.uint8))
    texts = [torch.randint(1, 60, (4 + i % 5,)).tolist() for i in range(N)]
    ranks = distributed.rank(), distributed.size()
    captions_of = [[i, (i + 1) % N] for i in range(N)]
    sampler = PairSampler(captions_of, BATCH, 0, micro_batch_size, ranks=ranks, captions_per_image=2)
    loader = batch_loader(CLIPDataset(images, texts, 32, 1.0), sampler, 0)
    groups = [{"params": list(model.parameters()), "base_lr": 1e-2 if image_encoder == "vit" else 1e-3}]
    optimizer = optimizer(groups, CPU)
    config = Config(schedule="plateau", warmup=0, epochs=1, loss=loss, targets=targets)  # a constant rate
    state = TrainState(config, model, optimizer, SCALER, average=None, joint=None, data_key="", frozen_key="")
    loss = train_epoch(state, loader, CPU, torch.float32, threading.Event())["loss"]
    return loss, model.state_dict(), {name: parameter.grad for name, parameter in model.named_parameters()}


def be_one_of(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.set_num_threads(1)
    torch.save([train_some(*run) for run in (*RUNS, SHARES)], folder / f"{rank}.pt")
    distributed.destroy_distributed()


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def trained(weights):
    return {name: value for name, value in weights.items() if "running_" not in name and "num_batches" not in name}


@pytest.mark.parametrize("size", [2, 4])
def test_the_steps_of_several_processes_are_those_of_one(forked, size, tmp_path):
    """Of batches of 14 four processes have unequal shares, and of the 7 micro-batches two have; fp32, ten steps."""
    for process in [forked(be_one_of, rank, size, tmp_path) for rank in range(size)]:
        process.join()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for number, run in enumerate(RUNS):
        loss_of_one, weights_of_one, gradients_of_one = train_some(*run)
        for loss, weights, gradients in (of_rank[number] for of_rank in found):
            assert loss == pytest.approx(loss_of_one, rel=1e-6, abs=1e-6)
            assert_close(weights, weights_of_one)
            assert_close(gradients, gradients_of_one)
    if size == 2:  # one process gets the shares as micro-batches; BatchNorm makes more of rounding errors
        loss, weights, _ = train_some(BATCH // 2, *SHARES[1:])
        assert found[0][-1][0] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(trained(found[0][-1][1]), trained(weights), atol=1e-4, rtol=1e-3)
    for (_, weights, _), (_, others, _) in zip(found[0], found[-1]):  # all ranks have the same, to the bit
        assert all(torch.equal(value, others[name]) for name, value in weights.items())


def be_one_with_a_sharded_optimizer(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    torch.set_num_threads(1)
    results = []
    for sharded in (False, True):
        made = []

        def create(groups, device, sharded=sharded, made=made):
            made.append(create_optimizer(groups, device, sharded))
            return made[0]

        _, weights, _ = train_some(*RUNS[0], optimizer=create)
        kept = sum(value.numel() for state in made[0].optim.state.values() for value in state.values()) if sharded else 0
        if sharded:
            made[0].consolidate_state_dict(to=0)
        averages = made[0].state_dict()["state"] if rank == 0 or not sharded else {}
        results.append((weights, averages, kept))
    torch.save(results, folder / f"{rank}.pt")
    distributed.destroy_distributed()


def test_a_sharded_optimizer_takes_the_same_steps_and_its_averages_are_gathered(forked, tmp_path):
    for process in [forked(be_one_with_a_sharded_optimizer, rank, 2, tmp_path) for rank in range(2)]:
        process.join()
    kept = []
    for rank in range(2):
        (weights, averages, _), (sharded_weights, gathered, held) = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(value, sharded_weights[name]) for name, value in weights.items())
        if rank == 0:
            torch.testing.assert_close(gathered, averages, atol=0, rtol=0)
        kept.append(held)
    whole = sum(value.numel() for state in averages.values() for value in state.values())
    assert sum(kept) == whole and max(kept) < 0.7 * whole


def test_the_processes_see_each_image_once_between_them():
    samplers = [PairSampler([[i] for i in range(100)], 14, 0, ranks=(rank, 4)) for rank in range(4)]
    batches = list(zip(*samplers))
    assert {tuple(sorted(map(len, parts))) for parts in batches} == {(3, 3, 4, 4)}
    assert [sum(parts, []) for parts in batches] == list(PairSampler([[i] for i in range(100)], 14, 0))
    assert len({image for parts in batches for part in parts for image, _, _ in part}) == 98
