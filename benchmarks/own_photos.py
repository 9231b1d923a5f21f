"""What a search of a folder costs: taking its pictures in, opening it again, and one query after that.

    python benchmarks/own_photos.py --run RUN [--pictures 20000]

The pictures are drawn. The bare rate is the image tower's over batches of pixels that lie ready in memory, and taking in is
everything from the files to the index on disk; they take turns, a share of the pictures at a time.
"""

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import torch
from measure import report, spread

from config import parse_flags
from dataset import as_batch, center_crop, read_image
from Datasets import shapes
from device import autocast
from embedding import IMAGE_BATCH, open_model
from gallery import find_pictures, open_gallery
from inference import best_matches, embed_query, newest_run
from storage import run_command

FOLDERS = 5  # in which the pictures lie, each of which is one round
QUERIES = 50


@torch.no_grad()
def bare_rate(model, batch, batches, device, dtype):
    """Pictures a second of the image tower alone."""
    started = time.perf_counter()
    for _ in range(batches):
        with autocast(device, dtype):
            model.image_encoder(batch.to(device)).float().cpu()
    return batches * len(batch) / (time.perf_counter() - started)


def measure(pictures: int = 20_000, side: int = 96, run: str = "", num_workers: int = 4, json: str = ""):
    """Times the taking in of drawn pictures beside the bare forward pass, a second start, and single queries.

    Args:
        pictures: how many
        side: height and width of them in pixels
        run: run folder; empty: the newest under runs/
        num_workers: threads that decode pictures, as of inference.py
        json: file for the figures
    """
    model, device, dtype = open_model(run or newest_run(), "auto", "auto")
    rng = random.Random(0)
    bare, taken = [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for number in range(pictures):
            path = folder / "pictures" / str(number % FOLDERS) / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = shapes.paint(shapes.random_scene(rng), side, rng)
            cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        size = model.image_encoder.size
        batch = as_batch([center_crop(read_image(path, size), size) for path in sorted(path.parent.iterdir())[:IMAGE_BATCH]])
        bare_rate(model, batch, 4, device, dtype)  # to warm up
        for part in range(FOLDERS):
            files = find_pictures(folder / "pictures" / str(part))
            bare.append(bare_rate(model, batch, -(-len(files) // len(batch)), device, dtype))
            started = time.perf_counter()
            open_gallery(model, files, str(folder / "pictures" / str(part)), folder / "cache", device, dtype, num_workers)
            taken.append(len(files) / (time.perf_counter() - started))
        starts, queries = [], []
        for _ in range(5):
            started = time.perf_counter()
            files = find_pictures(folder / "pictures")
            gallery = open_gallery(model, files, str(folder / "pictures"), folder / "cache", device, dtype, num_workers)
            starts.append(time.perf_counter() - started)
        for number in range(QUERIES):
            started = time.perf_counter()
            best_matches(gallery.searched, embed_query(model, [f"a photo of {number} red circles"]), gallery.paths, 9)
            queries.append(1000 * (time.perf_counter() - started))
    share = 100 * statistics.median(a / b for a, b in zip(taken, bare))
    rows = [
        ["taking in, pictures a second", spread(taken, 0)],
        ["bare forward pass, pictures a second", spread(bare, 0)],
        ["taking in / bare, percent", f"{share:.0f}"],
        ["second start of the index, s", spread(starts, 2)],
        ["a query, ms", spread(queries, 1)],
    ]
    report(f"{pictures:,} pictures of {side} px", ["what", "median (smallest to largest)"], rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "own_photos.py", None, sys.argv[1:]))
