"""Training data in shards beside the same in a folder: pictures per second, and memory by the number of pictures.

    python benchmarks/streams.py --data-dir DIR [--rounds 3]

Each side runs in a process of its own and in turns with the other. The first epoch is read and cropped without a model: from
the folder, whose pictures are first decoded into the cache, and from shards. Memory is that of a process that reads an epoch
from shards of 1,000 and of more drawn pictures.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import datasets  # noqa: F401  so that the time to import it is not counted, as for the other libraries
from measure import peak_megabytes, report, spread

from captions import load_captions
from config import SHAPES, resolve_defaults
from Datasets import shapes
from encoders.tokenizer import train_tokenizer
from training.data import load_splits, train_loader
from training.shards import WriteShards, shards, write_shards
from training.stream import StreamLoader, open_stream
from utils.cli import run_cli
from utils.device import speed_up_cpu
from utils.errors import UserError, run_command
from utils.images import AREA

import torch  # isort: skip

SIDE = 96  # of the drawn pictures, in pixels


def read_epoch(side, data_dir, val_data, size, cache_dir):
    """A process of its own: prints seconds, pictures and peak MB of an epoch's batches as JSON."""
    speed_up_cpu()  # as training does
    settings = {"data_dir": data_dir, "val_data": val_data, "cache_dir": cache_dir, "num_workers": 4, "batch_size": 128}
    config = resolve_defaults(replace(SHAPES, **settings, size=int(size)))
    encoder = SimpleNamespace(size=int(size), resize=AREA)
    model = SimpleNamespace(image_encoder=encoder, tokenizer=train_tokenizer(["a red circle"], 512, 64))
    started = time.perf_counter()
    if side == "shards":
        loader = StreamLoader(open_stream(config), config, model)
    else:
        table, image_dir, _ = load_captions(data_dir)
        validation = table["image"][table["split"] == "val"].iloc[0]  # one, so that the others need not be decoded
        table = table[(table["split"] == "train") | (table["image"] == validation)]
        splits, _ = load_splits(config, table, image_dir, model, 0)
        loader = train_loader(config, model, splits["train"], torch.device("cpu"))
    count = sum(len(batch["image_id"]) for batch in loader)
    seconds = time.perf_counter() - started
    print(json.dumps([seconds, count, peak_megabytes()]))


def epoch_of(*arguments):
    """What `read_epoch` prints, in a new process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "epoch", *map(str, arguments), cache]
        process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise UserError(process.stderr.strip().split("\n")[-1])
    return json.loads(process.stdout.strip().split("\n")[-1])


def draw_shards(folder, count):
    """Writes drawn pictures into shards of 1,000."""
    rng = random.Random(0)

    def pictures():
        for _ in range(count):
            picture = shapes.paint(shapes.random_scene(rng), SIDE, rng)
            yield ("png", cv2.imencode(".png", picture)[1].tobytes()), None

    folder.mkdir()
    write_shards(folder, "train", [["a shape", "a picture"]] * count, 1000, pictures())


def measure(data_dir: Path, size: int = 224, rounds: int = 3, many: int = 100_000, json_path: str = ""):
    """Reads epochs from a folder and from shards in turns, and from few and many pictures.

    Args:
        data_dir: folder with Images/ and a captions file
        size: of the crops, in pixels
        rounds: of each side
        many: drawn pictures of the larger set
        json_path: file for the results
    """
    rates, memory = {"folder": [], "shards": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shards(WriteShards(str(data_dir), str(folder / "real")))
        for _ in range(rounds):
            for side, data in (("folder", data_dir), ("shards", f"{folder}/real/train-*.tar")):
                seconds, count, _ = epoch_of(side, data, f"{folder}/real/val-*.tar", size)
                rates[side].append(count / seconds)
                print(side, round(rates[side][-1]), flush=True)
        for count in (1000, many):
            draw_shards(folder / str(count), count)
            memory[count] = epoch_of("shards", f"{folder}/{count}/train-*.tar", f"{folder}/real/val-*.tar", 80)[2]
    share = statistics.median(b / a for a, b in zip(rates["folder"], rates["shards"]))
    rows = [
        ["first epoch from a folder, which is decoded into the cache first, pictures per second", spread(rates["folder"], 0)],
        ["first epoch from shards, pictures per second", spread(rates["shards"], 0)],
        ["shards / folder", f"{share:.2f}"],
        *([f"MB resident, largest, with {count:,} pictures in shards", f"{size:.0f}"] for count, size in memory.items()),
    ]
    report(f"An epoch at {size} px", ["what", "median (smallest to largest)"], rows, json_path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["epoch"]:
        run_command(lambda: read_epoch(*sys.argv[2:]))
    else:
        run_command(lambda: run_cli(measure, "benchmarks/streams.py", sys.argv[1:]))
