"""Scores a run: python evaluate.py retrieval|match|zeroshot|sts --run RUN ...; leaks --data-dir DIR looks at a data set."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import scipy.stats
import tyro

from captions import SPLITS, load_captions, training_images
from config import OPENAI, PRESETS, load_run, parse_flags
from dataset import center_crop, read_image
from embedding import file_features, open_model, project, text_features, token_ids
from leaks import leaks
from plots import draw_similarity
from storage import UserError, run_command, write_json
from sts import sts
from zeroshot import zeroshot

KS = (1, 5, 10)
SHOWN_PAIRS = 8  # in the picture that `match` draws
DRAWN_PIXELS = 128  # height and width of the pictures in it


# ---- scores of similarities --------------------------------------------------------------------------------------


def recall(similarity, image_of_text):
    """Recall@K and median rank of retrieval in both directions.

    similarity: (m, n) array, of m captions with n images. image_of_text: (m,) position of each caption's image; images
    may have different numbers of captions, but at least one.

    Returns {"image_to_text": {"R@1", "R@5", "R@10", "median_rank"}, "text_to_image": {...}, "rsum"}, recalls in
    percent. Any caption of an image is a hit for it. What scores the same counts as ranked before the right answer: a
    model that finds everything alike scores nothing.
    Raises ValueError where a similarity is not finite or an image has no caption.
    """
    similarity, image_of_text = np.asarray(similarity), np.asarray(image_of_text)
    if not np.isfinite(similarity).all():
        raise ValueError("similarities that are not finite cannot be ranked")
    n = similarity.shape[1]
    if len(np.unique(image_of_text)) < n:
        raise ValueError("an image without a caption cannot be scored")
    own = similarity[np.arange(len(similarity)), image_of_text]  # (m,) each caption with its image
    text_ranks = (similarity >= own[:, None]).sum(axis=1)
    best = np.full(n, -np.inf, dtype=similarity.dtype)
    np.maximum.at(best, image_of_text, own)  # (n,) each image with the best of its captions
    own_at_best = np.bincount(image_of_text[own >= best[image_of_text]], minlength=n)
    image_ranks = (similarity >= best).sum(axis=0) - own_at_best + 1

    def summary(ranks):
        return {f"R@{k}": 100 * float((ranks <= k).mean()) for k in KS} | {"median_rank": float(np.median(ranks))}

    scores = {"image_to_text": summary(image_ranks), "text_to_image": summary(text_ranks)}
    return scores | {"rsum": sum(direction[f"R@{k}"] for direction in scores.values() for k in KS)}


def match_choices(similarity, image_of_text, choices, seed):
    """Which caption belongs to each image, out of `choices`: one of its own, and one of each of some other images.

    similarity: (m, n) of m captions with n images. image_of_text: (m,) position of each caption's image. seed: of the
    captions drawn.

    Returns {"images", "choices", "accuracy", "chance", "interval"}, the last three in percent; interval holds the ends of
    Wilson's 95% confidence interval of the accuracy. What scores the same as the right caption counts as wrong.
    """
    n, rng, right = similarity.shape[1], np.random.default_rng(seed), 0
    captions_of = [np.flatnonzero(image_of_text == image) for image in range(n)]
    for image in range(n):
        others = rng.choice(n - 1, choices - 1, replace=False)
        others += others >= image  # any image but this one
        own, *wrong = (similarity[rng.choice(captions_of[i]), image] for i in [image, *others])
        right += own > max(wrong)
    low, high = scipy.stats.binomtest(int(right), n).proportion_ci(method="wilson")
    percent = {"accuracy": 100 * right / n, "chance": 100 / choices, "interval": [100 * float(low), 100 * float(high)]}
    return {"images": n, "choices": choices} | percent


def score(model, I_f, T_f, image_of_text, device):
    """`recall` of features I_f, (n, d_i), and T_f, (m, d_t), through the model's heads."""
    return recall(similarities(model, I_f, T_f, device), image_of_text)


def similarities(model, I_f, T_f, device):
    """The (m, n) cosines of m captions with n images, from their features."""
    I_e = project(model.image_projection, I_f, device)
    T_e = project(model.text_projection, T_f, device)
    return (T_e @ I_e.T).numpy()


def positions_of_images(table):
    """A table's image names in the order of their first captions, and each row's position among them, (m,)."""
    positions, names = table["image"].factorize()
    return list(names), positions


def recall_table(scores):
    """The scores of `recall` as lines to print."""
    lines = [f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS) + f"{'median rank':>14}"]
    for direction in ("image_to_text", "text_to_image"):
        row = scores[direction]
        recalls = "".join(f"{row[f'R@{k}']:8.1f}" for k in KS)
        lines.append(f"{direction.replace('_', ' '):16}{recalls}{row['median_rank']:14g}")
    return "\n".join([*lines, f"rsum {scores['rsum']:.1f}"])


# ---- captioned pictures --------------------------------------------------------------------------------------------


def embed_split(run, data_dir, image_path, captions_path, split, skip_bad, num_workers, device, precision):
    """Embeds a split of a data folder, the run's own where none is named.

    Returns (similarity, image_of_text, captions, paths): the (m, n) cosines of m captions with n images, (m,) the position
    of each caption's image, the m captions, and the paths of the n images.
    Raises UserError where there is nothing to embed.
    """
    own_data = not (data_dir or image_path or captions_path)
    if own_data and run in OPENAI:
        raise UserError(f"--run {run}: has no data of its own; name some with --data-dir")
    config = PRESETS["openai"] if run in OPENAI else load_run(run)["config"]
    sources = (config.data_dir, config.image_path, config.captions_path) if own_data else (data_dir, image_path, captions_path)
    table, image_dir, skipped = load_captions(*sources, skip_bad=skip_bad)
    chosen = table if split == "all" else table[table["split"] == split]
    if chosen.empty:
        counts = ", ".join(f"{name} {count}" for name, count in table["split"].value_counts().items() if name)
        raise UserError(f"--split {split}: this data has no such images (captions: {counts}); --split all takes every image")
    if run not in OPENAI and split != "train":
        chosen = without_training_images(run, chosen, split)
    model, device, dtype = open_model(run, device, precision)
    names, _ = positions_of_images(chosen)
    I_f, bad = file_features(model, [image_dir / name for name in names], device, dtype, num_workers, skip_bad)
    chosen = chosen[~chosen["image"].isin([names[position] for position in bad])]
    names, image_of_text = positions_of_images(chosen)
    captions = list(chosen["caption"])
    T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
    if skipped or bad:
        print(f"left out: {len(skipped)} rows, {len(bad)} pictures")
    return similarities(model, I_f, T_f, device), image_of_text, captions, [image_dir / name for name in names]


def without_training_images(run, table, split):
    """A table without the images that a run was trained on, which it would find too easily; a line says how many those are.

    --split all keeps them. Raises UserError where nothing is left.
    """
    trained = training_images(Path(run) / SPLITS, table)
    if trained and split == "all":
        print(f"{len(trained):,} of these images were trained on: a score that holds for new pictures leaves them out")
        return table
    if trained:
        print(f"left out: {len(trained):,} images of the {split} split, which this run was trained on")
        table = table[~table["image"].isin(trained)]
    if table.empty:
        raise UserError(f"--split {split}: {run} was trained on all of these images; score it on others")
    return table


def retrieval(
    run: str,
    data_dir: str = "",
    image_path: str = "",
    captions_path: str = "",
    split: Literal["train", "val", "test", "all"] = "val",
    skip_bad: bool = False,
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Scores a run by retrieval in both directions: recall at 1, 5 and 10 in percent, the median rank, and rsum.

    Args:
        run: run folder, or one of OpenAI's names
        data_dir: folder with Images/ and a captions file; empty: the run's own data
        image_path: folder of the images, where it is not in data_dir
        captions_path: captions file, where it is not in data_dir
        split: images to score; all takes every image of the folder
        skip_bad: leave out unusable rows and pictures instead of stopping
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
        json_path: file for the scores
    """
    similarity, image_of_text, captions, paths = embed_split(
        run, data_dir, image_path, captions_path, split, skip_bad, num_workers, device, precision
    )
    scores = {"images": len(paths), "captions": len(captions)} | recall(similarity, image_of_text)
    chance = f"chance of R@1 from text to image {100 / len(paths):.2f}%"
    print(f"{split}: {len(paths):,} images, {len(captions):,} captions; {chance}")
    print(recall_table(scores))
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
    """Gives each image its caption among several, and draws some images against a caption of each.

    Args:
        run: run folder, or one of OpenAI's names
        data_dir: folder with Images/ and a captions file; empty: the run's own data
        image_path: folder of the images, where it is not in data_dir
        captions_path: captions file, where it is not in data_dir
        split: images to score; all takes every image of the folder
        choices: captions that each image chooses from
        seed: of the captions drawn
        skip_bad: leave out unusable rows and pictures instead of stopping
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
        output: PNG of the similarity matrix
        json_path: file for the scores
    """
    if choices < 2:
        raise UserError(f"--choices {choices}: must be 2 or more")
    similarity, image_of_text, captions, paths = embed_split(
        run, data_dir, image_path, captions_path, split, skip_bad, num_workers, device, precision
    )
    if len(paths) < choices:
        raise UserError(f"--choices {choices}: there are only {len(paths)} images to take captions from")
    scores = match_choices(similarity, image_of_text, choices, seed)
    low, high = scores["interval"]
    print(f"{split}: {len(paths):,} images, each with its caption among {choices}")
    print(f"right {scores['accuracy']:.1f}% (95% interval {low:.1f} to {high:.1f}), chance {scores['chance']:.1f}%")
    rng = np.random.default_rng(seed)
    images = np.sort(rng.choice(len(paths), min(SHOWN_PAIRS, len(paths)), replace=False))
    rows = [rng.choice(np.flatnonzero(image_of_text == image)) for image in images]
    pictures = [center_crop(read_image(paths[image], DRAWN_PIXELS), DRAWN_PIXELS) for image in images]
    draw_similarity(pictures, [captions[row] for row in rows], similarity[np.ix_(rows, images)], output)
    print(f"drawn in {output}")
    if json_path:
        write_json(json_path, scores)


TASKS = {"retrieval": retrieval, "match": match, "zeroshot": zeroshot, "sts": sts, "leaks": leaks}


def main():
    task, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if task in ("-h", "--help"):
        print(f"{__doc__}\n")
        print("\n".join(f"  {name:10} {function.__doc__.splitlines()[0]}" for name, function in TASKS.items()))
        print("\npython evaluate.py TASK --help lists the flags of one.")
    elif task not in TASKS:
        raise UserError(f"task {task!r} is unknown; there are {', '.join(TASKS)}")
    else:
        parse_flags(TASKS[task], f"evaluate.py {task}", None, arguments)


if __name__ == "__main__":
    run_command(main)
