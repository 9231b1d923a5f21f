"""Systems compared on the drawn sample: parameters, pairs a second, recall and zero-shot accuracy, several seeds.

    python benchmarks/systems.py
    python benchmarks/systems.py --systems mixer transformer --seeds 0 1 2

Every preset is trained with its one command, `python main.py PRESET`; `transformer` is the preset `mixer` with attention in
place of token mixing, at equal depth and width. Seeds go round all systems in turn. The zero-shot pictures, drawn for this,
show one shape each; their 48 classes are the sample's pairs of colour and shape.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import evaluate, report, spread, timed_lines

import clip
from config import PRESETS, SHAPES, parse_flags
from Datasets import shapes
from storage import run_command

SYSTEMS = {name: [name] for name, config in PRESETS.items() if config.data_dir == SHAPES.data_dir}
SYSTEMS["transformer"] = ["mixer", "--image-encoder", "vit", "--image-heads", "2", "--image-encoder-lr", "7e-4"]
SYSTEMS["transformer"] += ["--text-encoder", "clip", "--text-heads", "8", "--text-encoder-lr", "7e-4"]
TRAINED = 6000  # images of the sample that an epoch passes over


def measure(systems: tuple[str, ...] = tuple(SYSTEMS), seeds: tuple[int, ...] = (0, 1, 2), json: str = ""):
    """Trains each system with each seed, and scores it on the test images and by zero-shot classification.

    Args:
        systems: presets that train on the drawn sample, and transformer
        seeds: one run of each system a seed
        json: file for the figures
    """
    found = {system: [] for system in systems}
    with tempfile.TemporaryDirectory() as folder:
        shapes.draw(f"{folder}/sample")
        shapes.draw_classes(f"{folder}/classes")
        zeroshot = ["--images", f"{folder}/classes", "--output", f"{folder}/confusion.png"]
        for seed in seeds:
            for system in systems:
                run = Path(folder) / f"{system}-{seed}"
                flags = [*SYSTEMS[system], "--data-dir", f"{folder}/sample", "--cache-dir", f"{folder}/cache", "--run-dir", run]
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
                found[system].append(row)
                print(f"seed {seed}, {system}: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()), flush=True)
    columns = list(next(iter(found.values()))[0])
    rows = [[system, *(spread([row[column] for row in runs]) for column in columns)] for system, runs in found.items()]
    report(f"Systems on the drawn sample, seeds {', '.join(map(str, seeds))}", ["system", *columns], rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "systems.py", None, sys.argv[1:]))
