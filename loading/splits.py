"""Which split an image is in: by official lists, a column of the captions file, Karpathy's JSON, or a hash of its name."""

import contextlib
import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath

from loading.official import KARPATHY, caution, other_folders, own_folders
from utils.errors import UserError
from utils.files import read_text

SPLIT_LISTS = {"train": "trainImages.txt", "val": "devImages.txt", "test": "testImages.txt"}
SPLIT_COLUMNS = ["split", "partition", "subset", "set"]  # the last three only where they hold nothing but names of splits
SPLIT_NAMES = {  # what files call the splits
    **dict.fromkeys(["train", "training", "restval"], "train"),  # restval: the part of COCO's validation set for training
    **dict.fromkeys(["val", "valid", "validation", "dev", "development"], "val"),
    **dict.fromkeys(["test", "testing"], "test"),
}
SHARES = {"val": 0.1, "test": 0.1}  # fractions of the images where nothing names a split; the others are for training
NUM_SHOWN = 3  # images named in a message; the others are counted


@dataclass
class SplitNotes:
    """What is said of how a table's images were split. It is in the table's attrs["split"]."""

    rule: str
    place: str = ""  # of the files that say so
    notes: list = field(default_factory=list)  # further lines: what is in no split, and why
    caution: str = ""  # why no score may stand beside a published one

    def lines(self):
        return [f"split: {self.rule}{self.place}", *self.notes, *filter(None, [self.caution])]


def some(names):
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NUM_SHOWN:,} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more


def split_name(text):
    """What a file calls a split -> "train", "val", "test", or "" for an empty text. Raises ValueError for anything else."""
    name = str(text).strip().lower()
    if name and name not in SPLIT_NAMES:
        raise ValueError(f"{text!r} is no split (train, val, test)")
    return SPLIT_NAMES.get(name, "")


def column_splits(path, header, rows):
    """{image: split} of the split column of a captions file, and that column's name; ({}, "") where it has none.

    header: its column names, in lower case. rows: (row number, image, fields) of its rows.
    Raises UserError where a row names no split, or the rows of an image name several.
    """
    for name in (name for name in SPLIT_COLUMNS if name in header):
        position, splits = header.index(name), {}
        if name != "split" and not all(fields[position].strip().lower() in SPLIT_NAMES for _, _, fields in rows):
            continue
        for number, image, fields in rows:
            try:
                split = split_name(fields[position])
            except ValueError as error:
                raise UserError(f"{path}, row {number}: {error}; correct it, or rename the column {name!r}") from None
            if splits.setdefault(image, split) != split:
                raise UserError(f"{path}, row {number}: {image} is {split or 'in no split'} here, but {splits[image]} above")
        if any(splits.values()):
            return splits, name
    return {}, ""


def read_karpathy(path, text):
    """dataset_flickr8k.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}; as `captions.read_captions`."""
    try:
        images = json.loads(text)["images"]
        splits = {image["filename"]: split_name(image["split"]) for image in images}
        invalid = {name: split for name, split in splits.items() if not isinstance(name, str) or not split}
        if invalid:
            name, split = invalid.popitem()
            raise ValueError(f"filename {name!r} and split {split!r}")
        pairs = [(image["filename"], sentence["raw"].strip()) for image in images for sentence in image["sentences"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not in the layout of Karpathy's dataset_flickr8k.json ({problem})") from None
    numbered = [(number, *pair) for number, pair in enumerate(pairs, start=1)]
    good = [row for row in numbered if row[1] and row[2]]
    return good, [(row[0], "empty caption or file name") for row in numbered if not (row[1] and row[2])], splits


def hashed_split(image):
    """The split of an image from a hash of its name, independent of other images: "train", "val" or "test"."""
    position = int(hashlib.sha1(image.encode(), usedforsecurity=False).hexdigest()[:16], 16) / 2**64  # uniform in [0, 1)
    for split, share in SHARES.items():
        if position < share:
            return split
        position -= share
    return "train"


def listed_splits(folder):
    """({image: split}, file names) of the official lists in a folder (`Flickr_8k.trainImages.txt`, ...); empty without any.

    Raises UserError where an image is in two lists.
    """
    splits, files = {}, []
    for split, ending in SPLIT_LISTS.items():
        for path in sorted(Path(folder).glob(f"*{ending}")):
            files.append(path.name)
            for name in filter(None, map(str.strip, read_text(path).splitlines())):
                if splits.setdefault(name, split) != split:
                    raise UserError(f"{path}: {name} is in the list for {splits[name]}, too; remove it from one")
    return splits, ", ".join(files)


def karpathy_splits(folder):
    """({image: split}, file name) of Karpathy's JSON in a folder; empty where there is none."""
    path = next((Path(folder) / name for name in KARPATHY if os.path.isfile(Path(folder) / name)), None)
    return (read_karpathy(path, read_text(path))[2], path.name) if path else ({}, "")


def splits_of(images, named):
    """{image: split} of images, "" for one that a {name: split} does not have.

    A name that is no image's stands for the one image with that file name, without folders, ending and case.
    """
    by_stem, count = defaultdict(set), defaultdict(int)
    for name, split in named.items():
        by_stem[stem(name)].add(split)
    for image in images:
        count[stem(image)] += 1
    found = {}
    for image in images:
        candidates = by_stem[stem(image)] if count[stem(image)] == 1 else ()
        found[image] = named[image] if image in named else next(iter(candidates)) if len(candidates) == 1 else ""
    return found


def stem(name):
    """A file's name without folders, a picture's ending, and case."""
    path = PurePosixPath(name.replace("\\", "/"))
    return (path.stem if path.suffix.isascii() and path.suffix[1:].isalnum() else path.name).lower()


def find_splits(images, folders, stated, stated_rule):
    """({image: split}, SplitNotes) of some images, from the first of: official lists, the captions file itself, JSON, a hash.

    folders: where the lists and the JSON are, if they name an image; if they lie elsewhere (`official.other_folders`), they
    must name half of the images. stated: {image: split} of the captions file, and stated_rule how it says so.
    An image that is named by none is in no split, "". With training images but no validation images, a tenth of the former is
    used for validation.
    """
    images = list(dict.fromkeys(images))
    splits, rule, place = first_rule(images, folders, stated, stated_rule)
    if splits is None:
        splits = {image: hashed_split(image) for image in images}
        rule = "by a hash of each image's name, about 80/10/10"
        return splits, SplitNotes(rule, caution=caution(splits, is_hashed=True))
    if "val" not in splits.values():
        splits |= {image: "val" for image, split in splits.items() if split == "train" and hashed_split(image) == "val"}
        place += "; validation: about a tenth of its training images, by a hash of their names"
    unlisted = sorted(image for image, split in splits.items() if not split)
    notes = [f"{len(unlisted):,} images are in no split there, and are not used: {some(unlisted)}"] if unlisted else []
    return splits, SplitNotes(rule, place, notes, caution(splits, is_hashed=False))


def first_rule(images, folders, stated, stated_rule):
    """({image: split}, rule, place) of the first rule of `find_splits` that holds; (None, "", "") for the hash."""

    def found_in(folder):
        for read, what in ((listed_splits, "official lists"), (karpathy_splits, "Karpathy's JSON")):
            named, files = read(folder)
            yield named, what, f" in {folder} ({files})"

    own = [found_in(folder) for folder in own_folders(folders)]  # generators: the lists of all folders come before any JSON
    for named, rule, place in chain(map(next, own), [(stated, stated_rule, "")], map(next, own)):
        splits = splits_of(images, named)
        if any(splits.values()):
            return splits, rule, place
    for folder in other_folders(folders, images):
        with contextlib.suppress(UserError):  # a foreign file
            for named, rule, place in found_in(folder):
                splits = splits_of(images, named)
                if sum(map(bool, splits.values())) >= len(images) / 2:
                    return splits, rule, place
    return None, "", ""
