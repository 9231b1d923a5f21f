"""Searches pictures: python inference.py "a dog runs on the beach" [--run RUN] [--images FOLDER], and the other way round."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import is_model_name, run_cli
from embedding import open_model
from search.export import export_onnx
from search.gallery import open_gallery
from search.occlusion import occlusion_map
from search.queries import (
    NUM_CAPTIONS,
    Query,
    best_matches,
    classify_embedding,
    embed_captions,
    embed_file,
    embed_texts,
    files_to_search,
    newest_run,
    read_queries,
)
from training import distributed
from utils.errors import UserError, lost_process, run_command
from utils.files import write_json
from utils.images import center_crop, read_image
from utils.plots import draw_grid, overlay

EXAMPLES = (
    'python inference.py "a dog runs on the beach" --images ~/Pictures',
    'python inference.py --image photo.jpg --classify "a dog" "a cat"',
)
GRID_PIXELS = 320  # shorter side of the pictures in a grid


def find_matches(model, image_embeddings, query, image_filenames, n=9, output="", show=False):
    """The n pictures that match a query best, as [(filename, score)], best first.

    image_embeddings: (N, d_e), L2-normalised, or a `search.gallery.Gallery`. query: a text, or a `search.queries.Query`.
    image_filenames: N paths. Scores are cosines, -1 to 1; where n is larger than N there are N matches.
    output: a PNG to draw the matches into; show opens a window with it.
    Raises UserError for an empty query.
    """
    query = Query((query,)) if isinstance(query, str) else query
    matches = best_matches(image_embeddings, query.embed(model), image_filenames, n)
    if output:
        draw_matches(str(query), matches, output, show)
    return matches


def draw_matches(title, matches, output, show, read_picture=None):
    """The grid of matches. read_picture: maps a path to the picture to draw, in the place of the file's own."""
    titles = [f"{score:.3f}  {Path(name).name}" for name, score in matches]
    read_picture = read_picture or partial(read_image, size=GRID_PIXELS)
    draw_grid(title, [read_picture(name) for name, _ in matches], titles, output, show)


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
    embed_only: bool = False,
    explain: bool = False,
    export: Literal["", "onnx"] = "",
    output: str = "matches.png",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
    cache_dir: str = ".cache",
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
):
    """Finds the pictures that match a text or a picture best, prints them, and draws them in a grid.

    Args:
        query: what the pictures should show; several texts are added
        minus: what they should not show
        weights: how much each text counts, and then each of minus; empty: all the same
        query_file: file with a query in each line, each answered by itself
        image: picture to find captions and look-alikes of, or to classify
        classify: class names to choose from for the picture of --image
        run: run folder; empty: the newest under runs/
        images: folder to search, with its subfolders, or 'DIR/*.tar'; empty: the run's own validation pictures
        n: pictures to find
        exact: compare with every picture, even if there are more than 100,000
        embed_only: only embed the pictures, for later searches; with torchrun in several processes
        explain: draw a heat map over each picture: which parts match the text
        export: write the run's encoders in this format instead of searching
        output: PNG of the matches
        json_path: file for the matches
        cache_dir: folder where embeddings are kept for the next query
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 or fp16 where native, else fp32
    """
    if export:
        return write_onnx(run or newest_run())
    if embed_only:
        return embed_pictures(run, images, query or query_file or image, cache_dir, num_workers, device, precision)
    refuse_unclear(query, minus, weights, query_file, image, classify, explain, n)
    run = run or newest_run()
    model, device, dtype = open_model(run, device, precision)
    if classify:
        return write_answer(json_path, answer_classes(model, image, classify, device, dtype))
    if query:  # embedded before the gallery, as new pictures can take long and a mistake is then seen at once
        answer = ask_text(model, Query(query, minus, weights), explain, n, output, device, dtype)
    elif image:
        answer = ask_picture(model, run, image, n, output, cache_dir, device, dtype)
    else:
        answer = ask_lines(model, query_file, n)
    write_answer(json_path, answer(find_gallery(model, run, images, cache_dir, device, dtype, num_workers, exact)))


def find_gallery(model, run, images, cache_dir, device, dtype, num_workers, exact):
    """The gallery to search; how many pictures it has is printed. Parameters: those of `search` and `open_gallery`."""
    gallery = open_gallery(model, *files_to_search(run, images), cache_dir, device, dtype, num_workers, exact)
    print(f"{len(gallery.paths):,} pictures, {run}")
    return gallery


def refuse_unclear(query, minus, weights, query_file, image, classify, explain, n):
    """Raises UserError unless there is one thing to look for, and flags that go with it. Parameters: those of `search`."""
    if n < 1:
        raise UserError(f"--n {n}: must be 1 or more")
    if bool(query) + bool(query_file) + bool(image) != 1:
        raise UserError('say what to look for: a text, as in python inference.py "a dog", --query-file FILE or --image FILE')
    if len(query) > 1 and not weights and not any(" " in text.strip() for text in query):
        words = " ".join(query)
        raise UserError(
            f'several words without quotes; one query: python inference.py "{words}"; to add texts up, give them --weights, too'
        )
    if (minus or weights or explain) and not query:
        raise UserError("--minus, --weights and --explain: go with a text to look for")
    if classify and not image:
        raise UserError("--classify: needs the picture, --image FILE")


def embed_pictures(run, images, query, cache_dir, num_workers, device, precision):
    """Embeds the pictures that a later search then has. Under torchrun each process embeds a share of them.

    Raises UserError where there is a query, too.
    """
    if query:
        raise UserError("--embed-only: looks for nothing; leave the query out")
    run = run or newest_run()
    started = time.perf_counter()
    device = distributed.init_distributed(device)
    model, device, dtype = open_model(run, device, precision)
    try:
        find_gallery(model, run, images, cache_dir, device, dtype, num_workers, exact=True)
    except RuntimeError as error:
        raise lost_process(error) from None
    print(f"embedded after {time.perf_counter() - started:.1f} s")
    distributed.destroy_distributed()


def ask_text(model, query, explain, n, output, device, dtype):
    """Embeds a `Query`. Returns the function of a gallery that answers it."""
    embedding = query.embed(model)
    read_picture = partial(heat_map, model, embedding, device, dtype) if explain else None
    return lambda gallery: answer_text(model, gallery, query, n, output, read_picture)


def ask_picture(model, run, image, n, output, cache_dir, device, dtype):
    """Embeds a picture. Returns the function of a gallery that finds pictures like it, and captions for it."""
    embedding = embed_file(model, image, device, dtype)

    def answer(gallery):
        captions = embed_captions(model, run, cache_dir, device, dtype)
        return answer_picture(gallery, captions, image, embedding, n, output)

    return answer


def ask_lines(model, query_file, n):
    """Embeds each line of a file. Returns the function of a gallery that answers all of them."""
    lines = read_queries(query_file)
    embeddings = embed_texts(model, lines)
    return lambda gallery: answer_lines(gallery, lines, embeddings, n)


def answer_text(model, gallery, query, n, output, read_picture):
    """Prints and draws the pictures that match a `Query`. Returns {"query", "matches"}."""
    matches = find_matches(model, gallery, query, gallery.paths, n)
    print(f"{str(query)!r}:")
    print_matches(matches)
    draw_matches(str(query), matches, output, show=True, read_picture=read_picture)
    print(f"drawn in {output}")
    return {"query": str(query), "matches": as_records(matches)}


def answer_lines(gallery, lines, embeddings, n):
    """Prints the pictures that match each of m lines, (m, d_e) when embedded. Returns {"queries": [{"query", "matches"}]}."""
    answers = []
    for line, embedding in zip(lines, embeddings):
        matches = best_matches(gallery, embedding, gallery.paths, n)
        print(f"{line!r}:")
        print_matches(matches)
        answers.append({"query": line, "matches": as_records(matches)})
    return {"queries": answers}


def answer_picture(gallery, captions, image, embedding, n, output):
    """Prints and draws the pictures most like one, and prints its best captions. captions: of `embed_captions`.

    Returns {"image", "captions": [{"caption", "score"}], "matches"}.
    """
    matches = best_matches(gallery, embedding, gallery.paths, n)
    print(f"like {Path(image).name}:")
    print_matches(matches)
    texts, embeddings = captions
    captioned = best_matches(embeddings, embedding, texts, NUM_CAPTIONS)
    print(f"its best captions among {len(texts):,}:")
    print_matches(captioned)
    draw_matches(f"like {Path(image).name}", matches, output, show=True)
    print(f"drawn in {output}")
    captioned = [{"caption": caption, "score": score} for caption, score in captioned]
    return {"image": image, "captions": captioned, "matches": as_records(matches)}


def answer_classes(model, image, names, device, dtype):
    """Prints the probability of each class for a picture. Returns {"image", "classes": [{"name", "probability"}]}."""
    classes = classify_embedding(model, embed_file(model, image, device, dtype), list(names))
    for name, probability in classes:
        print(f"{100 * probability:6.1f}%  {name}")
    return {"image": image, "classes": [{"name": name, "probability": probability} for name, probability in classes]}


def write_onnx(run):
    paths = export_onnx(open_model(run, "cpu", "fp32")[0], Path() if is_model_name(run) else Path(run))
    print(f"written {' and '.join(map(str, paths))}")


def write_answer(json_path, answer):
    if json_path:
        write_json(json_path, answer)


def heat_map(model, embedding, device, dtype, path):
    """The centre crop of a picture, with a heat map over it of what matches a query's embedding, (d_e,)."""
    size = model.image_encoder.size
    picture = center_crop(read_image(path, size, model.image_encoder.resize), size)
    heat = occlusion_map(model, picture, embedding, device, dtype)
    return overlay(center_crop(read_image(path, GRID_PIXELS), GRID_PIXELS), heat)


def print_matches(matches):
    for name, score in matches:
        print(f"{score:7.3f}  {name}")


def as_records(matches):
    return [{"filename": name, "score": score} for name, score in matches]


if __name__ == "__main__":
    run_command(lambda: run_cli(search, "inference.py", sys.argv[1:], EXAMPLES))
