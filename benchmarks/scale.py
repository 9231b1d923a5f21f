"""Time, memory and traffic of a training step in 1, 2 and 4 processes of one thread each, beside what README's formulas say.

    python benchmarks/scale.py [--batch-sizes 256 1024] [--widths 256 1024]

The towers are those of the preset shapes, the pictures noise, and the processes those that torchrun starts, on this machine:
what they send each other is what passes its loopback device (Linux).
"""

import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from measure import report

import distributed
from clip import create_model
from config import SHAPES, parse_flags
from dataset import CLIPDataset, PairSampler, train_loader
from device import pick_dtype, speed_up_cpu
from main import parameter_groups, replace, train_epoch
from storage import UserError, run_command

import torch  # isort: skip

STEPS, SIDE, LENGTH = 4, 80, 24  # the first step is not counted; pixels, tokens
FLOAT = 4  # bytes
COLUMNS = ["processes", "batch", "d_e", "pairs a second", "s a step", "MiB a process", "MB sent", "MB predicted"]


def loopback_bytes():
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


def predicted_bytes(n, width, processes, parameters):
    """What a process sends in a step: its rows of embeddings, and sums around a ring of gradients (both of embeddings, all)."""
    others = (processes - 1) / processes
    return FLOAT * (others * 2 * n * width + 2 * others * (2 * n * width + parameters))


def step(n, width, micro_batch_size):
    """One process of a measurement; the first prints parameters, seconds a step, MiB, and bytes sent a step and process."""
    speed_up_cpu()
    torch.set_num_threads(1)
    device = torch.device(distributed.join("cpu"))
    torch.manual_seed(0)
    config = replace(SHAPES, projection_dim=width)
    model = create_model(config, ["a red circle left of a blue square"]).to(memory_format=torch.channels_last)
    images = np.random.default_rng(0).integers(256, size=(64, SIDE, SIDE, 3), dtype=np.uint8)
    texts = torch.randint(1, model.tokenizer.get_vocab_size(), (64, LENGTH)).tolist()
    ranks = distributed.rank(), distributed.size()
    sampler = PairSampler([[i] for i in range(n)], n, 0, micro_batch_size, ranks=ranks)
    pairs = CLIPDataset([images[i % 64] for i in range(n)], [texts[i % 64] for i in range(n)], SIDE, 0.95)
    loader = train_loader(pairs, sampler, 0)
    if not micro_batch_size:
        distributed.share_statistics(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    seconds, sent = [], []
    for _ in range(STEPS):
        distributed.counts(0)  # all begin together
        started, before = time.perf_counter(), loopback_bytes()
        train_epoch(model, loader, sampler, optimizer, scaler, device, pick_dtype("auto", device), [0.01], "step")
        distributed.counts(0)
        seconds.append(time.perf_counter() - started)
        sent.append(loopback_bytes() - before)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(parameters, statistics.median(seconds[1:]), peak, statistics.median(sent[1:]) / distributed.size())
    distributed.leave()


def measure(
    batch_sizes: tuple[int, ...] = (256, 1024),
    widths: tuple[int, ...] = (256, 1024),
    micro_batch_size: int = 64,
    json: str = "",
):
    """Measures each batch and width in 1, 2 and 4 processes.

    Args:
        batch_sizes: pairs a step, over all processes
        widths: d_e
        micro_batch_size: pairs that pass the towers at once; 0: all, and then BatchNorm takes all processes' statistics
        json: file for the figures
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
        run_command(lambda: parse_flags(measure, "benchmarks/scale.py", None, sys.argv[1:]))
