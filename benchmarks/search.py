"""Search among a million pictures: recall, milliseconds, memory and disk, with vectors like those of a run.

    python benchmarks/search.py --run RUN [--pictures 1000000]

The vectors are drawn around the embeddings of the run's own pictures: each is one of these plus noise of their covariance. How
much noise is chosen so that among as many drawn vectors the tenth neighbours are as close as among the real ones; both are
printed. Queries are real captions of the run's data. The gallery is opened in a process of its own, whose memory is measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import peak_megabytes, report

from search import index
from search.gallery import open_gallery, read_gallery
from search.queries import as_queries
from search.run_data import embed_captions, read_data
from search.searcher import Searcher
from search.store import Store
from utils.cli import run_cli
from utils.errors import UserError, run_command

import numpy as np  # isort: skip
import torch  # isort: skip

NEIGHBOURS = 10
SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)  # of the noise, as a share of the real vectors' spread
DRAWN_AT_ONCE = 20_000
GROWTH = 10_000  # pictures that are added to measure how long that takes
NUM_COLD = 50


def closeness(vectors):
    """The median cosine of vectors, (n, d_e), with their tenth neighbours."""
    cosines = vectors @ vectors.T
    return cosines.topk(NEIGHBOURS + 1, dim=1).values[:, -1].median().item()


class Drawing:
    """Draws vectors like real ones, (n, d), whose first d_e numbers are an L2-normalised embedding."""

    def __init__(self, real, d_e):
        self.real, self.d_e, self.generator = real, d_e, torch.Generator().manual_seed(0)
        centred = real - real.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(real))
        self.root = vectors * values.clamp(min=0).sqrt()  # (d, d); times its transpose it is the covariance
        self.scale = min(SCALES, key=lambda scale: abs(self.closeness(scale) - closeness(real[:, :d_e])))

    def closeness(self, scale):
        self.scale = scale
        return closeness(self.draw(len(self.real))[:, : self.d_e])

    def draw(self, count):
        chosen = self.real[torch.randint(len(self.real), (count,), generator=self.generator)]
        noise = torch.randn(count, self.real.shape[1], generator=self.generator) @ self.root.T
        drawn = chosen + self.scale * noise
        return torch.cat([torch.nn.functional.normalize(drawn[:, : self.d_e], dim=1), drawn[:, self.d_e :]], dim=1)


def entries(first, count):
    return ((f"/drawn/{number:09d}.jpg", 1, 1) for number in range(first, first + count))


def fill(store, drawing, first, count):
    """Adds drawn pictures to a store."""
    for start in range(first, first + count, DRAWN_AT_ONCE):
        vectors = drawing.draw(min(DRAWN_AT_ONCE, first + count - start)).numpy()
        store.add([(*entry, bytes(16), None, vector) for entry, vector in zip(entries(start, len(vectors)), vectors)])


def forget_files(folder):
    """Drops files from the operating system's memory, so that they are read from the disk again (Linux)."""
    for path in Path(folder).iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def search_once(folder, width, count):
    """A process of its own: opens the gallery, answers the queries, and prints what that took as JSON."""
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    queries = np.load(f"{folder}/queries.npy")
    before, started = peak_megabytes(), time.perf_counter()
    store = Store(Path(folder) / "gallery.sqlite", width)
    store.list_files(entries(0, count))
    gallery = read_gallery(store, "/drawn", exact=False)
    opened, milliseconds = time.perf_counter() - started, {"cold": [], "warm": [], "exact": []}
    forget_files(folder)
    found = {"warm": [], "exact": []}
    for kind, some in (("cold", queries[:NUM_COLD]), ("warm", queries)):
        for query in some:
            started = time.perf_counter()
            _, positions = index.top_k(gallery, query, NEIGHBOURS)
            [gallery.paths[i] for i in positions.tolist()]
            milliseconds[kind].append(1000 * (time.perf_counter() - started))
            found.setdefault(kind, []).append(set(positions.tolist()))
    memory = peak_megabytes() - before
    for query in queries[: len(queries) // 4]:
        started = time.perf_counter()
        _, positions = index.exact_top_k(gallery.vectors, gallery.rows, query, NEIGHBOURS)
        milliseconds["exact"].append(1000 * (time.perf_counter() - started))
        found["exact"].append(set(positions.tolist()))
    recall = statistics.mean(len(a & b) / NEIGHBOURS for a, b in zip(found["warm"], found["exact"]))
    print(json.dumps({"opened": opened, "ms": milliseconds, "memory": memory, "recall": recall}))


def measure(run: str, pictures: int = 1_000_000, queries: int = 400, cache_dir: str = ".cache", json_path: str = ""):
    """Builds a gallery of drawn vectors, searches it, adds to it.

    Args:
        run: run folder, whose pictures and captions are the real ones
        pictures: vectors in the gallery
        queries: captions to search with
        cache_dir: folder where the real embeddings are kept
        json_path: file for the results
    """
    searcher = Searcher(run, cache_dir=cache_dir)
    table, image_dir = read_data(run)
    paths = [os.path.abspath(image_dir / name) for name in table["image"].unique()]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]]
    own = open_gallery(searcher, files, "", 4, exact=True)
    real = torch.from_numpy(own.vectors[own.rows].astype(np.float32))
    captions = embed_captions(searcher)[1]
    width = real.shape[1]
    drawing = Drawing(real, width - 1)
    near = f"{closeness(real[:, :-1]):.3f} among {len(real):,} real and "
    near += f"{drawing.closeness(drawing.scale):.3f} among as many drawn"
    print(f"median cosine with the tenth neighbour: {near} (noise {drawing.scale})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "gallery.sqlite", width)
        chosen = torch.randperm(len(captions), generator=torch.Generator().manual_seed(1))[:queries]
        np.save(f"{folder}/queries.npy", as_queries(captions[chosen.numpy(), :-1]))
        fill(store, drawing, 0, pictures - GROWTH)
        started = time.perf_counter()
        index.open_index(store.companion(".faiss"), store.vectors())
        built = time.perf_counter() - started
        print(f"built in {built:.0f} s", flush=True)
        started = time.perf_counter()
        fill(store, drawing, pictures - GROWTH, GROWTH)
        index.open_index(store.companion(".faiss"), store.vectors())
        added = time.perf_counter() - started
        sizes = {suffix: store.companion(suffix).stat().st_size / pictures for suffix in (".vectors", ".faiss")}
        sizes[".sqlite"] = store.path.stat().st_size / pictures
        store.database.close()
        process = subprocess.run(
            [sys.executable, __file__, "once", folder, str(width), str(pictures)], capture_output=True, text=True
        )
        if process.returncode:
            raise UserError(process.stderr.strip().split("\n")[-1])
        found = json.loads(process.stdout.strip().split("\n")[-1])
    milliseconds = found["ms"]

    def spread(kind):
        return f"{statistics.median(milliseconds[kind]):.1f}, {statistics.quantiles(milliseconds[kind], n=20)[-1]:.1f}"

    rows = [
        ["recall of the exact ten best, %", f"{100 * found['recall']:.1f}"],
        ["ms a query: median, 95th percentile", spread("warm")],
        ["the same, files not in memory", spread("cold")],
        ["the same, exact", spread("exact")],
        ["MB resident, more than before opening", f"{found['memory']:.0f}"],
        ["s to open", f"{found['opened']:.1f}"],
        ["s to build the index", f"{built:.0f}"],
        [f"s to add {GROWTH:,}", f"{added:.1f}"],
        ["bytes per picture: vectors, codes, database", ", ".join(f"{size:.0f}" for size in sizes.values())],
    ]
    note = f"captions as queries, one thread; median cosine with the tenth neighbour {near}"
    report(f"{pictures:,} vectors of width {width}", ["what", "measured"], rows, json_path, [0], note=note)


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        search_once(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        run_command(lambda: run_cli(measure, "benchmarks/search.py", sys.argv[1:]))
