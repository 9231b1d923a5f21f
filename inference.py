"""Searches pictures: python inference.py "a dog runs on the beach" [--run RUN] [--images FOLDER], and the other way round."""

import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from config import is_model_name, run_cli, run_names
from search.files import find_pictures
from search.gallery import Filters, open_gallery
from search.queries import (
    Query,
    best_captions,
    best_matches,
    blend,
    classify_embedding,
    embed_texts,
    judge,
    newest_run,
    read_queries,
)
from search.relevance import WRONG_SHARE
from search.searcher import Searcher
from utils.errors import UserError, lost_process, run_command
from utils.files import write_json
from utils.images import Views, read_image

EXAMPLES = (
    'python inference.py "a dog runs on the beach" --images ~/Pictures',
    'python inference.py "a dog" --images ~/Pictures --after 2021-06 --folder "Italy/*"',
    'python inference.py --image photo.jpg --classify "a dog" "a cat"',
    "python inference.py --duplicates --images ~/Pictures",
)
GRID_PIXELS = 320  # shorter side of the pictures in a grid


@dataclass
class Search:
    """Finds the pictures that match a text or a picture best, prints them, and draws them in a grid."""

    # What to look for
    query: tyro.conf.Positional[tuple[str, ...]] = ()  # what the pictures should show; several texts are added
    minus: tuple[str, ...] = ()  # what they should not show
    weights: tuple[float, ...] = ()  # how much each text counts, and then each of minus; empty: all the same
    similar_to: str = ""  # picture that they should be like, alone or besides the query
    query_file: str = ""  # file with a query in each line, each answered by itself
    image: str = ""  # picture to find captions and look-alikes of, or to classify
    classify: tuple[str, ...] = ()  # class names to choose from for the picture of --image
    # Where to look
    run: str = ""  # run folder, or name of a pretrained model; several, with commas: an ensemble; empty: the newest in runs/
    views: Views = 1  # crops of each picture to embed and average: better matches, for as many times the time
    images: str = ""  # folder to search, with its subfolders, or 'DIR/*.tar'; empty: the run's own validation pictures
    after: str = ""  # only pictures taken since then, as 2021, 2021-06 or 2021-06-30 (EXIF date, else the file's)
    before: str = ""  # only pictures taken before that
    folder: str = ""  # only pictures whose path below --images matches this; 'Italy/*': all in Italy
    exact: bool = False  # compare with every picture, even if there are more than 100,000
    # What to show
    n: int = 9  # pictures to find
    more: int = 0  # 1: the next n pictures, 2: those after them, and so on
    floor: float = WRONG_SHARE  # share of wrong pictures that may pass: smaller is stricter; 0 shows everything
    explain: bool = False  # draw a heat map over each picture: which parts match the text
    output: str = "matches.png"  # PNG of the matches or duplicates
    json: str = ""  # file for the results
    # Instead of a search
    duplicates: bool = False  # find files that are the same photograph
    map: str = ""  # write a map of all pictures into this HTML file, and a PNG beside it
    embed_only: bool = False  # only embed the pictures, for later searches; with torchrun in several processes
    export: Literal["", "onnx"] = ""  # write the run's encoders in this format, into RUN/onnx
    # Machine
    cache_dir: str = ".cache"  # folder where embeddings are kept for the next query
    num_workers: int = 4  # threads that decode pictures
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # of matrix products; auto: bf16 or fp16 where native


def find_matches(model, image_embeddings, query, image_filenames, n=9, output="", show=False):
    """The n pictures that match a query best, as [(filename, score)], best first.

    image_embeddings: (N, d_e), L2-normalised, (N, d_e + 1) as `search.queries` has them, or a `search.gallery.Gallery`.
    query: a text, or a `search.queries.Query`.
    image_filenames: N paths. Scores are cosines, minus the hubness of vectors that have it. There are N matches if n is larger.
    output: a PNG to draw the matches into; show opens a window with it.
    Raises UserError for an empty query.
    """
    query = Query((query,)) if isinstance(query, str) else query
    matches = best_matches(image_embeddings, query.embed(model), image_filenames, n)
    if output:
        draw_matches(str(query), judge(matches, None, None), output, show)
    return matches


def draw_matches(title, matches, output, show, read_picture=None):
    """The grid of a list of `Match`. read_picture: maps a path to the picture to draw, in the place of the file's own."""
    from utils.plots import draw_grid  # only here: matplotlib takes most of a second

    titles = [f"{match.label().strip()}  {Path(match.filename).name}" for match in matches]
    read_picture = read_picture or partial(read_image, size=GRID_PIXELS)
    draw_grid(title, [read_picture(match.filename) for match in matches], titles, output, show)


def search(options):
    """What `python inference.py` does. options: a `Search`."""
    refuse_unclear(options)
    if options.duplicates:
        return list_duplicates(options)
    run = options.run or newest_run()
    if options.export:
        return write_onnx(run)
    searcher = Searcher(run, options.device, options.precision, options.cache_dir, options.views)
    if options.embed_only:
        return embed_pictures(searcher, options)
    if options.map:
        return write_map(searcher, options)
    if options.classify:
        answer = answer_classes(searcher, options)
    elif options.query_file:
        answer = answer_lines(searcher, options)
    elif options.image:
        answer = answer_picture(searcher, options)
    else:
        answer = answer_text(searcher, options)
    if options.json:
        write_json(options.json, answer)
    searcher.save_text_encoder()


def refuse_unclear(options):
    """Raises UserError unless there is one thing to do, and flags that go with it."""
    if options.n < 1 or options.more < 0:
        raise UserError(f"--n {options.n}, --more {options.more}: must be at least 1 and at least 0")
    if not 0 <= options.floor < 1:
        raise UserError(f"--floor {options.floor}: is a share of wrong pictures, from 0 (show everything) to below 1")
    num_queries = bool(options.query or options.similar_to) + bool(options.query_file) + bool(options.image)
    num_tasks = options.duplicates + bool(options.map) + options.embed_only + bool(options.export)
    if num_tasks and num_queries or num_tasks > 1:
        raise UserError("--duplicates, --map, --embed-only, --export: look for nothing, and go alone; leave the query out")
    if not num_tasks and num_queries != 1:
        raise UserError('say what to look for: a text, as in python inference.py "a dog", --query-file FILE or --image FILE')
    if len(options.query) > 1 and not options.weights and not any(" " in text.strip() for text in options.query):
        joined = " ".join(options.query)
        raise UserError(
            f'several words without quotes; one query: python inference.py "{joined}"; to add texts, give them --weights, too'
        )
    if (options.minus or options.weights or options.explain) and not options.query:
        raise UserError("--minus, --weights and --explain: go with a text to look for")
    if options.classify and not options.image:
        raise UserError("--classify: needs the picture, --image FILE")
    if options.duplicates and not options.images:
        raise UserError("--duplicates: name the folder to look through with --images")
    if options.duplicates and (options.after or options.before or options.folder):
        raise UserError("--duplicates: looks through all of --images; leave --after, --before and --folder out")
    if options.export and (options.views > 1 or len(run_names(options.run)) > 1):
        raise UserError("--export: writes one run, which embeds one view; leave --views and further runs out")
    if options.map and not options.map.lower().endswith((".html", ".htm")):
        raise UserError(f"--map {options.map}: must end in .html")


def find_gallery(searcher, options):
    """The gallery to search; how many pictures it has is printed."""
    if options.images:
        files, folder = find_pictures(options.images), "" if options.images.endswith(".tar") else options.images
    else:
        from search.run_data import validation_files  # only here: pandas takes half a second

        files, folder = validation_files(searcher.run), ""
    gallery = open_gallery(searcher, files, folder, options.num_workers, options.exact)
    selected = gallery.select(Filters(options.after, options.before, options.folder))
    of = "" if selected is gallery else f" of {len(gallery.paths):,}"
    print(f"{len(selected.paths):,}{of} pictures, {searcher.run}")
    return selected


def embed_pictures(searcher, options):
    """Embeds the pictures that a later search then has. Under torchrun each process embeds a share of them."""
    from training import distributed  # only here: this import takes seconds

    started = time.perf_counter()
    searcher.device = distributed.init_distributed(searcher.device)
    try:
        find_gallery(searcher, replace(options, exact=True))  # no index is built
    except RuntimeError as error:
        raise lost_process(error) from None
    print(f"embedded after {time.perf_counter() - started:.1f} s")
    distributed.destroy_distributed()


def answer_text(searcher, options):
    """Prints and draws the pictures that match texts, and are like a picture. Returns {"query", "matches"}."""
    query, parts = Query(options.query, options.minus, options.weights), []
    if options.query:  # embedded before the gallery, as new pictures can take long and a mistake is then seen at once
        parts.append(query.embed(searcher))
    if options.similar_to:
        parts.append(searcher.embed_file(options.similar_to))
    gallery = find_gallery(searcher, options)
    embedding = blend(gallery, parts)
    title = str(query) + f" like {Path(options.similar_to).name}" * bool(options.similar_to)
    found = best_matches(gallery, embedding, gallery.paths, options.n, options.more * options.n)
    # What a match is was learned from texts.
    matches = judge(found, embedding, None if options.similar_to else searcher.relevance, options.floor)
    answer = show_matches(title, matches, options.more)
    shown = [match for match in matches if match.relevant] or ([] if options.more else matches[:1])
    explain = None
    if options.explain:
        from search.occlusion import heat_map

        explain = partial(heat_map, searcher, parts[0], pixels=GRID_PIXELS)  # of the texts
    if shown:
        draw_matches(title, shown, options.output, show=True, read_picture=explain)
        print(f"drawn in {options.output}")
    return answer


def show_matches(title, matches, more):
    """Prints the matches that are above the floor or, where none is, the best guess. Returns {"query", "matches"}.

    matches: a list of `Match`, best first. more: as for `Search`.
    """
    relevant = [match for match in matches if match.relevant]
    answer = {"query": title, "matches": [match.record() for match in relevant]}
    if matches and not relevant and not more:
        print(f"{title!r}: nothing here matches (best guess below)")
        print_matches(matches[:1])
        print("--floor 0 shows all")
        return answer | {"best_guess": matches[0].record()}
    print(f"{title!r}:" if relevant else f"{title!r}: no more pictures match")
    print_matches(relevant)
    if relevant and len(relevant) < len(matches):
        print(f"{len(relevant)} of the best {len(matches)} are above the relevance floor; --floor 0 shows all")
    return answer


def answer_lines(searcher, options):
    """Prints the pictures that match each line of a file. Returns {"queries": [{"query", "matches"}]}."""
    lines = read_queries(options.query_file)
    embeddings = embed_texts(searcher, lines)
    gallery, answers = find_gallery(searcher, options), []
    for line, embedding in zip(lines, embeddings):
        found = best_matches(gallery, embedding, gallery.paths, options.n, options.more * options.n)
        answers.append(show_matches(line, judge(found, embedding, searcher.relevance, options.floor), options.more))
    return {"queries": answers}


def answer_picture(searcher, options):
    """Prints and draws the pictures most like one, and prints its best captions.

    Returns {"image", "captions": [{"caption", "score"}], "matches"}.
    """
    from search.run_data import embed_captions

    embedding, name = searcher.embed_file(options.image), Path(options.image).name
    gallery = find_gallery(searcher, options)
    matches = judge(best_matches(gallery, embedding, gallery.paths, options.n, options.more * options.n), embedding, None)
    print(f"like {name}:")
    print_matches(matches)
    texts, embeddings = embed_captions(searcher)
    captions = best_captions(texts, embeddings, embedding)
    print(f"its best captions among {len(texts):,}:")
    for caption, score in captions:
        print(f"{score:7.3f}  {caption}")
    draw_matches(f"like {name}", matches, options.output, show=True)
    print(f"drawn in {options.output}")
    captioned = [{"caption": caption, "score": score} for caption, score in captions]
    return {"image": options.image, "captions": captioned, "matches": [match.record() for match in matches]}


def answer_classes(searcher, options):
    """Prints the probability of each class for a picture. Returns {"image", "classes": [{"name", "probability"}]}."""
    embedding = searcher.embed_file(options.image)
    classes = classify_embedding(searcher.model, embedding, list(options.classify))
    for name, probability in classes:
        print(f"{100 * probability:6.1f}%  {name}")
    return {"image": options.image, "classes": [{"name": name, "probability": probability} for name, probability in classes]}


def list_duplicates(options):
    """Prints and draws the groups of files in a folder that are the same photograph. Nothing is deleted."""
    from search.duplicates import as_records, draw_duplicates, find_duplicates

    files = list(find_pictures(options.images))
    groups = find_duplicates(files, options.cache_dir, options.num_workers)
    copies = sum(len(group) - 1 for group in groups)
    print(f"{len(files):,} pictures: {copies:,} are copies of {len(groups):,} others")
    for group in groups:
        print("\n".join(f"{picture.path}  ({picture.label()})" for picture in group), end="\n\n")
    if groups:
        draw_duplicates(groups, options.output)
        print(f"drawn in {options.output}")
    if options.json:
        write_json(options.json, {"groups": as_records(groups)})


def write_map(searcher, options):
    """Writes a map of all pictures as a page, and draws it."""
    from search.map import make_map
    from search.run_data import embed_captions

    gallery = find_gallery(searcher, options)
    captions, caption_embeddings = embed_captions(searcher)
    make_map(gallery.embeddings(), list(gallery.paths), captions, caption_embeddings[:, :-1], options.map, options.num_workers)
    print(f"written {options.map} and {Path(options.map).with_suffix('.png')}")


def write_onnx(run):
    from embedding import open_model
    from search.export import export_onnx

    paths = export_onnx(open_model(run, "cpu", "fp32")[0], Path() if is_model_name(run) else Path(run))
    print(f"written {' and '.join(map(str, paths))}")


def print_matches(matches):
    for match in matches:
        print(f"{match.label()}  {match.filename}")


def main(arguments):
    search(run_cli(Search, "inference.py", arguments, EXAMPLES))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
