"""Whether pictures of one split stand in another, too: by name, or as near-duplicates under another name."""

from itertools import combinations
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import tyro

from captions import load_captions
from dataset import center_crop, read_images
from storage import UserError, write_json

SIDE = 16  # of the grid of brightness whose rises and falls are a picture's hash
NEAR = 26  # of its 256 bits may differ; unrelated photographs differ in about half, a recompressed or resized copy in a few
SHOWN = 10  # near-duplicates that are printed


def difference_hashes(paths, num_workers=0):
    """n picture files -> (n, SIDE * SIDE) booleans: whether brightness rises from each cell to its right neighbour.

    The difference hash of N. Krawetz (2013), whose bits survive resizing, recompression and changes of brightness.
    Raises UserError for a file that cannot be decoded.
    """
    hashes = np.empty((len(paths), SIDE * SIDE), dtype=bool)
    for position, (picture, problem) in enumerate(read_images(paths, 4 * SIDE, num_workers)):
        if problem:
            raise UserError(f"{problem}; mend or remove it")
        grey = cv2.cvtColor(center_crop(picture, 4 * SIDE), cv2.COLOR_RGB2GRAY)
        cells = cv2.resize(grey, (SIDE + 1, SIDE), interpolation=cv2.INTER_AREA).astype(int)
        hashes[position] = (cells[:, 1:] > cells[:, :-1]).ravel()
    return hashes


def near_duplicates(a, b):
    """(n, bits) and (m, bits) hashes -> (rows of a, rows of b, bits that differ) of the pairs that differ in at most NEAR."""
    signs = [2.0 * hashes.astype(np.float32) - 1 for hashes in (a, b)]
    differing = (a.shape[1] - signs[0] @ signs[1].T) / 2  # (n, m)
    rows, columns = np.nonzero(differing <= NEAR)
    return rows, columns, differing[rows, columns].astype(int)


def leaks(
    data_dir: str = "",
    image_path: str = "",
    captions_path: str = "",
    num_workers: int = 4,
    json_path: Annotated[str, tyro.conf.arg(name="json")] = "",
):
    """Looks for pictures of one split in another: the same name, or nearly the same picture.

    Args:
        data_dir: folder with Images/ and a captions file
        image_path: folder of the images, where it is not in data_dir
        captions_path: captions file, where it is not in data_dir
        num_workers: threads that decode pictures
        json_path: file for the findings
    """
    if not (data_dir or captions_path):
        raise UserError("--data-dir: name the folder to look through")
    table, image_dir, _ = load_captions(data_dir, image_path, captions_path)
    names = {split: sorted(set(rows["image"])) for split, rows in table[table["split"] != ""].groupby("split")}
    hashes = {split: difference_hashes([image_dir / name for name in own], num_workers) for split, own in names.items()}
    found = {"images": {split: len(own) for split, own in names.items()}, "same_name": [], "near_duplicates": []}
    for a, b in combinations(names, 2):
        in_a, in_b = ({Path(name).name for name in names[split]} for split in (a, b))  # in whatever folders
        found["same_name"] += sorted(in_a & in_b)
        pairs = sorted(zip(*near_duplicates(hashes[a], hashes[b])), key=lambda pair: pair[2])
        found["near_duplicates"] += [
            {a: names[a][row], b: names[b][column], "differing_bits": int(bits)} for row, column, bits in pairs
        ]
    print(", ".join(f"{count:,} {split}" for split, count in found["images"].items()), "images")
    print(f"in two splits: {len(found['same_name'])} names, {len(found['near_duplicates'])} pairs that look the same")
    for pair in found["near_duplicates"][:SHOWN]:
        print("  " + ", ".join(f"{key} {value}" for key, value in pair.items()))
    if json_path:
        write_json(json_path, found)
