"""Peak memory of training steps of large batches with gradient caching, and how exact their gradient is.

    python benchmarks/memory.py [--batch-sizes 256 1024 4096]

The towers are those of the preset shapes. Each batch size runs in a process of its own; its pictures are the sample's, over
again where the batch is larger than the sample. The gradient is compared, in fp32 and with dropout on, with the one that a
single graph over the whole batch gives.
"""

import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from measure import ROOT, report
from torch.utils.data import Subset

import gradient_cache
from captions import load_captions
from clip import contrastive_loss, create_model
from config import PRESETS, parse_flags
from dataset import CLIPDataset, PairSampler, decode_images, train_loader
from Datasets import shapes
from device import keep_freed_memory, pick_dtype
from embedding import token_ids
from evaluate import positions_of_images
from main import parameter_groups, train_epoch
from storage import run_command

import torch  # isort: skip


def prepare(batch_size, micro_batch_size, cache_dir):
    """(model, loader, sampler) of one step over the sample."""
    torch.manual_seed(0)
    config = replace(
        PRESETS["shapes"], data_dir=str(ROOT / PRESETS["shapes"].data_dir), text_feature_dropout=0.2, image_feature_dropout=0.2
    )
    if not Path(config.data_dir).exists():
        shapes.draw(config.data_dir)
    table, image_dir, _ = load_captions(config.data_dir)
    table = table[table["split"] == "train"]
    names, image_of_text = positions_of_images(table)
    model = create_model(config, table["caption"])
    pictures, _ = decode_images([image_dir / name for name in names], 64, cache_dir)
    captions_of = np.split(np.argsort(image_of_text, kind="stable"), np.bincount(image_of_text).cumsum()[:-1])
    sampler = PairSampler([captions_of[i % len(names)] for i in range(batch_size)], batch_size, 0, micro_batch_size)
    pictures = Subset(pictures, [i % len(names) for i in range(batch_size)])
    dataset = CLIPDataset(pictures, token_ids(model.tokenizer, table["caption"]), 64, crop=0.95)
    return model, train_loader(dataset, sampler, model.tokenizer.padding["pad_id"]), sampler


def peak_mebibytes():
    """The most memory this process has held. Not getrusage's, which on Linux counts the parent's from before the start."""
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
    model, loader, sampler = prepare(batch_size, micro_batch_size, cache_dir)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(parameter_groups(model, PRESETS["shapes"]), fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        started = time.perf_counter()
        train_epoch(model, loader, sampler, optimizer, scaler, device, dtype, [0.01], "step")
    print(peak_mebibytes(), time.perf_counter() - started)


def gradient_error(batch_size, micro_batch_size, cache_dir):
    """The relative difference, in the norm over all parameters, of the two gradients in fp32."""
    model, loader, sampler = prepare(batch_size, micro_batch_size, cache_dir)
    model.train()
    micro_batches = list(loader)[: sampler.parts]
    device, scaler, gradients = torch.device("cpu"), torch.amp.GradScaler("cpu", enabled=False), []
    for cached in (True, False):
        model.zero_grad()
        if cached:
            gradient_cache.backward(model, iter(micro_batches * 2), range(sampler.parts), device, torch.float32, scaler)
        else:
            pairs = [gradient_cache.embed(model, b, device, torch.float32, s) for s, b in enumerate(micro_batches)]
            I_e, T_e = (torch.cat(embeddings) for embeddings in zip(*pairs))
            contrastive_loss(model.logit_scale.exp() * I_e @ T_e.T).backward()
        gradients.append(torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()]))
    return ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()


def measure(batch_sizes: tuple[int, ...] = (256, 1024, 4096), micro_batch_size: int = 64, json: str = ""):
    """Measures memory, time and exactness.

    Args:
        batch_sizes: pairs a step
        micro_batch_size: pairs that pass the towers at once
        json: file for the figures
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
    title = f"Steps with micro-batches of {micro_batch_size}; gradient off by {error:.1e} at batch {batch_sizes[0]}, fp32"
    report(title, ["batch", "peak MiB", f"to batch {batch_sizes[0]}", "seconds a step"], rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "memory.py", None, sys.argv[1:]))
