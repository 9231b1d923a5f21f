"""Time and memory of fine-tuning a full-size model with all weights and with adapters (--lora-rank 8).

    python benchmarks/adapters.py [--model open_clip:ViT-B-32@random] [--batch-size 32] [--steps 6]

Each way trains in a process of its own on the drawn sample, in turns. Memory is the process's largest resident size; a step's
time is that of an epoch of these steps, with its first step, divided by their number.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import RESULTS, ROOT, report

from utils.cli import run_cli
from utils.errors import UserError, run_command

WAYS = {"all weights": [], "adapters of rank 8": ["--lora-rank", "8"]}
NUM_IMAGES = 300  # training images, whose decoded copies take little time


def trained(flags, model, batch_size, steps, folder):
    """(seconds per step, GB of memory, million trained parameters) of one training."""
    places = ["--data-dir", str(ROOT / "Datasets" / "shapes"), "--run-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache"]
    sizes = ["--train-images", str(NUM_IMAGES), "--batch-size", str(batch_size), "--steps", str(steps), "--num-workers", "0"]
    command = [sys.executable, ROOT / "main.py", "open_clip", "--model", model, *places, *sizes, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(map(str, flags))}: main.py ended with {status}: {output[-300:]}")
    seconds = pd.read_csv(f"{folder}/run/history.csv")["seconds"].sum()
    millions = re.search(r"([\d.]+) of [\d.]+ million parameters are trained", output)
    total = re.search(r"([\d.]+) million parameters", output)[1]
    return seconds / steps, usage.ru_maxrss / 2**20, float(millions[1] if millions else total)


def adapters(model: str = "open_clip:ViT-B-32@random", batch_size: int = 32, steps: int = 6, rounds: int = 3):
    """Trains a few steps in both ways, in turns.

    Args:
        model: name of the model
        batch_size: pairs per step
        steps: steps of each training
        rounds: trainings of each way, of which the medians are reported
    """
    found = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, flags in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                found[way].append(trained(flags, model, batch_size, steps, Path(folder)))
    rows = []
    for way, runs in found.items():
        seconds, memory, millions = (statistics.median(values) for values in zip(*runs))
        rows.append([way, f"{millions:.2f}", f"{8 * millions / 1000:.2f}", f"{memory:.1f}", f"{seconds:.1f}"])
    columns = [
        "trained",
        "million parameters",
        "GB of AdamW's averages",
        "GB resident, largest",
        "seconds per step, with scoring",
    ]
    note = f"{model}, batches of {batch_size}, medians of {rounds} in turns"
    report("Adapters against all weights", columns, rows, RESULTS / "adapters.json", note=note)


if __name__ == "__main__":
    run_command(lambda: run_cli(adapters, "benchmarks/adapters.py", sys.argv[1:]))
