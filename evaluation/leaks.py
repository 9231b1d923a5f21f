"""Find pictures of one split that are also in another: the same file name, or near-duplicates under different names."""

from itertools import combinations
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tyro

from captions import load_captions
from utils.errors import UserError
from utils.files import write_json
from utils.images import center_crop, read_images

GRID_SIZE = 16  # height and width of a picture's hash, in bits
# Near-duplicates differ in at most this many bits. Unrelated photographs differ in about half of them, a resized or
# recompressed copy in a few.
MAX_DIFFERING_BITS = 26
NUM_SHOWN = 10  # near-duplicates to print


def difference_hashes(paths, num_workers=0):
    """The difference hashes of n picture files: (n, GRID_SIZE * GRID_SIZE) booleans (N. Krawetz 2013).

    A picture is reduced to a coarse grid of brightness; a bit says whether a cell is darker than its right neighbour. Most
    bits survive resizing, recompression and changes of brightness. Raises UserError for a file that cannot be decoded.
    """
    hashes = np.empty((len(paths), GRID_SIZE * GRID_SIZE), dtype=bool)
    for i, (picture, problem) in enumerate(read_images(paths, 4 * GRID_SIZE, num_workers)):
        if problem:
            raise UserError(f"{problem}; fix or remove it")
        grey = cv2.cvtColor(center_crop(picture, 4 * GRID_SIZE), cv2.COLOR_RGB2GRAY)
        cells = cv2.resize(grey, (GRID_SIZE + 1, GRID_SIZE), interpolation=cv2.INTER_AREA).astype(int)
        hashes[i] = (cells[:, 1:] > cells[:, :-1]).ravel()
    return hashes


def near_duplicates(a, b):
    """The pairs of hashes a, (n, bits), and b, (m, bits), that differ in at most MAX_DIFFERING_BITS.

    Returns three arrays: the rows of a, the rows of b, and the number of bits that differ.
    """
    signs = [2.0 * hashes.astype(np.float32) - 1 for hashes in (a, b)]  # bits as -1 and 1: a dot product then counts them
    differing = (a.shape[1] - signs[0] @ signs[1].T) / 2  # (n, m)
    rows_a, rows_b = np.nonzero(differing <= MAX_DIFFERING_BITS)
    return rows_a, rows_b, differing[rows_a, rows_b].astype(int)


def leaks(
    data_dir: str = "",
    image_path: str = "",
    captions_path: str = "",
    num_workers: int = 4,
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Finds pictures that are in two splits: the same file name, or near-duplicates.

    Args:
        data_dir: folder with Images/ and a captions file
        image_path: folder of the images, if it is not in data_dir
        captions_path: captions file, if it is not in data_dir
        num_workers: threads that decode pictures
        json_path: file for the results
    """
    if not (data_dir or captions_path):
        raise UserError("--data-dir: name the folder to check")
    table, image_dir, _ = load_captions(data_dir, image_path, captions_path)
    names = {split: sorted(set(rows["image"])) for split, rows in table[table["split"] != ""].groupby("split")}
    hashes = {split: difference_hashes([image_dir / name for name in names[split]], num_workers) for split in names}
    results = {"images": {split: len(names[split]) for split in names}, "same_name": [], "near_duplicates": []}
    for a, b in combinations(names, 2):
        in_a, in_b = ({Path(name).name for name in names[split]} for split in (a, b))  # without their folders
        results["same_name"] += sorted(in_a & in_b)
        pairs = sorted(zip(*near_duplicates(hashes[a], hashes[b])), key=lambda pair: pair[2])
        results["near_duplicates"] += [
            {a: names[a][row_a], b: names[b][row_b], "differing_bits": int(bits)} for row_a, row_b, bits in pairs
        ]
    print(", ".join(f"{count:,} {split}" for split, count in results["images"].items()), "images")
    print(f"in two splits: {len(results['same_name'])} file names, {len(results['near_duplicates'])} near-duplicates")
    for pair in results["near_duplicates"][:NUM_SHOWN]:
        print("  " + ", ".join(f"{key} {value}" for key, value in pair.items()))
    if json_path:
        write_json(json_path, results)
