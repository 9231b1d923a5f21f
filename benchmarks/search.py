"""Milliseconds of one query on one core over a large gallery of embeddings, exact and approximate (HNSW).

    python benchmarks/search.py [--pictures 1000000]

The embeddings are drawn: points of a random 32-dimensional space within the 256 dimensions, with noise around it, as the
embeddings of pictures fill few of their dimensions. Queries are drawn alike. Recall is the share of the exact ten best
that the approximate search finds.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import report, spread

import index
from config import parse_flags
from storage import run_command

import numpy as np  # isort: skip
import torch  # isort: skip

INNER_DIMENSIONS, NOISE = 32, 0.3


def draw(n, width, generator):
    """n embeddings of length 1, (n, width)."""
    basis = torch.randn(INNER_DIMENSIONS, width, generator=torch.Generator().manual_seed(0)) / INNER_DIMENSIONS**0.5
    points = torch.randn(n, INNER_DIMENSIONS, generator=generator) @ basis
    return torch.nn.functional.normalize(points + NOISE * torch.randn(n, width, generator=generator), dim=1)


def measure(pictures: int = 1_000_000, width: int = 256, queries: int = 200, n: int = 10, json: str = ""):
    """Times single queries, the exact and the approximate search in turns.

    Args:
        pictures: embeddings in the gallery
        width: of the embeddings
        queries: queries timed
        n: matches asked for
        json: file for the figures
    """
    import faiss

    generator = torch.Generator().manual_seed(1)
    gallery, texts = draw(pictures, width, generator), draw(queries, width, generator)
    ids = np.arange(pictures)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        graph = index.open_graph(Path(folder) / "gallery.faiss", ids, gallery)
        built = time.perf_counter() - started
        started = time.perf_counter()
        graph = index.open_graph(Path(folder) / "gallery.faiss", ids, gallery)
        read = time.perf_counter() - started
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    milliseconds, found = {"exact": [], "approximate": []}, {"exact": [], "approximate": []}
    for text in texts:
        for side, searched in (("exact", gallery), ("approximate", graph)):
            started = time.perf_counter()
            _, positions = index.nearest(searched, text, n)
            milliseconds[side].append(1000 * (time.perf_counter() - started))
            found[side].append(set(positions.tolist()))
    recall = statistics.mean(len(a & e) / n for a, e in zip(found["approximate"], found["exact"]))
    rows = [
        ["exact", spread(milliseconds["exact"], 2), "100.0", "", ""],
        ["approximate", spread(milliseconds["approximate"], 2), f"{100 * recall:.1f}", f"{built:.0f}", f"{read:.1f}"],
    ]
    columns = ["search", "ms a query", f"recall of the {n} best, %", "s to build, all cores", "s to read"]
    report(f"{pictures:,} embeddings of width {width}, {queries} single queries", columns, rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "search.py", None, sys.argv[1:]))
