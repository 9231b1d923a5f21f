"""What fine-tuning forgets, and what keeps it: adapters, some old pictures, and mixtures of the weights before and after.

    python benchmarks/forgetting.py [--seeds 0 1 2] [--only "all weights"] [--output runs/forgetting]

The preset paper learns the sample in four of its colours, and is then fine-tuned on scenes in the other four, in four ways:
all weights, the text encoder and the heads, adapters, and all weights with some of the old pictures among the new ones. The old
score is the zero-shot accuracy over the 24 pairs of an old colour and a shape; the new one is recall on the new validation
images. What is trained already is not trained again.
"""

import contextlib
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from measure import RESULTS, report

import main
from config import PRESETS, resolve_defaults
from Datasets import shapes
from utils.cli import run_cli
from utils.errors import UserError, run_command
from utils.files import atomic_dir, write_json

OLD, NEW = list(shapes.COLORS)[:4], list(shapes.COLORS)[4:]
PROMPT = "a {} ."
OLD_EPOCHS, NEW_EPOCHS = 30, 12
REPLAYED = 600  # old pictures that --data-dir has beside the 3,000 new ones
ALL_WEIGHTS = {"image_encoder_lr": 1e-3, "text_encoder_lr": 3e-4, "head_lr": 1e-3}
WAYS = {  # name: settings of the fine-tuning
    "all weights": ALL_WEIGHTS,
    "text encoder and head": {"freeze": "image", "text_encoder_lr": 7e-4, "head_lr": 2e-3},
    "adapters of rank 8": {"lora_rank": 8, "image_encoder_lr": 4e-3, "text_encoder_lr": 4e-3, "head_lr": 1e-3},
    "all weights, with old pictures": ALL_WEIGHTS | {"data_dir": "both"},
}


def prepare(output):
    """Draws both halves of the world, and the pictures of the old classes."""
    for name, colors, train, seed in (("old", OLD, 6000, 0), ("new", NEW, 3000, 1)):
        if not (output / name).exists():
            shapes.draw(output / name, train=train, seed=seed, colors=colors)
    if not (output / "classes").exists():
        shapes.draw_classes(output / "classes", colors=OLD)
    if not (output / "both").exists():
        add_old_pictures(output / "new", output / "old", output / "both")


def add_old_pictures(new, old, folder):
    """Writes a copy of the folder `new` with the first REPLAYED training pictures of `old` among its training pictures."""
    with atomic_dir(folder) as target:
        shutil.copytree(new, target, dirs_exist_ok=True)
        names = (old / "shapes.trainImages.txt").read_text().split()[:REPLAYED]
        for name in names:
            shutil.copy(old / "Images" / name, target / "Images" / f"old-{name}")
        table = pd.read_csv(old / "captions.txt")
        table = table[table["image"].isin(names)].assign(image="old-" + table["image"])
        table.to_csv(target / "captions.txt", mode="a", header=False, index=False)
        with open(target / "shapes.trainImages.txt", "a") as train:
            train.writelines(f"old-{name}\n" for name in names)


def run(config, folder):
    """Trains a Config unless its run is there. Returns {"before", "after", "mixed"} of --wise-ft, or None without it."""
    if not (folder / "done.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "w") as log, contextlib.redirect_stdout(log):
            main.train(resolve_defaults(replace(config, run_dir=str(folder))))
        history = pd.read_csv(folder / "history.csv")
        write_json(folder / "done.json", {"seconds": float(history["seconds"].sum())})
    if not config.wise_ft:
        return None
    rows = pd.read_csv(folder / "tradeoff.csv")
    return {"before": rows.iloc[0], "after": rows.iloc[-1], "mixed": rows[rows["chosen"] == "yes"].iloc[0]}


def fine_tuned(seed, settings, output, name):
    """The scores of a fine-tuning of the old run of a seed, of which --wise-ft gives those before, after and of the mixture."""
    old = replace(PRESETS["paper"], data_dir=str(output / "old"), seed=seed, epochs=OLD_EPOCHS, cache_dir=str(output / "cache"))
    run(old, output / f"old-{seed}")
    keep = {"keep_folder": str(output / "classes"), "keep_template": PROMPT, "wise_ft": True, "wise_ft_share": 0.05}
    model = {"model": str(output / f"old-{seed}"), "epochs": NEW_EPOCHS}
    settings = settings | {"data_dir": str(output / settings.get("data_dir", "new"))}
    return run(replace(old, **model, **keep, **settings), output / f"{name.replace(',', '').replace(' ', '-')}-{seed}")


def forgetting(seeds: tuple[int, ...] = (0, 1, 2), only: str = "", output: Path = Path("runs/forgetting"), json_path: str = ""):
    """Fine-tunes in each way with each seed, and compares what is lost and what is learned.

    Args:
        seeds: each way is trained once with each
        only: only ways whose name begins with this, "all weights" among them; needs json_path; empty: all
        output: folder of the samples and the runs
        json_path: file for the table; empty: docs/results/forgetting.json
    """
    if only and not ("all weights".startswith(only) and json_path):
        raise UserError(f"--only {only}: must include 'all weights', as the others are compared with it, and needs --json-path")
    prepare(output)
    ways = {way: settings for way, settings in WAYS.items() if way.startswith(only)}
    scores = {way: [fine_tuned(seed, settings, output, way) for seed in seeds] for way, settings in ways.items()}
    plain = scores["all weights"]
    table = {"before": [run["before"] for run in plain]}
    for way, runs in scores.items():
        table |= {way: [run["after"] for run in runs], f"{way}, mixed": [run["mixed"] for run in runs]}
    rows = []
    for name, found in table.items():
        lost = [run["before"]["kept"] - run["after"]["kept"] for run in plain]
        kept = [100 * (row["kept"] - run["after"]["kept"]) / loss for row, run, loss in zip(found, plain, lost)]
        shares = "-" if name == "before" else cell([100 * row["share"] for row in found])
        rows.append([name, cell([row["kept"] for row in found]), cell(kept), cell([row["rsum"] for row in found]), shares])
    columns = ["weights", "old accuracy, %", "kept of what all weights lose, %", "new rsum", "share of the new weights, %"]
    note = "the mean of the seeds and, behind ±, their standard deviation"
    report("What fine-tuning forgets", columns, rows, json_path or RESULTS / "forgetting.json", seeds, note=note)


def cell(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    run_command(lambda: run_cli(forgetting, "benchmarks/forgetting.py", sys.argv[1:]))
