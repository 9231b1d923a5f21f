"""Searches pictures: python inference.py "a dog runs on the beach" [--run RUN] [--images FOLDER], and the other way round."""

import sys

from search.options import read_search
from utils.errors import run_command

if __name__ == "__main__":  # first, as what is imported below takes a while to load
    OPTIONS = run_command(read_search, sys.argv[1:])

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from config import is_model_name
from search.files import find_pictures
from search.gallery import Filters, open_gallery
from search.queries import (
    Query,
    as_vectors,
    best_captions,
    best_matches,
    blend,
    classify_embedding,
    embed_texts,
    judge,
    read_queries,
)
from search.searcher import Searcher
from search.show import GRID_PIXELS, deliver, draw_matches, print_matches, show_matches
from utils.errors import UserError, lost_process
from utils.folders import printable


def find_matches(model, image_embeddings, query, image_filenames, n=9, output="", show=False):
    """The n pictures that match a query best, as [(filename, score)], best first.

    image_embeddings: (N, d_e), an array or a tensor, (N, d_e + 1) as `search.queries` has them, or a `search.gallery.Gallery`.
    query: a text, or a `search.queries.Query`.
    image_filenames: N paths. Scores are cosines, minus the hubness of vectors that have it. There are N matches if n is larger.
    output: a PNG to draw the matches into; show opens a window with it.
    Raises UserError for an empty query, for n below 1, and where embeddings and paths do not fit together.
    """
    if n < 1:
        raise UserError(f"find_matches: n={n}; must be at least 1")
    query = Query((query,)) if isinstance(query, str) else query
    embedding = query.embed(model)
    if not hasattr(image_embeddings, "top_k"):
        image_embeddings = as_vectors(image_embeddings, image_filenames, len(embedding))
    matches = best_matches(image_embeddings, embedding, image_filenames, n)
    if output and matches:
        draw_matches(str(query), judge(matches), output, show)
    return matches


def search(options):
    """What `python inference.py` does. options: a `search.options.Search`."""
    if options.duplicates:
        return list_duplicates(options)
    if options.export:
        return write_onnx(options.run)
    searcher = Searcher(options.run, options.device, options.precision, options.cache_dir, options.views)
    if options.embed_only:
        return embed_pictures(searcher, options)
    if options.map:
        return write_map(searcher, options)
    if options.classify:
        answer, draw = answer_classes(searcher, options)
    elif options.query_file:
        answer, draw = answer_lines(searcher, options)
    elif options.image:
        answer, draw = answer_picture(searcher, options)
    else:
        answer, draw = answer_text(searcher, options)
    deliver(options, answer, draw)
    searcher.save_text_encoder()


def find_gallery(searcher, options):
    """The gallery to search; how many pictures it has is printed."""
    if options.images:
        files, folder = (
            find_pictures(options.images, options.verbose),
            "" if options.images.endswith(".tar") else options.images,
        )
    else:
        from search.run_data import validation_files  # only here: pandas takes half a second

        files, folder = validation_files(searcher.run), ""
    gallery = open_gallery(searcher, files, folder, options.num_workers, options.exact, options.verbose)
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
    """Prints the pictures that match texts, and are like a picture: ({"query", "matches"}, what `deliver` draws)."""
    query, parts = Query(options.query, options.minus, options.weights), []
    if options.query:  # embedded before the gallery, as new pictures can take long and a mistake is then seen at once
        parts.append(query.embed(searcher))
    if options.similar_to:
        parts.append(searcher.embed_file(options.similar_to))
    gallery = find_gallery(searcher, options)
    embedding = blend(gallery, parts)
    title = str(query) + f" like {Path(options.similar_to).name}" * bool(options.similar_to)
    found = best_matches(gallery, embedding, gallery.paths, options.n, options.more * options.n)
    text = "" if options.similar_to else query.text
    matches = judge(found, searcher, text, embedding, options.floor)
    if options.floor and matches and matches[0].probability is None:
        print("--floor: was learned from single texts with words, if at all; here none is left out")
    answer = show_matches(title, matches, options.more)
    shown = [match for match in matches if match.relevant] or ([] if options.more else matches[:1])
    if not shown:
        return answer, None
    explain = None
    if options.explain:
        from search.occlusion import heat_map

        explain = partial(heat_map, searcher, parts[0], pixels=GRID_PIXELS)  # of the texts
    heading = f"{title}: probably nothing here" if "probably_nothing" in answer else title
    return answer, partial(draw_matches, heading, shown, options.output, True, explain)


def answer_lines(searcher, options):
    """Prints the pictures that match each line of a file: ({"queries": [{"query", "matches"}]}, None)."""
    lines = read_queries(options.query_file)
    embeddings = embed_texts(searcher, lines)
    gallery, answers = find_gallery(searcher, options), []
    for line, embedding in zip(lines, embeddings):
        found = best_matches(gallery, embedding, gallery.paths, options.n, options.more * options.n)
        answers.append(show_matches(line, judge(found, searcher, line, embedding, options.floor), options.more))
    return {"queries": answers}, None


def answer_picture(searcher, options):
    """Prints the pictures most like one, and its best captions.

    Returns ({"image", "captions": [{"caption", "score"}], "matches"}, what `deliver` draws).
    """
    from search.run_data import embed_captions

    embedding, name = searcher.embed_file(options.image), Path(options.image).name
    gallery = find_gallery(searcher, options)
    matches = judge(best_matches(gallery, embedding, gallery.paths, options.n, options.more * options.n))
    print(f"like {printable(name)}:" if matches else f"like {printable(name)}: no more pictures")
    print_matches(matches)
    texts, embeddings = embed_captions(searcher)
    captions = best_captions(texts, embeddings, embedding)
    print(f"its best captions among {len(texts):,}:")
    for caption, score in captions:
        print(f"{score:7.3f}  {printable(caption)}")
    draw = partial(draw_matches, f"like {name}", matches, options.output, True) if matches else None
    captioned = [{"caption": caption, "score": score} for caption, score in captions]
    return {"image": options.image, "captions": captioned, "matches": [match.record() for match in matches]}, draw


def answer_classes(searcher, options):
    """Prints the probability of each class for a picture: ({"image", "classes": [{"name", "probability"}]}, None)."""
    embedding = searcher.embed_file(options.image)
    classes = classify_embedding(searcher.model, embedding, list(options.classify))
    for name, probability in classes:
        print(f"{min(100 * probability, 99.9):6.1f}%  {printable(name)}")  # never 100.0%
    found = [{"name": name, "probability": probability} for name, probability in classes]
    return {"image": options.image, "classes": found}, None


def list_duplicates(options):
    """Prints and draws the groups of files in a folder that are the same photograph. Nothing is deleted."""
    from search.duplicates import as_records, draw_duplicates, find_duplicates

    files = list(find_pictures(options.images, options.verbose))
    groups = find_duplicates(files, options.cache_dir, options.num_workers, options.verbose)
    copies = sum(len(group) - 1 for group in groups)
    print(f"{len(files):,} pictures: {copies:,} are copies of {len(groups):,} others")
    for group in groups:
        print("\n".join(f"{printable(picture.path)}  ({picture.label()})" for picture in group), end="\n\n")
    deliver(options, {"groups": as_records(groups)}, partial(draw_duplicates, groups, options.output) if groups else None)


def write_map(searcher, options):
    """Writes a map of all pictures as a page, and draws it."""
    from search.map import make_map, require_own_map
    from search.run_data import embed_captions

    require_own_map(Path(options.map))
    gallery = find_gallery(searcher, options)
    captions, caption_embeddings = embed_captions(searcher)
    make_map(gallery.embeddings(), list(gallery.paths), captions, caption_embeddings[:, :-1], options.map, options.num_workers)
    print(f"written {options.map} and {Path(options.map).with_suffix('.png')}")


def write_onnx(run):
    from embedding import open_model
    from search.export import export_onnx

    paths = export_onnx(open_model(run, "cpu", "fp32")[0], Path() if is_model_name(run) else Path(run))
    print(f"written {' and '.join(map(str, paths))}")


if __name__ == "__main__":
    run_command(search, OPTIONS)
