"""What views and ensembles bring at search time, and what they cost: recall, time to embed, time per query, space per picture.

    python benchmarks/search_options.py --run RUN [RUN ...] --data-dir DIR

The first run alone, with one, two and four views; then all runs as an ensemble, with one and four. A query is a caption that is
embedded and compared with all validation pictures, in a process that has the model loaded.
"""

import statistics
import sys
import time

from measure import report

from captions import image_positions
from embedding import (
    IMAGE_BATCH,
    image_features,
    images_for,
    open_model,
    pair_scores,
    picture_vectors,
    text_features,
    text_vectors,
    token_ids,
)
from evaluation.retrieval import number_captions, recall, right_pairs
from evaluation.splits import select_rows
from search.index import top_k
from search.queries import embed_texts
from utils.cli import run_cli
from utils.errors import UserError, run_command

NUM_QUERIES = 50


def row_of(name, run, views, rows, num_workers):
    """One row of the table."""
    table, image_dir, _ = rows
    names, image_of_text = image_positions(table)
    captions = list(table["caption"])
    model, device, dtype = open_model(run, "auto", "auto", views)
    pictures = []
    for picture, problem in images_for(model, [image_dir / name for name in names], num_workers):
        if problem:
            raise UserError(problem)
        pictures.append(picture)
    image_features(model, pictures[:IMAGE_BATCH], device, dtype, IMAGE_BATCH)  # the first batch is slower
    started = time.perf_counter()
    I_f = image_features(model, pictures, device, dtype, len(pictures))
    embedding_ms = 1000 * (time.perf_counter() - started) / len(pictures)
    I_v = picture_vectors(model, I_f, device).numpy()
    T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
    T_v = text_vectors(model, T_f, device).numpy()
    right = right_pairs(image_of_text, number_captions(captions), len(names))
    cosines = T_v[:, :-1] @ I_v[:, :-1].T
    corrected, plain = (recall(scores, image_of_text, right)["rsum"] for scores in (pair_scores(T_v, I_v), cosines))
    seconds = []
    for caption in captions[:: max(1, len(captions) // NUM_QUERIES)][:NUM_QUERIES]:
        started = time.perf_counter()
        top_k(I_v, embed_texts(model, [caption])[0], 9)
        seconds.append(time.perf_counter() - started)
    query_ms = 1000 * statistics.median(seconds)
    return [name, f"{plain:.1f}", f"{corrected:.1f}", f"{embedding_ms:.0f}", f"{query_ms:.1f}", f"{2 * I_v.shape[1]:,}"]


def measure(run: tuple[str, ...], data_dir: str = "", num_workers: int = 2, json_path: str = ""):
    """Scores and times one view and several, one run and an ensemble.

    Args:
        run: run folders
        data_dir: folder with Images/ and a captions file; empty: the first run's
        num_workers: threads that decode pictures
        json_path: file for the results
    """
    everything = ",".join(run)
    rows = select_rows(everything, (data_dir, "", ""), "val", False)
    variants = [(f"one run, {views} view{'s' * (views > 1)}", run[0], views) for views in (1, 2, 4)]
    if len(run) > 1:
        variants += [(f"{len(run)} runs, {views} view{'s' * (views > 1)}", everything, views) for views in (1, 4)]
    table = []
    for name, chosen, views in variants:
        table.append(row_of(name, chosen, views, rows, num_workers))
        print(*table[-1], flush=True)
    columns = ["at search time", "rsum, cosines", "rsum, hubness corrected"]
    columns += ["ms to embed a picture", "ms per query", "bytes per picture"]
    report("views and ensembles", columns, table, json_path)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/search_options.py", sys.argv[1:]))
