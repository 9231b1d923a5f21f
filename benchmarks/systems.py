"""Systems compared on the drawn sample: parameters, pairs a second, recall and zero-shot accuracy, several seeds.

    python benchmarks/systems.py
    python benchmarks/systems.py --presets paper mixer --seeds 0 1 2

Every system is trained with its preset's one command, `python main.py PRESET`. Seeds go round all systems in turn. The
zero-shot pictures, drawn for this, show one shape each; their 48 classes are the sample's pairs of colour and shape.
"""

import json as jsons
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import ROOT, report, spread, timed_lines

import clip
from config import PRESETS, SHAPES, parse_flags
from Datasets import shapes
from storage import UserError, run_command

ON_SHAPES = tuple(name for name, config in PRESETS.items() if config.data_dir == SHAPES.data_dir)
TRAINED = 6000  # images of the sample that an epoch passes over


def evaluate(*arguments):
    """The JSON that python evaluate.py writes. Raises UserError where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, arguments), "--json", f"{folder}/scores.json"]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if process.returncode:
            raise UserError(process.stderr.strip().split("\n")[-1])
        return jsons.loads(Path(f"{folder}/scores.json").read_text(encoding="utf-8"))


def measure(presets: tuple[str, ...] = ON_SHAPES, seeds: tuple[int, ...] = (0, 1, 2), json: str = ""):
    """Trains each preset with each seed, and scores it on the test images and by zero-shot classification.

    Args:
        presets: presets that train on the drawn sample
        seeds: one run of each preset a seed
        json: file for the figures
    """
    found = {preset: [] for preset in presets}
    with tempfile.TemporaryDirectory() as folder:
        shapes.draw(f"{folder}/sample")
        shapes.draw_classes(f"{folder}/classes")
        zeroshot = ["--images", f"{folder}/classes", "--output", f"{folder}/confusion.png"]
        for seed in seeds:
            for preset in presets:
                run = Path(folder) / f"{preset}-{seed}"
                flags = [preset, "--data-dir", f"{folder}/sample", "--cache-dir", f"{folder}/cache", "--run-dir", run]
                *_, (total, _) = timed_lines([*flags, "--seed", seed])
                history = pd.read_csv(run / "history.csv")
                model, _ = clip.load(run, "cpu")
                test = evaluate("retrieval", "--run", run, "--split", "test")
                row = {
                    "millions": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
                    "pairs a second": TRAINED / statistics.median(history["seconds"]),
                    "minutes": total / 60,
                    "validation T2I R@1": history.loc[history["rsum"].idxmax(), "text_to_image_R@1"],
                    "test T2I R@1": test["text_to_image"]["R@1"],
                    "test I2T R@1": test["image_to_text"]["R@1"],
                    "zero-shot top-1": evaluate("zeroshot", "--run", run, *zeroshot)["top1"],
                }
                found[preset].append(row)
                print(f"seed {seed}, {preset}: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()), flush=True)
    columns = list(next(iter(found.values()))[0])
    rows = [[preset, *(spread([row[column] for row in runs]) for column in columns)] for preset, runs in found.items()]
    report(f"Systems on the drawn sample, seeds {', '.join(map(str, seeds))}", ["preset", *columns], rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "systems.py", None, sys.argv[1:]))
