"""Compare models on the drawn sample: parameters, pairs per second, recall and zero-shot accuracy, with several seeds.

    python benchmarks/systems.py
    python benchmarks/systems.py --systems mixer transformer --seeds 0 1 2

Every preset is trained with `python main.py PRESET`. `transformer` is the preset `mixer` with attention instead of token
mixing, at the same depth and width. All systems are trained with the first seed, then with the second, and so on. The pictures
for zero-shot classification are drawn for this benchmark and show one shape each; their 48 classes are the pairs of colour and
shape.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import pandas as pd
from measure import evaluate, report, spread, timed_lines

import clip
from config import PRESETS, SHAPES
from Datasets import shapes
from utils.cli import run_cli
from utils.errors import run_command

SYSTEMS = {name: [name] for name, config in PRESETS.items() if config.data_dir == SHAPES.data_dir}
SYSTEMS["transformer"] = ["mixer", "--image-encoder", "vit", "--image-heads", "2", "--image-encoder-lr", "7e-4"]
SYSTEMS["transformer"] += ["--text-encoder", "clip", "--text-heads", "8", "--text-encoder-lr", "7e-4"]
NUM_TRAIN = 6000  # training images of the sample


def measure(systems: tuple[str, ...] = tuple(SYSTEMS), seeds: tuple[int, ...] = (0, 1, 2), json: str = ""):
    """Trains each system with each seed, and scores it by retrieval on the test images and by zero-shot classification.

    Args:
        systems: presets for the drawn sample, and transformer
        seeds: seeds; each system is trained once per seed
        json: file for the results
    """
    results = {system: [] for system in systems}
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
                    "pairs a second": NUM_TRAIN / statistics.median(history["seconds"]),
                    "minutes": total / 60,
                    "validation T2I R@1": history.loc[history["rsum"].idxmax(), "text_to_image_R@1"],
                    "test T2I R@1": test["text_to_image"]["R@1"],
                    "test I2T R@1": test["image_to_text"]["R@1"],
                    "zero-shot top-1": evaluate("zeroshot", "--run", run, *zeroshot)["top1"],
                }
                results[system].append(row)
                print(f"seed {seed}, {system}: " + ", ".join(f"{name} {value:.1f}" for name, value in row.items()), flush=True)
    columns = list(next(iter(results.values()))[0])
    rows = [[system, *(spread([row[column] for row in runs]) for column in columns)] for system, runs in results.items()]
    report("Systems on the drawn sample", ["system", *columns], rows, json, seeds)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/systems.py", sys.argv[1:]))
