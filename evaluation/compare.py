"""Models side by side: what they recall, how fast they embed on this machine, and how large they are."""

import statistics
import time

from embedding import image_features, images_for, open_model, text_features, token_ids
from evaluation.retrieval import number_captions, recall, right_pairs
from evaluation.splits import embed_rows, same_images, select_rows
from evaluation.zeroshot import find_pictures, top1_accuracy
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


def compare(options):
    """Compares models by recall, zero-shot accuracy, speed of embedding and size, and draws recall against speed."""
    pictures = find_pictures(options.images, options.classes) if options.images else None
    # All rows are read first, so that a missing run or data set is seen before the first model is scored.
    data_paths = options.data_dir, options.image_path, options.captions_path
    columns = options.image_column, options.caption_column
    chosen = {
        name: select_rows(name, data_paths, options.split, options.skip_bad, columns) for name in dict.fromkeys(options.run)
    }
    chosen, results = same_images(chosen), {}
    for name, rows in chosen.items():
        opened = open_model(name, options.device, options.precision)
        similarity, image_of_text, captions, paths = embed_rows(opened, rows, options.skip_bad, options.num_workers)
        scores = recall(similarity, image_of_text, right_pairs(image_of_text, number_captions(captions), len(paths)))
        row = {"images": len(paths), "rsum": scores["rsum"]}
        row |= {direction: scores[direction]["R@1"] for direction in ("image_to_text", "text_to_image")}
        if pictures:
            reading = options.num_workers, options.skip_bad
            row["top1"] = top1_accuracy(opened[0], pictures, options.template, *opened[1:], *reading)
        results[name] = row | speeds(opened, paths, captions) | sizes(opened[0])
        print(f"{name}: rsum {row['rsum']:.1f}", flush=True)
    print("\n" + table(results))
    points = [[(row[key], 0.0) for row in results.values()] for key in ("pictures_per_second", "rsum")]
    if options.json:
        write_json(options.json, {"runs": results})
    draw_points(list(results), *points, "pictures embedded per second", f"rsum on {options.split}", options.output)
    print(f"drawn in {options.output}")


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
