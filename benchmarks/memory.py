"""Peak memory of training steps with large batches and gradient caching, and the error of their gradient.

    python benchmarks/memory.py [--batch-sizes 256 1024 4096]

The model is that of the preset shapes. Each batch size runs in its own process. Its pictures are the sample's, repeated if the
batch is larger than the sample. The gradient is compared, in fp32 and with dropout, with the gradient of one backward pass
through the whole batch.
"""

import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import ROOT, report
from torch.utils.data import Subset

from captions import image_positions, load_captions
from clip import contrastive_loss, create_model
from config import PRESETS
from dataset import CLIPDataset, PairSampler
from Datasets import shapes
from embedding import token_ids
from training import gradient_cache
from training.data import batch_loader
from training.state import create_state
from training.steps import train_epoch
from utils.cli import run_cli
from utils.device import keep_freed_memory, pick_dtype
from utils.errors import run_command
from utils.images import decode_images

import torch  # isort: skip

CONFIG = replace(
    PRESETS["shapes"],
    data_dir=str(ROOT / PRESETS["shapes"].data_dir),
    text_feature_dropout=0.2,
    image_feature_dropout=0.2,
    schedule="plateau",  # with no warm-up, the learning rate is constant
    warmup=0.0,
)


def prepare(batch_size, micro_batch_size, cache_dir):
    """(model, loader) of one step on the sample."""
    torch.manual_seed(0)
    if not Path(CONFIG.data_dir).exists():
        shapes.draw(CONFIG.data_dir)
    table, image_dir, _ = load_captions(CONFIG.data_dir)
    table = table[table["split"] == "train"]
    names, image_of_text = image_positions(table)
    model = create_model(CONFIG, table["caption"])
    pictures, _ = decode_images([image_dir / name for name in names], 64, cache_dir)
    captions_of = np.split(np.argsort(image_of_text, kind="stable"), np.bincount(image_of_text).cumsum()[:-1])
    sampler = PairSampler([captions_of[i % len(names)] for i in range(batch_size)], batch_size, 0, micro_batch_size)
    pictures = Subset(pictures, [i % len(names) for i in range(batch_size)])
    dataset = CLIPDataset(pictures, token_ids(model.tokenizer, table["caption"]), 64, crop=0.95)
    return model, batch_loader(dataset, sampler, model.tokenizer.padding["pad_id"])


def peak_mebibytes():
    """The peak memory of this process. On Linux not from getrusage, which also counts the parent's memory before the start."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def step(batch_size, micro_batch_size, cache_dir):
    """Prints the peak memory in MiB and the seconds of a step."""
    keep_freed_memory()
    device = torch.device("cpu")
    dtype = pick_dtype("auto", device)
    model, loader = prepare(batch_size, micro_batch_size, cache_dir)
    model.to(memory_format=torch.channels_last)
    state = create_state(replace(CONFIG, micro_batch_size=micro_batch_size), model, {}, device, dtype)
    for _ in range(2):  # the first step is not timed
        started = time.perf_counter()
        train_epoch(state, loader, device, dtype, threading.Event())
        seconds = time.perf_counter() - started
        state.losses = []  # so that the next call starts the epoch again
    print(peak_mebibytes(), seconds)


def gradient_error(batch_size, micro_batch_size, cache_dir):
    """The relative difference, in the norm over all parameters, of the two gradients in fp32."""
    model, loader = prepare(batch_size, micro_batch_size, cache_dir)
    model.train()
    num_parts = loader.batch_sampler.parts
    micro_batches = list(loader)[:num_parts]  # the loader gives each twice
    embedder = gradient_cache.Embedder(model)
    device, scaler, gradients = torch.device("cpu"), torch.amp.GradScaler("cpu", enabled=False), []
    for cached in (True, False):
        model.zero_grad()
        if cached:
            gradient_cache.backward(model, embedder, iter(micro_batches * 2), range(num_parts), device, torch.float32, scaler)
        else:
            pairs = [gradient_cache.embed(embedder, b, device, torch.float32, s) for s, b in enumerate(micro_batches)]
            I_e, T_e = (torch.cat(embeddings) for embeddings in zip(*pairs))
            contrastive_loss(model.logit_scale.exp() * I_e @ T_e.T).backward()
        gradients.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]))
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def measure(batch_sizes: tuple[int, ...] = (256, 1024, 4096), micro_batch_size: int = 64, json: str = ""):
    """Measures memory, time and the error of the gradient.

    Args:
        batch_sizes: pairs per step
        micro_batch_size: pairs that pass the encoders at once
        json: file for the results
    """
    rows, first = [], None
    with tempfile.TemporaryDirectory() as cache_dir:
        error = gradient_error(batch_sizes[0], micro_batch_size, cache_dir)
        for batch_size in batch_sizes:
            code = f"import sys; sys.argv = ['']; import memory; memory.step({batch_size}, {micro_batch_size}, {cache_dir!r})"
            command = [sys.executable, "-c", code]
            output = subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout
            mebibytes, seconds = map(float, output.split()[-2:])
            first = first or mebibytes
            rows.append([f"{batch_size:,}", f"{mebibytes:,.0f}", f"{mebibytes / first:.3f}", f"{seconds:.1f}"])
    title = (
        f"Steps with micro-batches of {micro_batch_size}; relative gradient error {error:.1e} at batch {batch_sizes[0]}, fp32"
    )
    report(title, ["batch", "peak MiB", f"to batch {batch_sizes[0]}", "seconds a step"], rows, json)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/memory.py", sys.argv[1:]))
