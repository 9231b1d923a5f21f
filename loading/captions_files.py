"""Captions files of every layout, each read by one reader into the same rows."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from loading.columns import caption_columns, captions_in_cell, image_column, plain_column
from loading.splits import SPLIT_NAMES, column_splits, read_karpathy
from loading.tables import read_table
from utils.errors import UserError
from utils.files import read_text
from utils.folders import is_hidden_path
from utils.formats import PICTURE_ENDINGS

CAPTION_FILES = ["captions.txt", "captions.csv", "Flickr8k.token.txt", "dataset_flickr8k.json", "results.csv"]
CAPTION_FILES += ["metadata.csv", "metadata.jsonl", "captions.tsv", "captions.json", "captions.jsonl"]
IMAGE_FOLDERS = ["Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images"]
TABLES = (".csv", ".tsv", ".json", ".jsonl")
TEXTS = (".txt", ".caption")  # with the captions of the picture of the same name
WORKBOOKS = {
    b"PK\x03\x04": "a workbook (.xlsx, .ods, .numbers) or a zip file",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook (.xls)",
}


@dataclass
class CaptionsFile:
    """What captions files hold.

    rows: [(row number, image, caption)]. bad: [(row number, what is wrong)]. splits: {image: split} where they have splits, and
    rule where they have them. notes: lines on how they were read.
    """

    rows: list = field(default_factory=list)
    bad: list = field(default_factory=list)
    splits: dict = field(default_factory=dict)
    rule: str = ""
    notes: list = field(default_factory=list)


def find_captions(data_dir):
    """The captions files of a data folder: the first of CAPTION_FILES; train.csv, val.csv and the like; its only table; or a
    text file for each picture. Raises UserError otherwise.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; --data-dir must be a folder with Images/ and a captions file")
    folders = [data_dir, data_dir / "Flickr8k_text", data_dir / "Flickr8k_text" / "Flickr8k_text", data_dir / "annotations"]
    for folder in folders:
        for name in CAPTION_FILES:
            if (folder / name).is_file():
                return [folder / name]
        if several := tables_of_splits(folder) or sorted(folder.glob("captions_*.json"))[:1]:  # the second: COCO's
            return several
    below = [path for name in CAPTION_FILES for path in data_dir.glob(f"*/{name}") if not is_hidden_path(path.parent.name)]
    if below and (len(below) == 1 or all(split_word(path.parent.name) for path in below)):
        return sorted(below)
    for ending in (".csv", ".tsv", ".jsonl", ".json"):
        tables = sorted(path for path in data_dir.glob(f"*{ending}") if not is_hidden_path(path.name))
        if len(tables) == 1:
            return tables
    if texts := texts_beside_pictures(data_dir):
        return texts
    if workbooks := sorted(data_dir.glob("*.xls*")):
        raise UserError(f"{workbooks[0]}: a workbook is not read; save the sheet as CSV (UTF-8), captions.csv")
    raise UserError(f"{data_dir}: no captions file ({', '.join(CAPTION_FILES)}, or one .csv); pass --captions-path")


def split_word(name):
    """The split that a file's or folder's name names, as train.csv or captions_val2017.json do, or ""."""
    words = {SPLIT_NAMES.get(word, "") for word in re.split(r"[^a-z]+", name.lower())} - {""}
    return words.pop() if len(words) == 1 else ""


def tables_of_splits(folder):
    """The tables of a folder that are named after at least two splits; of COCO's JSON files those with captions only."""
    tables = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in TABLES and not is_hidden_path(path.name)]
    tables = [path for path in tables if split_word(path.stem) and path.is_file()]
    tables = [path for path in tables if path.name.startswith("captions")] or tables
    return tables if len({split_word(path.stem) for path in tables}) > 1 else []


def texts_beside_pictures(data_dir):
    """The text files below a folder that have the name of a picture there, in the same folder or another."""
    files = [path for path in sorted(data_dir.rglob("*")) if not is_hidden_path(path.relative_to(data_dir).as_posix())]
    pictures = {path.stem for path in files if path.suffix.lower() in PICTURE_ENDINGS}
    return [path for path in files if path.suffix.lower() in TEXTS and path.stem in pictures and path.is_file()]


def find_images(data_dir):
    """The folder of a data folder's images; that folder itself where none is named as such."""
    for name in IMAGE_FOLDERS:
        folder = Path(data_dir) / name
        while folder.is_dir():  # archives nest it
            inner = [folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
            if not inner:
                return folder
            folder = inner[0]
    return Path(data_dir)


def read_files(paths, columns, names):
    """The `CaptionsFile` of several files; with more than one table each is a split. names: a `names.Names`."""
    if len(paths) > 1 and paths[0].suffix.lower() in TEXTS or paths[0].suffix.lower() == ".caption":
        return read_texts(paths, names)
    if len(paths) == 1:
        return read_captions(paths[0], columns, names)
    merged, owner = CaptionsFile(rule=f"the names of {' and '.join(path.name for path in paths)}"), {}
    for path in paths:
        part = read_captions(path, columns, names)
        split = split_word(path.stem) or split_word(path.parent.name)
        folder = path.parent.relative_to(names.base).as_posix() if path.parent.is_relative_to(names.base) else "."
        merged.notes += part.notes
        merged.bad += [(f"{number} of {path.name}", problem) for number, problem in part.bad]
        for number, image, caption in part.rows:
            beside = [f"{folder}/{image}", f"{split}/{image}", f"{path.stem}/{image}"]
            image = next((name for name in beside if name.removeprefix("./") in names.files), image).removeprefix("./")
            file = names.find(image) or image
            if owner.setdefault(file, (split, path))[0] != split:
                raise UserError(f"{path}, row {number}: {image} is in {owner[file][1]}, too; remove it from one")
            merged.rows.append((number, image, caption))
            merged.splits[image] = split
    return merged


def read_texts(paths, names):
    """Text files with the name of a picture, each line a caption."""
    result = CaptionsFile(notes=[f"{paths[0].parent}: captions from {len(paths):,} text files with the names of pictures"])
    for path in paths:
        lines = list(filter(str.strip, read_text(path).split("\n")))
        result.rows += [(number, path.with_suffix("").as_posix(), line.strip()) for number, line in enumerate(lines, start=1)]
        result.bad += [] if lines else [(1, f"{path.name}: empty")]
    return result


def read_captions(path, columns, names):
    """The `CaptionsFile` of a file of any known layout. columns: (image, caption), named by the user, or empty.

    Raises UserError where the file cannot be read or has no images and captions.
    """
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(4)
        if start in WORKBOOKS:
            raise UserError(f"{path}: is {WORKBOOKS[start]}; save the sheet as CSV (UTF-8)")
    text = read_text(path, "--captions-path")
    if path.suffix.lower() in (".json", ".jsonl"):
        return read_json(path, text, columns)
    if re.match(r"[^\t\n]+#\d+\t", text):
        return read_token(text)
    header, rows, notes = read_table(path, text, columns, lambda name: names.find(name) is not None)
    return from_rows(path, header, rows, columns, notes)


def read_token(text):
    """Flickr8k.token.txt, lines of `name#number<TAB>caption`."""
    result = CaptionsFile()
    for number, line in enumerate(text.split("\n"), start=1):
        name, tab, caption = line.partition("\t")
        image = name.rpartition("#")[0].strip()
        # The published file has five rows whose name ends in .jpg.1; that image was never published.
        if not line.strip() or re.search(r"\.jpg\.\d$", image):
            continue
        if not (tab and image and captions_in_cell(caption)):
            missing = "empty caption" if image else "empty file name"
            result.bad.append((number, missing if tab else "no tab between name and caption"))
        else:
            result.rows.append((number, image, caption.strip()))
    return result


def from_rows(path, header, rows, columns, notes=()):
    """The `CaptionsFile` of a table. header, rows, columns: as of `tables.read_table`; cells may be of any kind."""
    image, captions = image_column(header, columns[0]), caption_columns(header, columns[1])
    if image is None or not captions:
        shown = ", ".join(map(str, header))[:80] or "nothing"
        raise UserError(
            f"{path}: no image and caption columns, only {shown}; rename them to image,caption, or name them with "
            "--image-column and --caption-column"
        )
    at, texts_at = header.index(image), [header.index(name) for name in captions]
    result, complete = CaptionsFile(notes=list(notes)), []
    for number, fields, problem in rows:
        name = "" if problem or fields[at] is None else str(fields[at]).strip()
        texts = [] if problem else [text for position in texts_at for text in captions_in_cell(fields[position])]
        if problem or not (name and texts):
            result.bad.append((number, problem or f"empty {'caption' if name else 'file name'}"))
            continue
        result.rows += [(number, name, text) for text in texts]
        complete.append((number, name, fields))
    result.splits, column = column_splits(path, [plain_column(name) for name in header], complete)
    result.rule = f"the column {column} of {path.name}"
    return result


def read_json(path, text, columns):
    """JSON: Karpathy's, COCO's, lists or lines of records, {image: captions}, or pandas' columns."""
    wrong = (
        f"{path}: not in the layout of Karpathy's dataset_flickr8k.json, of COCO's captions_*.json, of a list of records with "
        "image and caption, nor of lines of such records"
    )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise UserError(f"{wrong}; it is no JSON") from None
    images = value.get("images") if isinstance(value, dict) else None
    if isinstance(images, list) and any(isinstance(image, dict) and "sentences" in image for image in images):
        return CaptionsFile(*read_karpathy(path, text), f"Karpathy's JSON, {path.name}")
    if isinstance(images, list) and isinstance(value.get("annotations"), list):
        return read_coco(path, images, value["annotations"])
    records = as_records(value, columns)
    if not records or not all(isinstance(record, dict) for record in records):
        raise UserError(wrong)
    header = list(dict.fromkeys(name for record in records for name in record))
    rows = [(number, [record.get(name, "") for name in header], "") for number, record in enumerate(records, start=1)]
    return from_rows(path, header, [row for row in rows if any(row[1])], columns)


def as_records(value, columns):
    """The records of a JSON value, or None."""
    if isinstance(value, list) or not isinstance(value, dict):
        return value if isinstance(value, list) else None
    image, captions = image_column(value, columns[0]), caption_columns(value, columns[1])
    if image is not None and captions:
        cells = [value[name] for name in (image, *captions)]
        if all(isinstance(cell, dict) for cell in cells):  # as pandas' to_json writes it
            return [{name: value[name].get(key) for name in (image, *captions)} for key in value[image]]
        if all(isinstance(cell, list) for cell in cells) and len({len(cell) for cell in cells}) == 1:
            return [dict(zip((image, *captions), row)) for row in zip(*cells)]
        return [value]  # a file of one line
    inner = [cell for cell in value.values() if isinstance(cell, list) and cell and all(isinstance(r, dict) for r in cell)]
    if len(inner) == 1 and len(value) < 5 and image_column(inner[0][0], columns[0]) is not None:
        return inner[0]
    return [{"image": name, "caption": captions} for name, captions in value.items()]


def read_coco(path, images, annotations):
    """COCO's captions_*.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""
    result = CaptionsFile()
    try:
        names = {image["id"]: image["file_name"] for image in images}
        if annotations and "caption" not in annotations[0]:
            raise UserError(f"{path}: its annotations have no captions; COCO's captions are in captions_*.json")
        for number, annotation in enumerate(annotations, start=1):
            name, texts = names.get(annotation["image_id"]), captions_in_cell(annotation["caption"])
            if isinstance(name, str) and name and texts:
                result.rows += [(number, name, text) for text in texts]
            else:
                result.bad.append((number, "empty caption" if name else f"no image has the id {annotation['image_id']}"))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not in the layout of COCO's captions_*.json") from None
    return result
