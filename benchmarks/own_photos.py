"""The time to search a folder: to index its pictures, to open the index again, and to answer one query.

    python benchmarks/own_photos.py --run RUN [--pictures 20000]

The pictures are drawn. Indexing is everything from picture files to embeddings on disk. The bare forward pass is that of the
image encoder alone, on batches of pixels in memory. Both are timed in turns, on one part of the pictures after another.
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

from Datasets import shapes
from embedding import IMAGE_BATCH, open_model
from search.files import find_pictures
from search.gallery import open_gallery
from search.options import newest_run
from search.queries import best_matches, embed_query
from search.searcher import Searcher
from utils.cli import run_cli
from utils.device import autocast
from utils.errors import run_command
from utils.images import as_batch, center_crop, read_image

NUM_FOLDERS = 5  # of pictures; each is one round
NUM_QUERIES = 50


@torch.no_grad()
def bare_rate(model, batch, batches, device, dtype):
    """Pictures per second of the image encoder alone."""
    started = time.perf_counter()
    for _ in range(batches):
        with autocast(device, dtype):
            model.image_encoder(batch.to(device)).float().cpu()
    return batches * len(batch) / (time.perf_counter() - started)


def measure(pictures: int = 20_000, side: int = 96, run: str = "", num_workers: int = 4, json: str = ""):
    """Times the indexing of drawn pictures beside the bare forward pass, opening the index again, and single queries.

    Args:
        pictures: number of pictures
        side: height and width of the pictures in pixels
        run: run folder; empty: the newest in runs/
        num_workers: threads that decode pictures
        json: file for the results
    """
    run = run or newest_run()
    model, device, dtype = open_model(run, "auto", "auto")
    rng = random.Random(0)
    bare, indexed = [], []  # pictures per second, by round
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for number in range(pictures):
            path = folder / "pictures" / str(number % NUM_FOLDERS) / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = shapes.paint(shapes.random_scene(rng), side, rng)
            cv2.imwrite(str(path), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        size = model.image_encoder.size
        batch = as_batch([center_crop(read_image(path, size), size) for path in sorted(path.parent.iterdir())[:IMAGE_BATCH]])
        bare_rate(model, batch, 4, device, dtype)  # warm up
        for part in range(NUM_FOLDERS):
            files = list(find_pictures(folder / "pictures" / str(part)))
            bare.append(bare_rate(model, batch, -(-len(files) // len(batch)), device, dtype))
            started = time.perf_counter()
            searcher = Searcher(run, cache_dir=folder / "cache")
            open_gallery(searcher, files, str(folder / "pictures" / str(part)), num_workers)
            indexed.append(len(files) / (time.perf_counter() - started))
        starts, queries = [], []  # seconds, milliseconds
        for _ in range(5):
            started = time.perf_counter()
            files = find_pictures(folder / "pictures")
            gallery = open_gallery(searcher, files, str(folder / "pictures"), num_workers)
            starts.append(time.perf_counter() - started)
        for number in range(NUM_QUERIES):
            started = time.perf_counter()
            best_matches(gallery, embed_query(searcher, [f"a photo of {number} red circles"]), gallery.paths, 9)
            queries.append(1000 * (time.perf_counter() - started))
    share = 100 * statistics.median(a / b for a, b in zip(indexed, bare))
    rows = [
        ["indexing, pictures per second", spread(indexed, 0)],
        ["bare forward pass, pictures per second", spread(bare, 0)],
        ["indexing / bare, percent", f"{share:.0f}"],
        ["opening the index again, s", spread(starts, 2)],
        ["one query, ms", spread(queries, 1)],
    ]
    report(f"{pictures:,} pictures of {side} px", ["what", "median (smallest to largest)"], rows, json)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/own_photos.py", sys.argv[1:]))
