"""A map of a picture collection: similar pictures lie side by side, in groups that captions name.

Pictures are laid out by t-SNE (van der Maaten and Hinton 2008) and moved to the nearest free cell of a grid, so that none
covers another. Seen from afar, a square of several cells shows one picture of it: the one that is most typical of its group.
`search/map.html` is the page that shows it; it needs no network.
"""

import base64
import colorsys
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError
from utils.files import PNG_MARK, atomic_write, is_own_png, require_own_file
from utils.folders import printable
from utils.images import center_crop, read_images

MAX_PICTURES = 50_000  # t-SNE of more takes many minutes
FEW = 10  # fewer pictures have too few neighbours for t-SNE, and are laid out by their principal components
COMPONENTS = 50  # principal components that t-SNE compares
PERPLEXITY = 30  # about how many neighbours of each picture t-SNE heeds
ITERATIONS, ANGLE = 500, 0.7  # of t-SNE; 1,000 and 0.5 keep hardly more neighbours in three times as long (docs/map.md)
MAX_WORDS = 8  # in a group's name, where enough captions are that short
CELLS_PER_PICTURE = 3  # free cells keep the gaps that t-SNE leaves between groups
SIDES = (256, 192, 128, 96, 64, 48, 32)  # of thumbnails, in pixels; multiples of JPEG's blocks of 16, which then do not mix
PAGE_BYTES = 36_000_000  # what the thumbnails of a page take at most
BYTES_PER_PIXEL = 0.35  # of a thumbnail in a sheet, as base64
SHEET = 2048  # height and width of a sheet of thumbnails, in pixels
JPEG_QUALITY = 75
START = 100  # bytes of the template, by which a page is recognised
MARK = "{{data}}"  # in the template
PNG_SIDE, PNG_MARGIN, PNG_TILE = 2000, 40, 38  # pixels; tiles have this side at least
PNG_LEAST = 500  # pixels, so that names fit into a small map
WRAP = 24  # characters in a line of a label


@dataclass
class PictureMap:
    """N pictures on a grid, the most typical of their groups first."""

    paths: list
    cells: np.ndarray  # (N, 2) int, column and row on the grid, no two the same
    labels: np.ndarray  # (N,) int, group of each
    names: list  # of the groups, no two the same; "" where there is no caption for one
    thumbnails: np.ndarray  # (N, side, side, 3) uint8


def make_map(embeddings, paths, captions, caption_embeddings, output, num_workers, url_of=None):
    """Writes a map of pictures as an HTML page, and as a PNG beside it. Returns its `PictureMap`.

    Parameters: those of `map_pictures`, and url_of of `page`. output: path of the page; the PNG has the same name with .png.
    """
    output = Path(output)
    require_own_map(output)
    from PIL.PngImagePlugin import PngInfo

    print(f"laying out {len(paths):,} pictures", flush=True)
    pictures = map_pictures(embeddings, paths, captions, caption_embeddings, num_workers)
    text = page(pictures, url_of)
    atomic_write(output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    image, info = draw(pictures), PngInfo()
    info.add_text(*PNG_MARK)
    atomic_write(output.with_suffix(".png"), lambda temporary: image.save(temporary, format="PNG", pnginfo=info, optimize=True))
    return pictures


def require_own_map(output):
    """Raises UserError where a map may not be written: `output` is no page, or there is a page or a PNG that is no map."""
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--map {output}: must end in .html")
    start = (Path(__file__).with_name("map.html").read_bytes())[:START]
    require_own_file(output, lambda path: path.read_bytes().startswith(start), "--map")
    require_own_file(output.with_suffix(".png"), is_own_png, "--map")


def map_pictures(embeddings, paths, captions, caption_embeddings, num_workers):
    """The `PictureMap` of N pictures; those that cannot be decoded are left out, with a line.

    embeddings: (N, d_e), L2-normalised. paths: N strings. captions, caption_embeddings: as for `group`. num_workers: threads
    that decode. Raises UserError where there are more than MAX_PICTURES, or none can be decoded.
    """
    if len(paths) > MAX_PICTURES:
        raise UserError(f"--map: {len(paths):,} pictures, at most {MAX_PICTURES:,} fit; name a smaller folder with --images")
    thumbnails, readable = read_thumbnails(paths, num_workers)
    if not readable:
        raise UserError(f"--map: none of the {len(paths):,} pictures can be decoded; name another folder with --images")
    embeddings = np.asarray(embeddings, dtype=np.float32)[readable]
    points = lay_out(embeddings)
    labels, names = group(points, embeddings, captions, caption_embeddings)
    order = typical_first(labels, embeddings)
    cells = to_cells(points[order])
    return PictureMap([str(paths[readable[i]]) for i in order], cells, labels[order], names, thumbnails[order])


def lay_out(embeddings):
    """Lays pictures out so that similar ones lie side by side: embeddings, (N, d_e) -> points, (N, 2), 0 to 1.

    The same embeddings give the same points, on one machine.
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    left, values, _ = np.linalg.svd(embeddings - embeddings.mean(axis=0), full_matrices=False)
    components = (left * values)[:, :COMPONENTS]
    points = np.zeros((len(embeddings), 2), dtype=np.float32)
    points[:, : components.shape[1]] = components[:, :2]
    spread = points.std(axis=0).max()
    if len(points) >= FEW and spread > 0:
        from sklearn.manifold import TSNE

        perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
        start = 1e-4 * points / spread  # as small as scikit-learn's, which divides by zero where all pictures are the same
        tsne = TSNE(perplexity=perplexity, init=start, max_iter=ITERATIONS, angle=ANGLE, random_state=0)
        points = tsne.fit_transform(components)
    low, high = points.min(axis=0), points.max(axis=0)
    return 0.5 + (points - (low + high) / 2) / max((high - low).max(), 1e-12)


def group(points, embeddings, captions, caption_embeddings):
    """Groups N points, (N, 2), by k-means: (labels, names), (N,) int and a list; the largest group is 0.

    Groups are made of points and not of embeddings, (N, d_e), so that each is one region of the map. Their number k is a
    quarter of the square root of N. captions, caption_embeddings: m strings and (m, d_e), for `name_groups`.
    """
    from sklearn.cluster import KMeans

    k = max(1, round(math.sqrt(len(points)) / 4))
    k = min(k, len(np.unique(points, axis=0)))
    found = KMeans(k, n_init=10, random_state=0).fit_predict(points)
    sizes = np.bincount(found)
    rank = np.empty(k, dtype=int)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(k)
    labels = rank[found]
    return labels, name_groups(labels, embeddings, captions, caption_embeddings)


def middles(labels, embeddings):
    """The mean embedding of each of k groups, (k, d_e)."""
    return np.stack([embeddings[labels == label].mean(axis=0) for label in range(labels.max() + 1)])


def name_groups(labels, embeddings, captions, caption_embeddings):
    """The names of k groups: for each a caption near its middle; "" for some where there are fewer captions than groups.

    A caption's score is its dot product with the group's middle less that with the mean of all pictures, so that a name says
    what sets a group apart. No caption names two groups: the sum of the scores is maximised under this condition.
    """
    from scipy.optimize import linear_sum_assignment

    distinct = {}  # {name in lower case: position of the caption}
    for i, caption in enumerate(captions):
        distinct.setdefault(tidy(caption).casefold(), i)
    distinct.pop("", None)
    short = [i for text, i in distinct.items() if len(text.split()) <= MAX_WORDS]
    k = labels.max() + 1
    chosen = short if len(short) >= k else list(distinct.values())
    names = [""] * k
    if not chosen:
        return names
    embeddings = embeddings.astype(np.float32)
    targets = middles(labels, embeddings) - (embeddings.mean(axis=0) if k > 1 else 0)  # (k, d_e)
    scores = targets @ np.asarray(caption_embeddings, dtype=np.float32)[chosen].T
    for label, column in zip(*linear_sum_assignment(scores, maximize=True)):
        names[label] = tidy(captions[chosen[column]])
    return names


def tidy(caption):
    """A caption as a name: "a dog , wet ." -> "A dog, wet"."""
    text = re.sub(r"\s+([.,;:!?]|'s\b)", r"\1", " ".join(caption.split())).rstrip(" .")
    return text[:1].upper() + text[1:]


def typical_first(labels, embeddings):
    """Positions of N pictures, (N,): those nearest to the middle of their group first."""
    scores = (embeddings * middles(labels, embeddings)[labels]).sum(axis=1)
    return np.argsort(-scores, kind="stable")


def to_cells(points):
    """Moves N points, (N, 2), to cells of a grid, (N, 2) int: each to the nearest that is free, the first ones first."""
    side = math.ceil(math.sqrt(CELLS_PER_PICTURE * len(points)))
    wanted = np.minimum((points * side).astype(int), side - 1)
    taken, full, cells = set(), {}, []
    for column, row in wanted.tolist():
        radius = full.get((column, row), 0)  # all cells nearer than this are taken
        while True:
            free = [cell for cell in ring(column, row, radius) if cell not in taken]
            if free:
                break
            radius += 1
        full[column, row] = radius
        cells.append(min(free, key=lambda cell: (cell[0] - column) ** 2 + (cell[1] - row) ** 2))
        taken.add(cells[-1])
    cells = np.array(cells)
    return cells - cells.min(axis=0)


def ring(column, row, radius):
    """The cells on the border of a square around a cell."""
    if radius == 0:
        return [(column, row)]
    steps = range(-radius, radius)
    edges = [[(column + i, row - radius), (column + radius, row + i)] for i in steps]
    edges += [[(column - i, row + radius), (column - radius, row - i)] for i in steps]
    return [cell for edge in edges for cell in edge]


def read_thumbnails(paths, num_workers):
    """(thumbnails, readable): (n, side, side, 3) uint8, and the positions of the n paths that can be decoded."""
    side = next((side for side in SIDES if len(paths) * side**2 * BYTES_PER_PIXEL <= PAGE_BYTES), SIDES[-1])
    thumbnails, readable = np.empty((len(paths), side, side, 3), dtype=np.uint8), []
    for i, (image, problem) in enumerate(read_images(paths, side, num_workers)):
        if problem:
            print(f"left out {printable(problem)}")
            continue
        thumbnails[len(readable)] = center_crop(image, side)
        readable.append(i)
    return thumbnails[: len(readable)], readable


def sheets(thumbnails):
    """Thumbnails, (N, side, side, 3), pasted row by row into JPEGs of SHEET pixels: their data addresses."""
    side = thumbnails.shape[1]
    across, addresses = SHEET // side, []
    for start in range(0, len(thumbnails), across**2):
        some = thumbnails[start : start + across**2]
        rows = math.ceil(len(some) / across)
        padded = np.zeros((rows * across, side, side, 3), dtype=np.uint8)
        padded[: len(some)] = some
        sheet = padded.reshape(rows, across, side, side, 3).swapaxes(1, 2).reshape(rows * side, across * side, 3)
        _, encoded = cv2.imencode(".jpg", sheet[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        addresses.append("data:image/jpeg;base64," + base64.b64encode(encoded).decode())
    return addresses


def page(pictures, url_of=None):
    """The HTML text of a `PictureMap`, complete in itself.

    url_of: maps a path to the address at which the page finds the whole picture; by default that of the file. Where there is
    none, the page shows the thumbnail.
    """
    addresses = [(url_of or file_address)(path) for path in pictures.paths]
    start = os.path.commonprefix(addresses)
    common = os.path.commonprefix(pictures.paths)
    folder = max(common.rfind("/"), common.rfind("\\")) + 1
    data = {
        "cells": pictures.cells.tolist(),
        "labels": pictures.labels.tolist(),
        "names": pictures.names,
        "colors": colors(len(pictures.names)),
        "files": [path[folder:] for path in pictures.paths],
        "start": start,
        "addresses": [address[len(start) :] for address in addresses],
        "side": pictures.thumbnails.shape[1],
        "across": SHEET // pictures.thumbnails.shape[1],
        "sheets": sheets(pictures.thumbnails),
    }
    template = Path(__file__).with_name("map.html").read_text(encoding="utf-8")
    # in ASCII and without <, no file name can end the element that holds the data
    return template.replace(MARK, json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))


def file_address(path):
    return Path(path).absolute().as_uri()


def colors(count):
    """`count` colours as #rrggbb. The golden angle between hues keeps any few of them apart."""
    hues = [(0.58 + 0.618034 * i) % 1 for i in range(count)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.52, 0.62)) for hue in hues]


def visible(cells, level):
    """What is seen of cells, (N, 2), where squares of 2 ** level by as many show one: (squares, positions).

    squares: (v, 2) int, column and row; positions: (v,), of the first picture in each.
    """
    return np.unique(cells >> level, axis=0, return_index=True)


def draw(pictures):
    """A `PictureMap` as a PIL image with the names of its groups: PNG_SIDE pixels at most, less for few pictures."""
    from PIL import Image, ImageDraw

    used = int(pictures.cells.max()) + 1
    level = max(0, math.ceil(math.log2(PNG_TILE * used / (PNG_SIDE - 2 * PNG_MARGIN))))
    squares, positions = visible(pictures.cells, level)
    step = min(pictures.thumbnails.shape[1], (PNG_SIDE - 2 * PNG_MARGIN) // (int(squares.max()) + 1))
    extent = step * (squares.max(axis=0) + 1)
    size = np.maximum(extent + 2 * PNG_MARGIN, PNG_LEAST)
    corner = (size - extent) // 2
    image = Image.new("RGB", tuple(size.tolist()), "white")
    canvas, palette = ImageDraw.Draw(image), colors(len(pictures.names))
    frame = min(4, max(1, step // 24))
    for square, position in zip(squares, positions):
        x, y = (int(value) for value in corner + step * square)
        canvas.rectangle((x, y, x + step - 2, y + step - 2), palette[pictures.labels[position]])
        thumbnail = Image.fromarray(pictures.thumbnails[position])
        side = step - 1 - 2 * frame
        image.paste(thumbnail.resize((side, side), Image.Resampling.LANCZOS), (x + frame, y + frame))
    draw_names(canvas, pictures, lambda cell: corner + step * cell / 2**level, palette)
    return image


def draw_names(canvas, pictures, place, palette):
    """Writes the name of each group at its middle, or a little above or below where another name is.

    place: maps a column and row of the grid to pixels.
    """
    import textwrap

    from matplotlib import font_manager
    from PIL import ImageFont

    font, boxes = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 26), []
    for label, name in enumerate(pictures.names):
        if not name:
            continue
        text = "\n".join(textwrap.wrap(name, WRAP))
        x, y = place(pictures.cells[pictures.labels == label].mean(axis=0) + 0.5)
        left, top, right, bottom = canvas.multiline_textbbox((x, y), text, font, anchor="mm", align="center")
        shift_x = max(0, 20 - left) - max(0, right - canvas.im.size[0] + 20)
        for shift in (0, -40, 40, -80, 80, -120, 120):
            box = (left - 12 + shift_x, top - 9 + shift, right + 12 + shift_x, bottom + 9 + shift)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes):
                break
        boxes.append(box)
        canvas.rounded_rectangle(box, 8, "white", palette[label], 3)
        canvas.multiline_text((x + shift_x, y + shift), text, "#1a1a1a", font, "mm", align="center")
