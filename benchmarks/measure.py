"""What all benchmarks share: time variants in turns, summarise the times, print a table, write a JSON file.

The speed of a machine changes over time, so the variants that are compared run in turns, and their median times are reported.
"""

import datetime
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"  # the figures of the documents; benchmarks/tables.py puts them there
sys.path.insert(0, str(ROOT))  # so that benchmarks can import the project's modules from any working directory

import torch

from utils.errors import UserError
from utils.files import write_json


def alternate(variants, rounds):
    """Runs each variant once to warm up, then all in turns. variants: {name: function}. Returns {name: [seconds per round]}."""
    seconds = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, variant in variants.items():
            started = time.perf_counter()
            variant()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values, digits=1):
    """Summarises numbers as "median (smallest to largest)"."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def peak_megabytes():
    """The largest resident memory of this process (Linux). Not getrusage's, which begins with that of the parent process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def processor():
    """The name of the processor, if the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit():
    """The first digits of the commit that is checked out, with a + where files differ from it; unknown without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude", "*"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return process.stdout.strip() or "unknown"


def report(title, columns, rows, json_path, seeds=(), curves=None, note=""):
    """Prints rows, lists with one cell per column, as a Markdown table, and writes them to json_path if it is not empty.

    What is written is what `benchmarks/tables.py` reads: docs/results/NAME.json is the table NAME of the documents. seeds:
    those of the figures. curves: {name: [[x, y], ...]}, written with it for `benchmarks/figures.py`. note: on the figures.
    """
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    widths = [max(len(str(row[i])) for row in [columns, *rows]) for i in range(len(columns))]
    print(f"\n{title}; {machine}\n")
    for row in [columns, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(f"{cell:{width}}" for cell, width in zip(map(str, row), widths)) + " |")
    if json_path:
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        source = {"command": command, "commit": commit(), "date": datetime.date.today().isoformat(), "processor": machine}
        results = {"title": title, **source, "seeds": ", ".join(map(str, seeds)), "note": note}
        write_json(json_path, results | {"columns": columns, "rows": rows} | ({"curves": curves} if curves else {}))


def timed_lines(arguments, script="main.py"):
    """Runs `python main.py`, or another script, and yields (seconds since its start, line) as soon as it prints a line.

    Raises UserError if it fails.
    """
    command = [sys.executable, "-u", str(ROOT / script), *map(str, arguments)]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield time.perf_counter() - started, line
        errors = process.stderr.read()
    if process.returncode:
        raise UserError(errors.strip().split("\n")[-1])


def evaluate(*arguments):
    """Runs `python evaluate.py` and returns what it writes as JSON. Raises UserError if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments), "--json", f"{folder}/scores.json"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if process.returncode:
            raise UserError(process.stderr.strip().split("\n")[-1])
        return json.loads(Path(f"{folder}/scores.json").read_text(encoding="utf-8"))
