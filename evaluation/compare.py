"""Models side by side: what they recall, how fast they embed on this machine, and how large they are."""

import statistics
import time
from typing import Annotated, Literal

import tyro

from embedding import image_features, images_for, open_model, text_features, token_ids
from evaluation.retrieval import recall
from evaluation.splits import embed_rows, same_images, select_rows
from evaluation.zeroshot import find_pictures, top1_accuracy
from utils.errors import UserError
from utils.files import write_json
from utils.plots import draw_points

NUM_TIMED, ROUNDS = 128, 3  # pictures and captions that are embedded for the speeds, and how often
COLUMNS = {  # key of a row: (heading, digits)
    "images": ("images", 0),
    "rsum": ("rsum", 1),
    "image_to_text": ("R@1 image to text", 1),
    "text_to_image": ("R@1 text to image", 1),
    "top1": ("top-1", 1),
    "pictures_per_second": ("pictures/s", 0),
    "captions_per_second": ("captions/s", 0),
    "million_parameters": ("M parameters", 1),
    "width": ("width", 0),
    "pixels": ("pixels", 0),
}


def compare(
    run: tuple[str, ...],
    data_dir: str = "",
    image_path: str = "",
    captions_path: str = "",
    split: Literal["train", "val", "test", "all"] = "val",
    images: str = "",
    classes: str = "",
    template: tuple[str, ...] = ("a photo of a {}.",),
    skip_bad: bool = False,
    num_workers: int = 4,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    output: str = "compare.png",
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Compares models by recall, zero-shot accuracy, speed of embedding and size, and draws recall against speed.

    Args:
        run: run folders, open_clip:MODEL@WEIGHTS, or OpenAI's names
        data_dir: folder with Images/ and a captions file; empty: the data that each run was trained on
        image_path: folder of the images, if it is not in data_dir
        captions_path: captions file, if it is not in data_dir
        split: which images to score; all: every image of the data set
        images: folder with one subfolder of pictures per class, for zero-shot accuracy
        classes: file of all class names, one per line; empty: the names of the subfolders
        template: prompts with {} in place of the class name; the embeddings of several are averaged
        skip_bad: leave out unusable rows and pictures instead of stopping
        num_workers: threads that decode pictures
        device: auto, cpu, cuda, cuda:1, mps
        precision: of matrix products; auto: bf16 or fp16 where native, else fp32
        output: PNG file for recall against speed
        json_path: file for the figures
    """
    if len(set(run)) < 2:
        raise UserError("--run: name at least two models to compare")
    pictures = find_pictures(images, classes) if images else None
    # All rows are read first, so that a missing run or data set is seen before the first model is scored.
    chosen = {name: select_rows(name, (data_dir, image_path, captions_path), split, skip_bad) for name in dict.fromkeys(run)}
    chosen, results = same_images(chosen), {}
    for name, rows in chosen.items():
        opened = open_model(name, device, precision)
        similarity, image_of_text, captions, paths = embed_rows(opened, rows, skip_bad, num_workers)
        scores = recall(similarity, image_of_text)
        row = {"images": len(paths), "rsum": scores["rsum"]}
        row |= {direction: scores[direction]["R@1"] for direction in ("image_to_text", "text_to_image")}
        if pictures:
            row["top1"] = top1_accuracy(opened[0], pictures, template, *opened[1:], num_workers, skip_bad)
        results[name] = row | speeds(opened, paths, captions) | sizes(opened[0])
        print(f"{name}: rsum {row['rsum']:.1f}", flush=True)
    print("\n" + table(results))
    points = [[(row[key], 0.0) for row in results.values()] for key in ("pictures_per_second", "rsum")]
    draw_points(list(results), *points, "pictures embedded per second", f"rsum on {split}", output)
    print(f"drawn in {output}")
    if json_path:
        write_json(json_path, {"runs": results})


def speeds(opened, paths, captions):
    """Pictures, which are decoded already, and captions that the encoders embed per second: medians of ROUNDS."""
    model, device, dtype = opened
    pictures = [picture for picture, _ in images_for(model, paths[:NUM_TIMED], 0) if picture is not None]
    texts = token_ids(model.tokenizer, captions[:NUM_TIMED])
    calls = {
        "pictures_per_second": (len(pictures), lambda: image_features(model, pictures, device, dtype, len(pictures))),
        "captions_per_second": (len(texts), lambda: text_features(model, texts, device, dtype)),
    }
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (_, call) in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: count / statistics.median(seconds[name]) for name, (count, _) in calls.items()}


def sizes(model):
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    return {"million_parameters": millions, "width": model.image_projection.out_features, "pixels": model.image_encoder.size}


def table(results):
    """The figures of some models, {name: {figure: value}}, as an aligned table, best rsum first."""
    keys = [key for key in COLUMNS if key in next(iter(results.values()))]
    rows = [["", *(COLUMNS[key][0] for key in keys)]]
    for name, row in sorted(results.items(), key=lambda item: -item[1]["rsum"]):
        rows.append([name, *(f"{row[key]:,.{COLUMNS[key][1]}f}" for key in keys)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(r, widths))) for r in rows
    )
