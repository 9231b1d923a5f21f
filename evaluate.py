"""Embeds a data set and scores it: python evaluate.py retrieval --run RUN [--data-dir DIR] [--split val]."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tqdm import tqdm

import clip
from captions import load_captions
from config import load_run, parse_flags
from dataset import as_batch, center_crop, pad, read_images
from device import autocast, keep_freed_memory, pick_device, pick_dtype
from storage import UserError, run_command, write_whole

KS = (1, 5, 10)
IMAGE_BATCH, TEXT_BATCH = 64, 256  # what embedding takes at a time; memory and speed change, results do not


# ---- embedding ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def image_features(model, pictures, device, dtype, total):
    """The image tower's features of pictures: an iterable of about `total` uint8 arrays from `dataset`, of which the
    middle square is taken, or of activations of the tower's trunk.

    Returns (n, d_i), fp32, on the CPU; n is 0 where there are no pictures.
    """
    model.eval()
    encoder, features, pictures = model.image_encoder, [torch.empty(0, model.image_encoder.width)], iter(pictures)
    with tqdm(total=total, desc="images", leave=False, disable=None, unit="img") as progress:
        while batch := list(islice(pictures, IMAGE_BATCH)):
            activations = torch.is_tensor(batch[0])
            image = torch.stack(batch) if activations else as_batch([center_crop(picture, encoder.size) for picture in batch])
            with autocast(device, dtype):
                features.append(encoder(image.to(device)).float().cpu())
            progress.update(len(batch))
    return torch.cat(features)


@torch.no_grad()
def text_features(model, texts, device, dtype):
    """The text tower's features of m lists of token ids: (m, d_t), fp32, on the CPU."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # captions of like length need little padding
    features = torch.empty(len(texts), model.text_encoder.width)
    for start in tqdm(range(0, len(order), TEXT_BATCH), desc="captions", leave=False, disable=None):
        rows = order[start : start + TEXT_BATCH]
        input_ids, attention_mask = pad([texts[i] for i in rows], model.tokenizer.padding["pad_id"])
        with autocast(device, dtype):
            features[rows] = model.text_encoder(input_ids.to(device), attention_mask.to(device)).float().cpu()
    return features


@torch.no_grad()
def project(head, features, device):
    """A tower's features, (n, d), through its head: (n, d_e) embeddings of length 1, on the CPU."""
    head.eval()
    return F.normalize(head(features.to(device)), dim=1).cpu()


def token_ids(tokenizer, captions):
    """m captions -> m lists of token ids without padding."""
    encodings = tokenizer.encode_batch(list(captions))
    return [[i for i, real in zip(encoding.ids, encoding.attention_mask) if real] for encoding in encodings]


# ---- retrieval ---------------------------------------------------------------------------------------------------


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


def score(model, I_f, T_f, image_of_text, device):
    """`recall` of features I_f, (n, d_i), and T_f, (m, d_t), through the model's heads."""
    I_e = project(model.image_projection, I_f, device)
    T_e = project(model.text_projection, T_f, device)
    return recall((T_e @ I_e.T).numpy(), image_of_text)


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
        run: run folder
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
    config = load_run(run)["config"]
    keep_freed_memory()
    device = pick_device(device)
    dtype = pick_dtype(precision, device)
    own_data = not (data_dir or image_path or captions_path)
    sources = (config.data_dir, config.image_path, config.captions_path) if own_data else (data_dir, image_path, captions_path)
    table, image_dir, skipped = load_captions(*sources, skip_bad=skip_bad, seed=config.seed)
    chosen = table if split == "all" else table[table["split"] == split]
    if chosen.empty:
        counts = ", ".join(f"{name} {count}" for name, count in table["split"].value_counts().items() if name)
        raise UserError(f"--split {split}: this data has no such images (captions: {counts}); --split all takes every image")
    model, _ = clip.load(run, device)
    names, _ = positions_of_images(chosen)
    bad = {}

    def pictures():
        paths = [image_dir / name for name in names]
        for name, (picture, problem) in zip(names, read_images(paths, model.image_encoder.size, num_workers)):
            if problem and not skip_bad:
                raise UserError(f"{problem}; mend or remove it, or pass --skip-bad")
            if problem:
                bad[name] = problem
            else:
                yield picture

    I_f = image_features(model, pictures(), device, dtype, len(names))
    chosen = chosen[~chosen["image"].isin(bad)]
    if chosen.empty:
        raise UserError(f"{image_dir}: none of its {len(names)} pictures can be decoded")
    names, image_of_text = positions_of_images(chosen)
    T_f = text_features(model, token_ids(model.tokenizer, chosen["caption"]), device, dtype)
    scores = {"images": len(names), "captions": len(chosen)} | score(model, I_f, T_f, image_of_text, device)
    if skipped or bad:
        print(f"left out: {len(skipped)} rows, {len(bad)} pictures")
    print(f"{split}: {len(names):,} images, {len(chosen):,} captions; chance of R@1 from text to image {100 / len(names):.2f}%")
    print(recall_table(scores))
    if json_path:
        write_whole(json_path, lambda path: Path(path).write_text(json.dumps(scores, indent=2) + "\n"))


TASKS = {"retrieval": retrieval}


def main():
    task, arguments = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if task in ("-h", "--help"):
        print(f"{__doc__}\n\nTasks: {', '.join(TASKS)}; python evaluate.py TASK --help lists the flags of one.")
    elif task not in TASKS:
        raise UserError(f"task {task!r} is unknown; there are {', '.join(TASKS)}")
    else:
        parse_flags(TASKS[task], f"evaluate.py {task}", None, arguments)


if __name__ == "__main__":
    run_command(main)
