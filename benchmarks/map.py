"""Layouts for the map of a picture collection: what they keep of the embeddings, and how long they take.

    python benchmarks/map.py --run RUN [--pictures 20000]

Quality is measured on the embeddings of the run's own pictures, time on vectors drawn like them (`benchmarks/search.py`). Each
layout runs in a process of its own. All get the same principal components and a seed. Those whose library is not installed are
left out (pip install openTSNE umap-learn pacmap).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import peak_megabytes, report

from search import map as picture_map
from search.gallery import open_gallery
from search.map import group, lay_out, middles, to_cells
from search.run_data import embed_captions, read_data
from search.searcher import Searcher
from utils.cli import run_cli
from utils.errors import UserError, run_command

import numpy as np  # isort: skip
import torch  # isort: skip

NEIGHBOURS = 10
CAPTION_GROUPS = 20
AT_ONCE = 1000  # rows of distances


def components(vectors):
    """What all layouts get: the first principal components of vectors, (n, d_e)."""
    left, values, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    return (left * values)[:, : picture_map.COMPONENTS]


def tsne(vectors):
    from sklearn.manifold import TSNE

    return TSNE(init="pca", random_state=0).fit_transform(components(vectors))


def open_tsne(vectors):
    from openTSNE import TSNE

    return np.asarray(TSNE(random_state=0).fit(components(vectors)))


def umap(vectors):
    from umap import UMAP

    return UMAP(init="pca", random_state=0, n_jobs=1).fit_transform(components(vectors))


def pacmap(vectors):
    from pacmap import PaCMAP

    return PaCMAP(random_state=0, apply_pca=False).fit_transform(components(vectors), init="pca")


LAYOUTS = {  # name: (library, function)
    "two principal components": ("numpy", lambda vectors: components(vectors)[:, :2]),
    "t-SNE (scikit-learn)": ("sklearn", tsne),
    "the same, faster: the map's": ("sklearn", lay_out),
    "t-SNE (openTSNE)": ("openTSNE", open_tsne),
    "UMAP": ("umap", umap),
    "PaCMAP": ("pacmap", pacmap),
}


def once(name, source, target):
    """A process of its own: lays vectors out, writes the points, and prints what that took as JSON."""
    vectors, started = np.load(source), time.process_time()
    points = LAYOUTS[name][1](vectors)
    np.save(target, points)
    print(json.dumps({"seconds": time.process_time() - started, "memory": peak_megabytes()}))


def run_once(name, vectors, folder):
    """(points, what `once` prints) of a layout of vectors."""
    np.save(f"{folder}/vectors.npy", vectors)
    command = [sys.executable, __file__, "once", name, f"{folder}/vectors.npy", f"{folder}/points.npy"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise UserError(f"{name}: {process.stderr.strip().split(chr(10))[-1]}")
    return np.load(f"{folder}/points.npy").astype(np.float64), json.loads(process.stdout.strip().split("\n")[-1])


def nearest(vectors):
    """The NEIGHBOURS nearest other rows of each row, (n, NEIGHBOURS)."""
    squares, found = (vectors**2).sum(axis=1), []
    for start in range(0, len(vectors), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(vectors)))
        distances = squares - 2 * vectors[rows] @ vectors.T
        distances[np.arange(len(rows)), rows] = np.inf
        found.append(np.argpartition(distances, NEIGHBOURS, axis=1)[:, :NEIGHBOURS])
    return np.concatenate(found)


def kept(neighbours, others):
    """The share of neighbours, (n, NEIGHBOURS), that are among others, in percent."""
    return 100 * np.mean([len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(neighbours.tolist(), others.tolist())])


def same_group(neighbours, labels):
    """The share of neighbours with the label of the picture whose they are, in percent."""
    return 100 * (labels[neighbours] == labels[:, None]).mean()


def read_run(run, cache_dir):
    """(paths, embeddings, means of their own captions' embeddings, captions) of a run's n pictures.

    The embeddings are (n, d_e), float32; the captions are as `embed_captions` has them.
    """
    searcher = Searcher(run, cache_dir=cache_dir)
    table, image_dir = read_data(run)
    names = list(table["image"].unique())
    paths = [os.path.abspath(image_dir / name) for name in names]
    files = [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]]
    gallery = open_gallery(searcher, files, "", 4, exact=True)
    captions, vectors = embed_captions(searcher)
    embeddings = vectors[:, :-1]
    place, found = dict(zip(captions, embeddings)), dict(zip(gallery.paths, gallery.embeddings()))
    own = table.groupby("image")["caption"].apply(lambda texts: np.mean([place[text] for text in texts], axis=0))
    chosen = [(name, path) for name, path in zip(names, paths) if path in found]
    vectors = np.stack([found[path] for _, path in chosen]).astype(np.float32)
    return [path for _, path in chosen], vectors, np.stack([own[name] for name, _ in chosen]), (captions, embeddings)


def fit(labels, vectors, texts):
    """How many pictures' own captions are nearest to the middle of their own group, in percent."""
    return 100 * ((texts @ middles(labels, vectors).T).argmax(axis=1) == labels).mean()


def measure(run: str, pictures: int = 20_000, cache_dir: str = ".cache", json_path: str = ""):
    """Lays out the pictures of a run, and drawn vectors like them.

    Args:
        run: run folder, whose pictures and captions are the real ones
        pictures: vectors to measure the time with
        cache_dir: folder where the real embeddings are kept
        json_path: file for the results
    """
    from sklearn.cluster import KMeans
    from sklearn.manifold import trustworthiness

    paths, vectors, texts, captions = read_run(run, cache_dir)
    groups = KMeans(CAPTION_GROUPS, n_init=3, random_state=0).fit_predict(texts)
    drawn, near = drawing().Drawing(torch.from_numpy(vectors), vectors.shape[1]).draw(pictures).numpy(), nearest(vectors)
    near_drawn, note = nearest(drawn), ""
    rows = [["none: the embeddings", "100", "", f"{same_group(near, groups):.0f}", "100", "", ""]]
    with tempfile.TemporaryDirectory() as folder:
        for name, (library, _) in LAYOUTS.items():
            if importlib.util.find_spec(library) is None:
                print(f"{name}: {library} is not installed")
                continue
            points, _ = run_once(name, vectors, folder)
            others = nearest(points)
            quality = [f"{kept(near, others):.0f}", f"{trustworthiness(vectors, points, n_neighbors=NEIGHBOURS):.3f}"]
            drawn_points, taken = run_once(name, drawn, folder)
            share = f"{kept(near_drawn, nearest(drawn_points)):.0f}"
            cost = [f"{taken['seconds']:.0f}", f"{taken['memory']:,.0f}"]
            rows.append([name, *quality, f"{same_group(others, groups):.0f}", share, *cost])
            print(*rows[-1], flush=True)
            if LAYOUTS[name][1] is lay_out:
                note = describe_groups(points, vectors, texts, near)
        note += describe_whole(drawn, paths, captions, f"{folder}/map.html")
    columns = ["layout", "neighbours kept, %", "trustworthiness", "same caption group, %"]
    columns += [f"{pictures:,} drawn: kept, %", "processor s", "MB at most"]
    report(f"Maps of {len(vectors):,} pictures", columns, rows, json_path, [0], note=f"{len(vectors):,} real pictures; {note}")


def describe_groups(points, vectors, texts, near):
    """What the grid keeps of a layout, and how well captions fit groups of points and of embeddings, in words."""
    from sklearn.cluster import KMeans

    labels, _ = group(points, vectors, [], np.empty((0, vectors.shape[1])))
    others = KMeans(labels.max() + 1, n_init=10, random_state=0).fit_predict(vectors)
    on_grid = kept(near, nearest(to_cells(points).astype(np.float64)))
    return (
        f"of {labels.max() + 1} groups, a picture's own captions fit its own best for {fit(labels, vectors, texts):.0f}% with "
        f"groups of points and {fit(others, vectors, texts):.0f}% with groups of embeddings; the map's grid keeps "
        f"{on_grid:.0f}% of the neighbours"
    )


def describe_whole(drawn, paths, captions, output):
    """What a whole map takes, with the files of real pictures in turn, in words."""
    started, busy = time.perf_counter(), time.process_time()
    picture_map.make_map(drawn, [paths[i % len(paths)] for i in range(len(drawn))], *captions, output, 2)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    size = os.path.getsize(output) / 1e6
    return f"; the whole map of {len(drawn):,}: {seconds:.0f} s, {busy:.0f} processor s, a page of {size:.0f} MB"


def drawing():
    """`benchmarks/search.py`, whose name is that of a folder of the project."""
    spec = importlib.util.spec_from_file_location("search_benchmark", Path(__file__).with_name("search.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        once(*sys.argv[2:])
    else:
        run_command(lambda: run_cli(measure, "benchmarks/map.py", sys.argv[1:]))
