"""The pictures and captions that a run was trained with, to search among."""

import os

import numpy as np

from captions import load_captions
from config import is_model_name, is_stream, load_run, run_names
from utils.cache import write_array
from utils.errors import UserError

CAPTIONS_PER_STEP = 512  # between which the page follows its folder


def print_progress(count, total):
    """Says once that captions are embedded, where that takes more than a moment."""
    if not count and total > CAPTIONS_PER_STEP:
        print(f"embedding {total:,} captions, which is done once", flush=True)


def read_data(run):
    """(table, image_dir) of the data set that a run was trained on. Raises UserError if it is no longer there.

    run: of an ensemble, the first one counts.
    """
    run = run_names(run)[0]
    if is_model_name(run):
        raise UserError(f"--run {run}: has no pictures and captions of its own; name a folder of pictures with --images")
    config = load_run(run)["config"]
    place = config.image_path or config.data_dir
    if not (is_stream(place) or os.path.exists(place)):
        raise UserError(
            f"--run {run}: its own pictures ({place}) are not on this machine; name a folder of pictures with --images"
        )
    if is_stream(config.data_dir):
        from training.stream import validation_table  # only here: this import takes seconds

        table, image_dir, _ = validation_table(config)
    else:
        paths = config.data_dir, config.image_path, config.captions_path
        table, image_dir, _ = load_captions(*paths, config.skip_bad, (config.image_column, config.caption_column))
    return table, image_dir


def validation_files(run):
    """(path, bytes, modification time in ns) of the run's validation pictures."""
    table, image_dir = read_data(run)
    paths = [os.path.abspath(image_dir / name) for name in table["image"][table["split"] == "val"].unique()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]]


def embed_captions(searcher, on_progress=print_progress):
    """The distinct captions of a run's data set: (captions, vectors), m strings and (m, d_e + 1), as `search.queries` says.

    searcher: a `search.searcher.Searcher`. The vectors are cached on disk. If the data set is no longer there, m is 0 and a
    message is printed. on_progress: called with the numbers of captions embedded and in all, before each step.
    """
    try:
        captions = list(read_data(searcher.run)[0]["caption"].unique())
    except UserError as error:
        print(f"no captions for pictures: {error}")
        return [], np.empty((0, searcher.width), np.float32)
    path = searcher.captions_path(captions)
    try:
        vectors = np.load(path, mmap_mode="r")
        if vectors.shape == (len(captions), searcher.width):
            return captions, vectors
    except (OSError, ValueError, EOFError):  # not yet computed, or damaged
        pass
    steps = []
    for start in range(0, len(captions), CAPTIONS_PER_STEP):
        on_progress(start, len(captions))
        steps.append(searcher.embed_captions(captions[start : start + CAPTIONS_PER_STEP]))
    write_array(path, np.concatenate(steps))
    searcher.note_use(path)
    return captions, np.load(path, mmap_mode="r")
