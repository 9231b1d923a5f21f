"""Score runs: python evaluate.py retrieval|match|zeroshot|sts|twins|compare|calibrate --run RUN ...; leaks checks data.

Each task is imported when it is called, as its libraries take seconds to load and the help does without them.
"""

import importlib
import sys

from evaluation.options import TASKS, read_task
from utils.errors import UserError, run_command
from utils.files import write_json

NUM_PAIRS = 8  # images and captions in the figure that `match` draws
DRAWN_PIXELS = 128  # height and width of each image in it


def retrieval(options):
    """Scores retrieval in both directions: R@1, R@5, R@10, median rank, and rsum, the sum of the six recalls (at most 600)."""
    from embedding import cosines, open_model, pair_scores
    from evaluation.retrieval import number_captions, recall, recall_table, repeats_line, right_pairs
    from evaluation.splits import embed_pairs, select_rows

    data_paths = options.data_dir, options.image_path, options.captions_path
    columns = options.image_column, options.caption_column
    rows = select_rows(options.run, data_paths, options.split, options.skip_bad, columns)
    opened = open_model(options.run, options.device, options.precision, options.views)
    I_v, T_v, image_of_text, captions, paths = embed_pairs(opened, rows, options.skip_bad, options.num_workers)
    right = right_pairs(image_of_text, number_captions(captions), len(paths))
    scores = {"images": len(paths), "captions": len(captions)} | recall(pair_scores(T_v, I_v), image_of_text, right)
    corrected = opened[0].hubness is not None
    cosine_scores = recall(cosines(T_v, I_v), image_of_text, right) if corrected else scores
    scores["rsum_of_cosines"] = cosine_scores["rsum"]
    chance = f"chance of R@1 from text to image {100 / len(paths):.2f}%"
    print(f"{options.split}: {len(paths):,} images, {len(captions):,} captions; {chance}")
    print(recall_table(scores, len(paths)))
    if repeats := repeats_line(captions, image_of_text):
        print(repeats)
    if corrected:
        print(f"rsum {scores['rsum_of_cosines']:.1f} by the cosines alone, without the hubness correction")
    if options.json:
        write_json(options.json, scores)


def match(options):
    """Scores multiple choice: which of several captions is the image's own? Also draws a similarity matrix."""
    import numpy as np

    from embedding import open_model
    from evaluation.retrieval import match_choices, number_captions
    from evaluation.splits import embed_rows, select_rows
    from utils.images import center_crop, read_image
    from utils.plots import draw_similarity

    data_paths = options.data_dir, options.image_path, options.captions_path
    columns = options.image_column, options.caption_column
    rows = select_rows(options.run, data_paths, options.split, options.skip_bad, columns)
    opened = open_model(options.run, options.device, options.precision)
    similarity, image_of_text, captions, paths = embed_rows(opened, rows, options.skip_bad, options.num_workers)
    if len(paths) < options.choices:
        raise UserError(f"--choices {options.choices}: there are only {len(paths)} images to take captions from")
    scores = match_choices(similarity, image_of_text, options.choices, options.seed, number_captions(captions))
    low, high = scores["interval"]
    print(f"{options.split}: {len(paths):,} images, {options.choices} captions to choose from for each")
    print(f"accuracy {scores['accuracy']:.1f}% (95% interval {low:.1f} to {high:.1f}), chance {scores['chance']:.1f}%")
    if options.json:
        write_json(options.json, scores)
    rng = np.random.default_rng(options.seed)
    images = np.sort(rng.choice(len(paths), min(NUM_PAIRS, len(paths)), replace=False))
    rows = [rng.choice(np.flatnonzero(image_of_text == image)) for image in images]
    pictures = [center_crop(read_image(paths[image], DRAWN_PIXELS), DRAWN_PIXELS) for image in images]
    draw_similarity(pictures, [captions[row] for row in rows], similarity[np.ix_(rows, images)], options.output)
    print(f"drawn in {options.output}")


def main(arguments):
    task, options = read_task(arguments)
    module = importlib.import_module(TASKS[task][1])
    getattr(module, task)(options)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
