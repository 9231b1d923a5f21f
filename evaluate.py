"""Score runs: python evaluate.py retrieval|match|zeroshot|sts|twins|compare|calibrate --run RUN ...; leaks checks data.

Each task is imported when it is called, as its libraries take seconds to load and the help does without them.
"""

import importlib
import sys
from typing import Annotated, Literal

import numpy as np
import tyro

from config import run_cli
from utils.errors import UserError, run_command
from utils.files import write_json
from utils.images import Views, center_crop, read_image

NUM_PAIRS = 8  # images and captions in the figure that `match` draws
DRAWN_PIXELS = 128  # height and width of each image in it


def retrieval(
    run: str,
    data_dir: str = "",
    image_path: str = "",
    captions_path: str = "",
    split: Literal["train", "val", "test", "all"] = "val",
    views: Views = 1,
    skip_bad: bool = False,
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Scores retrieval in both directions: R@1, R@5, R@10, median rank, and rsum, the sum of the six recalls (at most 600).

    Args:
        run: run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names; an ensemble: several with commas between them
        data_dir: folder with Images/ and a captions file; empty: the data that the run was trained on
        image_path: folder of the images, if it is not in data_dir
        captions_path: captions file, if it is not in data_dir
        split: which images to score; all: every image of the data set
        views: crops of each picture to embed and average: more recall for as many times the time; search with the same
        skip_bad: leave out unusable rows and pictures instead of stopping
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 or fp16 where native, else fp32
        json_path: file for the scores
    """
    from embedding import open_model, pair_scores
    from evaluation.retrieval import recall, recall_table
    from evaluation.splits import embed_pairs, select_rows

    data_paths = data_dir, image_path, captions_path
    rows = select_rows(run, data_paths, split, skip_bad)
    opened = open_model(run, device, precision, views)
    I_v, T_v, image_of_text, captions, paths = embed_pairs(opened, rows, skip_bad, num_workers)
    scores = {"images": len(paths), "captions": len(captions)} | recall(pair_scores(T_v, I_v), image_of_text)
    corrected = opened[0].hubness is not None
    cosine_scores = recall(T_v[:, :-1] @ I_v[:, :-1].T, image_of_text) if corrected else scores
    scores["rsum_of_cosines"] = cosine_scores["rsum"]
    chance = f"chance of R@1 from text to image {100 / len(paths):.2f}%"
    print(f"{split}: {len(paths):,} images, {len(captions):,} captions; {chance}")
    print(recall_table(scores))
    if corrected:
        print(f"rsum {scores['rsum_of_cosines']:.1f} by the cosines alone, without the hubness correction")
    if json_path:
        write_json(json_path, scores)


def match(
    run: str,
    data_dir: str = "",
    image_path: str = "",
    captions_path: str = "",
    split: Literal["train", "val", "test", "all"] = "val",
    choices: int = 4,
    seed: int = 0,
    skip_bad: bool = False,
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    output: str = "match.png",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Scores multiple choice: which of several captions is the image's own? Also draws a similarity matrix.

    Args:
        run: run folder, open_clip:MODEL@WEIGHTS, or one of OpenAI's names
        data_dir: folder with Images/ and a captions file; empty: the data that the run was trained on
        image_path: folder of the images, if it is not in data_dir
        captions_path: captions file, if it is not in data_dir
        split: which images to score; all: every image of the data set
        choices: captions to choose from for each image; one is its own
        seed: of the random choice of captions
        skip_bad: leave out unusable rows and pictures instead of stopping
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 or fp16 where native, else fp32
        output: PNG file for the similarity matrix of some images and captions
        json_path: file for the scores
    """
    from embedding import open_model
    from evaluation.retrieval import match_choices
    from evaluation.splits import embed_rows, select_rows
    from utils.plots import draw_similarity

    if choices < 2:
        raise UserError(f"--choices {choices}: must be 2 or more")
    data_paths = data_dir, image_path, captions_path
    rows = select_rows(run, data_paths, split, skip_bad)
    opened = open_model(run, device, precision)
    similarity, image_of_text, captions, paths = embed_rows(opened, rows, skip_bad, num_workers)
    if len(paths) < choices:
        raise UserError(f"--choices {choices}: there are only {len(paths)} images to take captions from")
    scores = match_choices(similarity, image_of_text, choices, seed)
    low, high = scores["interval"]
    print(f"{split}: {len(paths):,} images, {choices} captions to choose from for each")
    print(f"accuracy {scores['accuracy']:.1f}% (95% interval {low:.1f} to {high:.1f}), chance {scores['chance']:.1f}%")
    rng = np.random.default_rng(seed)
    images = np.sort(rng.choice(len(paths), min(NUM_PAIRS, len(paths)), replace=False))
    rows = [rng.choice(np.flatnonzero(image_of_text == image)) for image in images]
    pictures = [center_crop(read_image(paths[image], DRAWN_PIXELS), DRAWN_PIXELS) for image in images]
    draw_similarity(pictures, [captions[row] for row in rows], similarity[np.ix_(rows, images)], output)
    print(f"drawn in {output}")
    if json_path:
        write_json(json_path, scores)


TASKS = {  # where each is, what to write behind python evaluate.py, and what it does
    "retrieval": ("evaluate", "retrieval --run runs/shapes --split test", "retrieval in both directions"),
    "match": ("evaluate", "match --run runs/shapes --choices 4", "multiple choice among captions"),
    "zeroshot": ("evaluation.zeroshot", "zeroshot --run runs/best --images FOLDER", "classes by their names"),
    "sts": ("evaluation.sts", "sts --run runs/best --file sts-test.csv", "similarity of sentences, against human ratings"),
    "twins": ("evaluation.twins", "twins --run runs/shapes", "word order: captions of the same words"),
    "compare": ("evaluation.compare", "compare --run runs/shapes runs/paper", "models side by side"),
    "calibrate": ("evaluation.relevance", "calibrate --run runs/shapes", "the score above which a picture matches"),
    "leaks": ("evaluation.leaks", "leaks --data-dir Datasets/shapes", "pictures that are in two splits"),
}


def main():
    task, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if task in ("-h", "--help"):
        print("usage: python evaluate.py TASK [--flags]\n\nScores a run, or checks a data set. Tasks, each with an example:")
        for _, example, summary in TASKS.values():
            print(f"  {example:43}{summary}")
        print("\nThe flags of a task: python evaluate.py TASK --help")
    elif task not in TASKS:
        raise UserError(f"task {task!r} is unknown; choose one of {', '.join(TASKS)}")
    else:
        module, example, _ = TASKS[task]
        run_cli(
            getattr(importlib.import_module(module), task), f"evaluate.py {task}", arguments, [f"python evaluate.py {example}"]
        )


if __name__ == "__main__":
    run_command(main)
