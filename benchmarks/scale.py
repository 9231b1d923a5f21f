"""Time, memory and network traffic of a training step in 1, 2 and 4 processes, beside the traffic that a formula predicts.

    python benchmarks/scale.py [--batch-sizes 256 1024] [--widths 256 1024]

The model is that of the preset shapes, and the pictures are noise. torchrun starts the processes on this machine, with one
thread each. Their traffic is what passes through the loopback device (Linux).
"""

import resource
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import report

from clip import create_model
from config import SHAPES
from dataset import CLIPDataset, PairSampler
from training import distributed
from training.data import batch_loader
from training.state import create_state
from training.steps import train_epoch
from utils.cli import run_cli
from utils.device import pick_dtype, speed_up_cpu
from utils.errors import UserError, run_command

import torch  # isort: skip

NUM_STEPS = 4  # the first step is not counted
IMAGE_SIZE, TEXT_LENGTH = 80, 24  # pixels, tokens
NUM_DISTINCT = 64  # images and captions, which the batch repeats
BYTES_PER_FLOAT = 4
COLUMNS = ["processes", "batch", "d_e", "pairs a second", "s a step", "MiB a process", "MB sent", "MB predicted"]


def loopback_bytes():
    """Bytes that the loopback device has received since the machine was started."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def predicted_bytes(n, width, processes, parameters):
    """What a process sends per step: an all-gather of embeddings, and ring all-reduces of the embeddings' and all gradients."""
    others = (processes - 1) / processes
    return BYTES_PER_FLOAT * (others * 2 * n * width + 2 * others * (2 * n * width + parameters))


def step(n, width, micro_batch_size):
    """One process of a measurement. The first prints: parameters, seconds per step, MiB, bytes sent per step and process."""
    speed_up_cpu()
    torch.set_num_threads(1)
    device = torch.device(distributed.init_distributed("cpu"))
    torch.manual_seed(0)
    # With the schedule "plateau" and no warm-up, the learning rate is constant.
    config = replace(SHAPES, projection_dim=width, micro_batch_size=micro_batch_size, schedule="plateau", warmup=0.0)
    model = create_model(config, ["a red circle left of a blue square"]).to(memory_format=torch.channels_last)
    images = np.random.default_rng(0).integers(256, size=(NUM_DISTINCT, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    texts = torch.randint(1, model.tokenizer.get_vocab_size(), (NUM_DISTINCT, TEXT_LENGTH)).tolist()
    images, texts = ([values[i % NUM_DISTINCT] for i in range(n)] for values in (images, texts))
    ranks = distributed.rank(), distributed.size()
    sampler = PairSampler([[i] for i in range(n)], n, 0, micro_batch_size, ranks=ranks)
    loader = batch_loader(CLIPDataset(images, texts, IMAGE_SIZE, 0.95), sampler, 0)
    dtype = pick_dtype("auto", device)
    state = create_state(config, model, {}, device, dtype)
    seconds, sent = [], []
    for _ in range(NUM_STEPS):
        distributed.gather_counts(0)  # a barrier: all processes start together
        started, before = time.perf_counter(), loopback_bytes()
        train_epoch(state, loader, device, dtype, threading.Event())
        distributed.gather_counts(0)
        seconds.append(time.perf_counter() - started)
        sent.append(loopback_bytes() - before)
        state.losses = []  # so that the next call starts the epoch again
    parameters = sum(parameter.numel() for parameter in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(parameters, statistics.median(seconds[1:]), peak, statistics.median(sent[1:]) / distributed.size())
    distributed.destroy_distributed()


def measure(
    batch_sizes: tuple[int, ...] = (256, 1024),
    widths: tuple[int, ...] = (256, 1024),
    micro_batch_size: int = 64,
    json: str = "",
):
    """Measures each batch and width in 1, 2 and 4 processes.

    Args:
        batch_sizes: pairs per step, of all processes together
        widths: dimensions of the embeddings, d_e
        micro_batch_size: pairs that pass the encoders at once; 0: all, with BatchNorm synchronised over the processes
        json: file for the results
    """
    rows = []
    for n in batch_sizes:
        for width in widths:
            for processes in (1, 2, 4):
                launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, __file__, "step"]
                command = map(str, [*launch, n, width, micro_batch_size])
                process = subprocess.run(command, capture_output=True, text=True)
                if process.returncode:
                    raise UserError(process.stderr.strip().split("\n")[-1])
                parameters, seconds, peak, sent = map(float, process.stdout.split()[-4:])
                predicted = predicted_bytes(n, width, processes, parameters)
                figures = [f"{seconds:.2f}", f"{peak:,.0f}", f"{sent / 1e6:.2f}", f"{predicted / 1e6:.2f}"]
                rows.append([processes, n, width, f"{n / seconds:,.0f}", *figures])
                print(*rows[-1], flush=True)
    title = f"A step of {parameters / 1e6:.2f} million parameters, micro-batches of {micro_batch_size or 'all'}"
    report(title, COLUMNS, rows, json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        run_command(lambda: step(*map(int, sys.argv[2:])))
    else:
        run_command(lambda: run_cli(measure, "benchmarks/scale.py", sys.argv[1:]))
