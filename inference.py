"""Searches pictures with words: python inference.py "a dog runs on the beach" [--run RUN] [--images FOLDER]."""

import math
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from captions import load_captions
from config import load_run, parse_flags
from dataset import PICTURE_ENDINGS, VIEW, read_image
from embedding import file_features, open_model, project
from index import FROM, nearest, open_index
from plots import draw_grid
from storage import UserError, cached_tensor, file_facts, key_of, key_of_weights, run_command, write_json
from tokenizer import tokenize

GRID_PIXELS = 320  # shorter side of the pictures in a grid


def find_matches(model, image_embeddings, query, image_filenames, n=9, output=None, show=False):
    """The n pictures that match a text best, as [(filename, score)], best first.

    image_embeddings: (N, d_e), each of length 1, or their `index.open_index`. image_filenames: N paths. Scores are
    cosines, -1 to 1; where n is larger than N there are N matches. output: a PNG to draw the matches into; show opens a
    window on it.
    Raises UserError for an empty query.
    """
    if not query.strip():
        raise UserError('the query is empty; say what the picture should show, as in python inference.py "a dog"')
    device = model.logit_scale.device
    input_ids, attention_mask = tokenize(model.tokenizer, [query])
    with torch.no_grad():
        T_f = model.text_features(input_ids.to(device), attention_mask.to(device))  # (1, d_t)
    T_e = project(model.text_projection, T_f, device)  # (1, d_e)
    scores, order = nearest(image_embeddings, T_e[0], n)
    matches = [(image_filenames[i], score) for i, score in zip(order.tolist(), scores.tolist())]
    if output:
        titles = [f"{score:.3f}  {Path(name).name}" for name, score in matches]
        draw_grid(query, [read_image(name, GRID_PIXELS) for name, _ in matches], titles, output, show)
    return matches


def newest_run():
    """The run folder under runs/ whose weights are the newest. Raises UserError where there is none."""
    weights = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UserError("runs/ holds no trained run; train one with python main.py, or name one with --run")
    return str(weights[-1].parent)


def gallery(run, images):
    """The paths of the pictures to search: those under a folder, or the run's own validation pictures."""
    if images:
        if not Path(images).is_dir():
            raise UserError(f"--images {images}: no such folder")
        paths = sorted(path for path in Path(images).rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
        if not paths:
            raise UserError(f"--images {images}: no pictures there ({', '.join(sorted(PICTURE_ENDINGS))})")
        return paths
    config = load_run(run)["config"]
    table, image_dir, _ = load_captions(config.data_dir, config.image_path, config.captions_path, config.skip_bad, config.seed)
    return [image_dir / name for name in table["image"][table["split"] == "val"].unique()]


def embed_gallery(model, paths, cache_dir, device, dtype, num_workers=0):
    """(paths, embeddings, key) of the pictures that can be read, (N, d_e) of length 1; kept on disk for the next query.

    key: changes when the model or a picture does.

    Raises UserError where none can be read.
    """
    key = key_of(key_of_weights(model), VIEW, model.image_encoder.size, dtype, file_facts(paths))

    def embed():
        I_f, bad = file_features(model, paths, device, dtype, num_workers, skip_bad=True)
        whole = torch.full(shape, math.nan)  # NaN marks a picture that cannot be read
        whole[np.setdiff1d(np.arange(len(paths)), list(bad))] = project(model.image_projection, I_f, device)
        return [whole]

    shape = (len(paths), model.image_projection.projection.out_features)
    embeddings = cached_tensor(Path(cache_dir) / f"gallery-{key}.npy", shape, torch.float32, embed)
    good = (~embeddings[:, 0].isnan()).nonzero()[:, 0].tolist()
    if len(good) < len(paths):
        print(f"left out {len(paths) - len(good)} pictures that cannot be decoded")
    return [str(paths[i]) for i in good], embeddings[good], key


def search(
    query: tyro.conf.Positional[str],
    run: str = "",
    images: str = "",
    n: int = 9,
    exact: bool = False,
    output: str = "matches.png",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
    cache_dir: str = ".cache",
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
):
    """Finds the pictures that match a text best, prints them, and draws them.

    Args:
        query: what the picture should show
        run: run folder; empty: the newest under runs/
        images: folder to search, with its subfolders; empty: the run's own validation pictures
        n: pictures to find
        exact: compare with each picture, also where there are more than 100,000
        output: PNG of the matches
        json_path: file for the matches
        cache_dir: folder where embeddings are kept for the next query
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
    """
    if n < 1:
        raise UserError(f"--n {n}: must be 1 or more")
    if not query.strip():
        raise UserError('the query is empty; say what the picture should show, as in python inference.py "a dog"')
    run = run or newest_run()
    model, device, dtype = open_model(run, device, precision)
    paths, image_embeddings, key = embed_gallery(model, gallery(run, images), cache_dir, device, dtype, num_workers)
    if len(paths) > FROM and not exact:
        image_embeddings = open_index(Path(cache_dir) / f"gallery-{key}.faiss", image_embeddings)
    print(f"{query!r} among {len(paths):,} pictures, with {run}:")
    matches = find_matches(model, image_embeddings, query, paths, n, output, show=True)
    for name, score in matches:
        print(f"{score:7.3f}  {name}")
    print(f"drawn in {output}")
    if json_path:
        found = {"query": query, "matches": [{"filename": name, "score": score} for name, score in matches]}
        write_json(json_path, found)


if __name__ == "__main__":
    run_command(lambda: parse_flags(search, "inference.py", None, sys.argv[1:]))
