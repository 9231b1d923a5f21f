"""Seconds from the start of the program to a given validation rsum, with several recipes.

    python benchmarks/time_to_recall.py --data-dir DIR --weights-dir DIR

rsum is the sum of the six recalls (R@1, R@5, R@10 in both directions), at most 600. The data are JPEGs on disk, and nothing is
cached. weights-dir holds tf_efficientnet_lite0.safetensors, tf_efficientnet_lite2.safetensors and the folder
distilbert-minilm-l6.
"""

import re
import sys
import tempfile
from pathlib import Path

from measure import report, spread, timed_lines

from utils.cli import run_cli
from utils.errors import run_command

GOALS = (298, 312, 315, 335, 343.5, 380, 400)  # validation rsum
PLAIN = ["--cached-crops", 1, "--image-feature-stages", "", "--text-feature-layers", 1]
LITE0 = ["--image-encoder", "tf_efficientnet_lite0", "--size", 224, *PLAIN]
TEXT = [*PLAIN, "--batch-size", 256, "--epochs", 4, "--text-encoder-lr", 5e-5, "--head-lr", 3e-4]
STAGES = ["--image-unfreeze-from", "blocks.5", "--image-encoder-lr", 3e-4, *TEXT]
RECIPES = {  # name: preset and flags
    "Lite0, heads": ["linear", *LITE0],
    "Lite0, heads, then two stages and the text encoder": ["flickr8k", *LITE0, *STAGES],
    "linear: Lite2 at 384 px, linear heads": ["linear"],
    "fast: Lite2 at 384 px, heads with a hidden layer": ["fast"],
    "Lite2 at 288 px, heads, then the text encoder": ["linear", "--freeze", "image", "--size", 288, *TEXT],
    "best: Lite2 at 384 px, heads, then two stages and the text encoder, eight crops, three captions": ["best"],
}


def measure(data_dir: str, weights_dir: str, seeds: tuple[int, ...] = (0, 1, 2), only: str = "", json: str = ""):
    """Trains each recipe with each seed, and measures when its validation rsum first reaches each of GOALS.

    Args:
        data_dir: folder of Flickr8k
        weights_dir: folder of the weights
        seeds: seeds; each recipe is trained once per seed
        only: only recipes whose name starts with this; empty: all
        json: file for the results
    """
    weights, recipes = Path(weights_dir).resolve(), {name: flags for name, flags in RECIPES.items() if name.startswith(only)}
    reached = {name: {goal: [] for goal in GOALS} for name in recipes}
    best, total = {name: [] for name in recipes}, {name: [] for name in recipes}
    for seed in seeds:
        for name, recipe in recipes.items():
            image_encoder = "tf_efficientnet_lite0" if "Lite0" in name else "tf_efficientnet_lite2"
            flags = [*recipe, "--data-dir", Path(data_dir).resolve(), "--text-encoder", weights / "distilbert-minilm-l6"]
            flags += ["--image-weights", weights / f"{image_encoder}.safetensors", "--seed", seed]
            times, rsums = {}, []
            with tempfile.TemporaryDirectory() as folder:
                for elapsed, line in timed_lines([*flags, "--run-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache"]):
                    if match := re.match(r"epoch .* rsum ([0-9.]+)", line):
                        rsums.append(float(match[1]))
                        for goal in GOALS:
                            if rsums[-1] >= goal:
                                times.setdefault(goal, elapsed)
                total[name].append(elapsed)
            best[name].append(max(rsums))
            for goal in GOALS:
                reached[name][goal].append(times.get(goal))
            print(f"seed {seed}, {name}: best rsum {max(rsums):.1f}, {elapsed:.0f} s", flush=True)
    rows = [
        [name, *(spread(reached[name][g], 0) if None not in reached[name][g] else "not with all seeds" for g in GOALS)]
        + [spread(total[name], 0), spread(best[name])]
        for name in recipes
    ]
    columns = ["recipe", *(f"s to {goal}" for goal in GOALS), "s to the end", "best rsum"]
    report("From JPEGs to validation rsum", columns, rows, json, seeds)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/time_to_recall.py", sys.argv[1:]))
