"""Milliseconds per query, on one core, of exact and approximate (HNSW) search in a large gallery of embeddings.

    python benchmarks/search.py [--pictures 1000000]

The embeddings are random: points of a random subspace of few dimensions, plus noise, because embeddings of real pictures also
vary in few directions. Queries are drawn in the same way. Recall is the share of the true nearest neighbours that the
approximate search finds.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import report, spread

from config import run_cli
from search import index
from utils.errors import run_command

import numpy as np  # isort: skip
import torch  # isort: skip

SUBSPACE_DIM = 32
NOISE_STD = 0.3


def draw(n, width, generator):
    """n random embeddings, (n, width), L2-normalised."""
    basis = torch.randn(SUBSPACE_DIM, width, generator=torch.Generator().manual_seed(0)) / SUBSPACE_DIM**0.5
    points = torch.randn(n, SUBSPACE_DIM, generator=generator) @ basis
    return torch.nn.functional.normalize(points + NOISE_STD * torch.randn(n, width, generator=generator), dim=1)


def measure(pictures: int = 1_000_000, width: int = 256, queries: int = 200, n: int = 10, json: str = ""):
    """Times single queries, with exact and approximate search in turns.

    Args:
        pictures: embeddings in the gallery
        width: dimensions of the embeddings
        queries: timed queries
        n: nearest neighbours per query
        json: file for the results
    """
    import faiss

    generator = torch.Generator().manual_seed(1)
    gallery, texts = draw(pictures, width, generator), draw(queries, width, generator)
    ids = np.arange(pictures)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        graph = index.open_graph(Path(folder) / "gallery.faiss", ids, gallery)
        build_seconds = time.perf_counter() - started
        started = time.perf_counter()
        graph = index.open_graph(Path(folder) / "gallery.faiss", ids, gallery)
        read_seconds = time.perf_counter() - started
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    milliseconds, matches = {"exact": [], "approximate": []}, {"exact": [], "approximate": []}
    for text in texts:
        for name, searched in (("exact", gallery), ("approximate", graph)):
            started = time.perf_counter()
            _, positions = index.top_k(searched, text, n)
            milliseconds[name].append(1000 * (time.perf_counter() - started))
            matches[name].append(set(positions.tolist()))
    recall = statistics.mean(len(a & e) / n for a, e in zip(matches["approximate"], matches["exact"]))
    approximate = [spread(milliseconds["approximate"], 2), f"{100 * recall:.1f}", f"{build_seconds:.0f}", f"{read_seconds:.1f}"]
    rows = [["exact", spread(milliseconds["exact"], 2), "100.0", "", ""], ["approximate", *approximate]]
    columns = ["search", "ms a query", f"recall of the {n} best, %", "s to build, all cores", "s to read"]
    report(f"{pictures:,} embeddings of width {width}, {queries} single queries", columns, rows, json)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/search.py", sys.argv[1:]))
