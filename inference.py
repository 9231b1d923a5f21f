"""Searches pictures: python inference.py "a dog runs on the beach" [--run RUN] [--images FOLDER], and the other way round."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro

from captions import load_captions, read_text
from config import load_run, parse_flags
from dataset import center_crop, read_image
from embedding import file_embeddings, open_model, project, text_features, token_ids
from explain import occlusion_map
from export import export_onnx
from gallery import find_pictures, open_gallery
from index import nearest
from plots import draw_grid, overlay
from storage import UserError, cached_tensor, key_of, key_of_model, run_command, write_json
from utils.cache import note_use

GRID_PIXELS = 320  # shorter side of the pictures in a grid
LONGEST_QUERY = 1000  # characters; what people type is shorter, and towers read a few dozen words
SHOWN_CAPTIONS = 5


# ---- queries to embeddings to matches ----------------------------------------------------------------------------


@torch.no_grad()
def embed_texts(model, texts):
    """m texts -> (m, d_e) embeddings of length 1, in fp32. Raises UserError for one that is empty or too long."""
    for text in texts:
        if not text.strip():
            raise UserError('the query is empty; say what the picture should show, as in python inference.py "a dog"')
        if len(text) > LONGEST_QUERY:
            raise UserError(f"the query has {len(text):,} characters ({text[:20]!r}...); {LONGEST_QUERY:,} are the most")
    device = model.logit_scale.device
    T_f = text_features(model, token_ids(model.tokenizer, texts), device, torch.float32)
    return project(model.text_projection, T_f, device)


def embed_query(model, texts, minus=(), weights=()):
    """The embedding, (d_e,) of length 1, of texts that a picture should match, less those of `minus`.

    weights: one a text, then one for each of minus; empty: 1 each.
    Raises UserError for another number of weights, and where the texts cancel out.
    """
    weights = list(weights) or [1.0] * (len(texts) + len(minus))
    if len(weights) != len(texts) + len(minus):
        raise UserError(f"--weights: {len(weights)} numbers for {len(texts)} texts and {len(minus)} to be without")
    signs = torch.tensor([*weights[: len(texts)], *(-weight for weight in weights[len(texts) :])])
    total = signs @ embed_texts(model, [*texts, *minus])
    if total.norm() < 1e-6:
        raise UserError("the texts of the query cancel out; change --minus or --weights")
    return F.normalize(total, dim=0)


def best_matches(gallery, embedding, image_filenames, n):
    """The n pictures nearest to an embedding, (d_e,), as [(filename, cosine)], best first. gallery: as `index.nearest`."""
    scores, order = nearest(gallery, embedding, n)
    return [(image_filenames[i], score) for i, score in zip(order.tolist(), scores.tolist())]


def find_matches(model, image_embeddings, query, image_filenames, n=9, output=None, show=False):
    """The n pictures that match a text best, as [(filename, score)], best first.

    image_embeddings: (N, d_e), each of length 1, or their `index.Graph`. image_filenames: N paths. Scores are cosines, -1
    to 1; where n is larger than N there are N matches. output: a PNG to draw the matches into; show opens a window on it.
    Raises UserError for an empty query.
    """
    matches = best_matches(image_embeddings, embed_texts(model, [query])[0], image_filenames, n)
    if output:
        draw_found(query, matches, output, show)
    return matches


def draw_found(title, matches, output, show, explain=None):
    """The grid of matches. explain: maps a picture's path to the picture to show instead."""
    titles = [f"{score:.3f}  {Path(name).name}" for name, score in matches]
    shown = explain or partial(read_image, size=GRID_PIXELS)
    draw_grid(title, [shown(name) for name, _ in matches], titles, output, show)


# ---- what is searched --------------------------------------------------------------------------------------------


def newest_run():
    """The run folder under runs/ whose weights are the newest. Raises UserError where there is none."""
    weights = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UserError("runs/ holds no trained run; train one with python main.py, or name one with --run")
    return str(weights[-1].parent)


def read_data(run):
    """(table, image_dir) of the data set that a run was trained on. Raises UserError where it is not there any more."""
    config = load_run(run)["config"]
    table, image_dir, _ = load_captions(config.data_dir, config.image_path, config.captions_path, config.skip_bad)
    return table, image_dir


def files_to_search(run, images):
    """{path: (bytes, time of change)} of the pictures under a folder, or of the run's own validation pictures."""
    if images:
        return find_pictures(images)
    table, image_dir = read_data(run)
    paths = [os.path.abspath(image_dir / name) for name in table["image"][table["split"] == "val"].unique()]
    return {path: (stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]}


def embed_captions(model, run, cache_dir, device, dtype):
    """(captions, embeddings) of a run's data set: m strings, each once, and (m, d_e) of length 1, kept on disk.

    Where the data set is gone there are none, and a line says so.
    """
    width = model.text_projection.projection.out_features
    try:
        captions = list(read_data(run)[0]["caption"].unique())
    except UserError as error:
        print(f"no captions for pictures: {error}")
        return [], torch.empty(0, width)
    path = Path(cache_dir) / f"captions-{key_of(key_of_model(model), dtype, captions)}.npy"
    note_use(run, path)

    def compute():
        T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
        return [project(model.text_projection, T_f, device)]

    return captions, cached_tensor(path, (len(captions), width), torch.float32, compute)


def embed_file(model, path, device, dtype):
    """The embedding of one picture file, (d_e,) of length 1. Raises UserError where it cannot be read."""
    if not Path(path).is_file():
        raise UserError(f"--image {path}: no such file")
    [(_, embedding)] = file_embeddings(model, [path], device, dtype)
    if embedding is None:
        raise UserError(f"--image {path}: empty, truncated, too large or not a picture")
    return embedding


def classify_embedding(model, embedding, names):
    """The probability of each of c names for a picture's embedding, (d_e,), as [(name, probability)], likeliest first."""
    logits = model.logit_scale.exp().cpu() * embed_texts(model, names) @ embedding  # (c,)
    order = logits.argsort(descending=True).tolist()
    probabilities = logits.softmax(dim=0).tolist()
    return [(names[i], probabilities[i]) for i in order]


# ---- the command -------------------------------------------------------------------------------------------------


def search(
    query: tyro.conf.Positional[tuple[str, ...]] = (),
    minus: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
    query_file: str = "",
    image: str = "",
    classify: tuple[str, ...] = (),
    run: str = "",
    images: str = "",
    n: int = 9,
    exact: bool = False,
    explain: bool = False,
    export: Literal["", "onnx"] = "",
    output: str = "matches.png",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
    cache_dir: str = ".cache",
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
):
    """Finds the pictures that match texts best, or what matches a picture, prints it, and draws it.

    Args:
        query: what the pictures should show; several texts are added up
        minus: what they should not show
        weights: how much each text counts, and then each of minus; empty: all the same
        query_file: file with a query in each line, answered one by one
        image: picture to find captions and look-alikes of, or to classify
        classify: names between which the picture of --image is decided
        run: run folder; empty: the newest under runs/
        images: folder to search, with its subfolders; empty: the run's own validation pictures
        n: pictures to find
        exact: compare with each picture, also where there are more than 100,000
        explain: draw over each picture which parts of it answer the words
        export: write the run's towers in this format instead of searching
        output: PNG of the matches
        json_path: file for the matches
        cache_dir: folder where embeddings are kept for the next query
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 where native, else fp32
    """
    if n < 1:
        raise UserError(f"--n {n}: must be 1 or more")
    if export:
        run = run or newest_run()
        paths = export_onnx(open_model(run, "cpu", "fp32")[0], run)
        print(f"written {' and '.join(map(str, paths))}")
        return
    if bool(query) + bool(query_file) + bool(image) != 1:
        raise UserError('say what to look for: a text, as in python inference.py "a dog", --query-file FILE or --image FILE')
    if (minus or weights or explain) and not query:
        raise UserError("--minus, --weights and --explain: go with a text to look for")
    if classify and not image:
        raise UserError("--classify: needs the picture, --image FILE")
    run = run or newest_run()
    model, device, dtype = open_model(run, device, precision)
    if classify:
        found = classify_embedding(model, embed_file(model, image, device, dtype), list(classify))
        for name, probability in found:
            print(f"{100 * probability:6.1f}%  {name}")
        if json_path:
            write_json(json_path, {"image": image, "classes": [{"name": a, "probability": b} for a, b in found]})
        return
    queries = read_queries(query_file) if query_file else []
    embedding = embed_query(model, query, minus, weights) if query else None
    embedding = embed_file(model, image, device, dtype) if image else embedding
    files = files_to_search(run, images)
    gallery = open_gallery(model, files, images or None, cache_dir, device, dtype, num_workers, exact)
    look_up = partial(best_matches, gallery.searched, image_filenames=gallery.paths, n=n)
    if query_file:
        found = {line: look_up(embedding) for line, embedding in zip(queries, embed_texts(model, queries))}
        for line, matches in found.items():
            print(f"{line!r}:")
            print_matches(matches)
        answer = {"queries": [{"query": line, "matches": as_records(matches)} for line, matches in found.items()]}
    else:
        title = describe(query, minus) if query else f"like {Path(image).name}"
        answer = {"query": title} if query else {"image": image}
        print(f"{title!r} among {len(gallery.paths):,} pictures, with {run}:")
        matches = look_up(embedding)
        print_matches(matches)
        if image:
            captions, embeddings = embed_captions(model, run, cache_dir, device, dtype)
            captioned = best_matches(embeddings, embedding, captions, SHOWN_CAPTIONS)
            print(f"its best captions among {len(captions):,}:")
            print_matches(captioned)
            answer["captions"] = [{"caption": caption, "score": score} for caption, score in captioned]
        answer["matches"] = as_records(matches)
        draw_found(title, matches, output, True, partial(explained, model, embedding, device, dtype) if explain else None)
        print(f"drawn in {output}")
    if json_path:
        write_json(json_path, answer)


def read_queries(path):
    """The lines of a file that are not blank. Raises UserError where there is none."""
    queries = [line.strip() for line in read_text(path, "--query-file").splitlines() if line.strip()]
    if not queries:
        raise UserError(f"--query-file {path}: empty; write a query in each line")
    return queries


def describe(query, minus):
    return " + ".join(query) + "".join(f" - {text}" for text in minus)


def explained(model, embedding, device, dtype, path):
    """The middle square of a picture file under the heat map of what answers a query's embedding, (d_e,)."""
    size = model.image_encoder.size
    heat = occlusion_map(model, center_crop(read_image(path, size), size), embedding, device, dtype)
    return overlay(center_crop(read_image(path, GRID_PIXELS), GRID_PIXELS), heat)


def print_matches(matches):
    for name, score in matches:
        print(f"{score:7.3f}  {name}")


def as_records(matches):
    return [{"filename": name, "score": score} for name, score in matches]


if __name__ == "__main__":
    run_command(lambda: parse_flags(search, "inference.py", None, sys.argv[1:]))
