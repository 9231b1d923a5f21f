"""Read caption files of several layouts into one table of (image, caption, split).

Known are Kaggle's `captions.txt`, the same saved as `captions.csv`, the original `Flickr8k.token.txt`, Karpathy's
`dataset_flickr8k.json`, and any table (comma, semicolon, tab or bar) with an image and a caption column.
"""

import csv
import hashlib
import io
import json
import re
from pathlib import Path

import pandas as pd

from utils.cache import cache_key
from utils.errors import UserError
from utils.files import atomic_write, read_text


def image_positions(table):
    """A table's image names in the order of their first captions, and each row's position among them, (m,)."""
    positions, names = table["image"].factorize()
    return list(names), positions


CAPTION_FILES = ["captions.txt", "captions.csv", "Flickr8k.token.txt", "dataset_flickr8k.json", "results.csv"]
IMAGE_FOLDERS = ["Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset"]
IMAGE_COLUMNS = ["image", "image_name", "filename", "file_name", "file", "image_path", "path"]
CAPTION_COLUMNS = ["caption", "comment", "caption_text", "text", "sentence", "description"]
SPLIT_LISTS = {"train": "trainImages.txt", "val": "devImages.txt", "test": "testImages.txt"}
SHARES = {"val": 0.1, "test": 0.1}  # fractions of the images where no list gives the split; the others are for training
SPLITS = "splits.csv"  # in a run folder: the split of each image
SWALLOWED_ROW = r"\n[^,;\n]+\.(jpe?g|png|webp|bmp|tiff?|hei[cf])\"?[,;]"  # in a field of several lines: another row
NUM_SHOWN = 3  # bad rows or files listed in an error; the others are counted


def mentions_left_or_right(caption):
    """True where an English caption mentions left or right, so that it may be wrong for the flipped image."""
    return re.search(r"\b(left|right)", caption, re.IGNORECASE) is not None


def find_captions(data_dir):
    """The captions file of a data folder: the first of CAPTION_FILES, else its only .csv. Raises UserError otherwise."""
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise UserError(f"{data_dir}: no such folder; --data-dir must be a folder with Images/ and a captions file")
    for folder in [data_dir, data_dir / "Flickr8k_text"]:
        for name in CAPTION_FILES:
            if (folder / name).is_file():
                return folder / name
    tables = sorted(data_dir.glob("*.csv"))
    if len(tables) == 1:
        return tables[0]
    raise UserError(f"{data_dir}: no captions file ({', '.join(CAPTION_FILES)}, or one .csv); pass --captions-path")


def find_images(data_dir):
    """The folder of a data folder's images. Raises UserError where there is none."""
    for name in IMAGE_FOLDERS:
        for folder in [Path(data_dir) / name, Path(data_dir) / name / name]:  # the original archive nests it
            if folder.is_dir() and not (folder / name).is_dir():
                return folder
    raise UserError(f"{data_dir}: no folder {' or '.join(IMAGE_FOLDERS[:2])}; pass --image-path")


def read_captions(path):
    """Reads a captions file of any known layout.

    Returns (rows, bad, splits): rows is a list of (row number, image, caption), with row numbers from 1 as in an editor;
    bad is a list of (row number, what is wrong); splits is {image: split} where the file has splits.
    Raises UserError where the file cannot be read or has no image and caption columns.
    """
    text = read_text(path, "--captions-path")
    if Path(path).suffix == ".json":
        return read_karpathy(path, text)
    rows = read_token(text) if re.match(r"[^\t\n]+#\d+\t", text) else read_table(path, text)
    good = [(number, *fields) for number, fields in rows if isinstance(fields, tuple) and all(fields)]
    bad = [
        (number, fields if isinstance(fields, str) else f"empty {'caption' if fields[0] else 'file name'}")
        for number, fields in rows
        if not (isinstance(fields, tuple) and all(fields))
    ]
    return good, bad, {}


def read_token(text):
    """Flickr8k.token.txt, lines of `name#number<TAB>caption`, as [(row, (image, caption) or what is wrong)]."""
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        name, tab, caption = line.partition("\t")
        image = name.rpartition("#")[0].strip()
        # The published file has five rows whose name ends in .jpg.1; that image was never published.
        if line.strip() and not re.search(r"\.jpg\.\d$", image):
            rows.append((number, (image, caption.strip()) if tab else "no tab between name and caption"))
    return rows


def table_rows(path, text, delimiter):
    """Yields (row number, fields) of a table's rows.

    With tabs or bars each line is a row: such tables are mostly written without quoting, and a single quotation mark in a
    caption must not swallow the rows after it. Raises UserError for wrong quoting in a table with commas or semicolons.
    """
    if delimiter in "\t|":
        for number, line in enumerate(re.split("\r\n|\r|\n", text), start=1):
            try:
                yield number, next(csv.reader([line], delimiter=delimiter, strict=True), [])
            except csv.Error:  # the quotation marks belong to the caption
                yield number, line.split(delimiter)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{path}, row {reader.line_num}: {error}") from None


def read_table(path, text):
    """A table with a header that names an image and a caption column, as [(row, (image, caption) or what is wrong)]."""
    header_line = text.split("\n", 1)[0]
    delimiter = max(",;\t|", key=header_line.count)
    rows, header = [], None
    for number, fields in table_rows(path, text, delimiter):
        if header is None:
            header = [name.strip().lower() for name in fields]
            image_column = next((header.index(name) for name in IMAGE_COLUMNS if name in header), None)
            caption_column = next((header.index(name) for name in CAPTION_COLUMNS if name in header), None)
            if image_column is None or caption_column is None:
                columns = ", ".join(header)[:80] or "nothing"
                raise UserError(f"{path}, row 1: no image and caption columns, only {columns}; write image,caption there")
        elif any(re.search(SWALLOWED_ROW, field, re.IGNORECASE) for field in fields):
            rows.append((number, "a quotation mark that is not closed before the next row begins"))
        elif len(fields) == len(header):
            rows.append((number, (fields[image_column].strip(), fields[caption_column].strip())))
        elif fields:
            problem = f"{len(fields)} fields where the header has {len(header)}"
            rows.append((number, f"{problem} (quote captions that contain {delimiter!r})"))
    if header is None:
        raise UserError(f"{path}: empty; write a header image,caption and one row per caption")
    return rows


def read_karpathy(path, text):
    """dataset_flickr8k.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}; returns what `read_captions` does."""
    try:
        images = json.loads(text)["images"]
        splits = {image["filename"]: image["split"].replace("restval", "train") for image in images}
        invalid = {name: split for name, split in splits.items() if not isinstance(name, str) or split not in SPLIT_LISTS}
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
    """{image: split} of the official lists in a folder (`Flickr_8k.trainImages.txt`, ...); empty where there are none.

    Raises UserError where an image is in two lists.
    """
    splits = {}
    for split, ending in SPLIT_LISTS.items():
        for path in sorted(Path(folder).glob(f"*{ending}")):
            for name in filter(None, map(str.strip, read_text(path).splitlines())):
                if splits.setdefault(name, split) != split:
                    raise UserError(f"{path}: {name} is in the list for {splits[name]}, too; remove it from one")
    return splits


def find_splits(images, folders, splits_in_captions_file):
    """{image: split}, from the first of: official lists, Karpathy's JSON, a hash of the image's name.

    With lists for training but none for validation, a tenth of the training images is used for validation.
    """
    folders = [inner for folder in folders for inner in (Path(folder), Path(folder) / "Flickr8k_text")]
    candidates = [splits for splits in map(listed_splits, folders) if splits] + [splits_in_captions_file]
    candidates += [
        read_karpathy(path, read_text(path))[2] for path in (f / "dataset_flickr8k.json" for f in folders) if path.is_file()
    ]
    splits = next((splits for splits in candidates if splits), None)
    if splits is None:
        return {image: hashed_split(image) for image in images}
    if "val" not in splits.values():
        train = [image for image, split in splits.items() if split == "train"]
        splits = splits | {image: "val" for image in train if hashed_split(image) == "val"}
    return splits


def load_captions(data_dir="", image_path="", captions_path="", skip_bad=False):
    """Reads a data folder.

    data_dir: a folder with a captions file and a folder of images; captions_path and image_path: these two, if elsewhere.
    skip_bad: leave out rows without a caption, a file name or a file, instead of raising.

    Returns (table, image_dir, skipped): a DataFrame with the columns image, caption and split ("train", "val", "test",
    or "" for an image that is in no list), the folder of the images, and a list of lines, one for each row or image left out.
    Raises UserError for anything that cannot be used.
    """
    captions_path = Path(captions_path) if captions_path else find_captions(data_dir)
    image_dir = Path(image_path) if image_path else find_images(data_dir or captions_path.parent)
    if not image_dir.is_dir():
        raise UserError(f"{image_dir}: no such folder; --image-path must be the folder of the images")
    rows, bad, splits = read_captions(captions_path)
    if bad and not skip_bad:
        examples = "; ".join(f"row {number}: {problem}" for number, problem in bad[:NUM_SHOWN])
        raise UserError(f"{captions_path}: {len(bad)} unusable rows ({examples}); fix them or pass --skip-bad")
    files = {path.relative_to(image_dir).as_posix() for path in image_dir.rglob("*") if path.is_file()}
    missing = sorted({image for _, image, _ in rows if image not in files})
    if missing and not skip_bad:
        examples = ", ".join(missing[:NUM_SHOWN])
        raise UserError(
            f"{captions_path}: {len(missing)} of its images are not in {image_dir} ({examples}); "
            "check --image-path or pass --skip-bad"
        )
    table = pd.DataFrame(rows, columns=["row", "image", "caption"]).drop(columns="row")
    table = table[table["image"].isin(files)].reset_index(drop=True)
    if table.empty:
        raise UserError(f"{captions_path}: no caption of an image in {image_dir}")
    splits = find_splits(table["image"], [image_dir.parent, captions_path.parent], splits)
    table["split"] = table["image"].map(splits).fillna("")
    skipped = [f"{captions_path}, row {number}: {problem}" for number, problem in bad]
    return table, image_dir, skipped + [f"{image_dir / image}: no such file" for image in missing]


def image_digests(table):
    """{image: a digest of its name and its captions}; the name alone, such as 1.jpg, occurs in many data sets."""
    return {image: cache_key(image, sorted(set(captions))) for image, captions in table.groupby("image")["caption"]}


def write_splits(path, table):
    """Writes a run's splits.csv: name, split and digest of each image. table: what `load_captions` returns."""
    splits = table.groupby("image", as_index=False)["split"].first()
    splits["digest"] = splits["image"].map(image_digests(table))
    atomic_write(path, lambda temporary: splits.to_csv(temporary, index=False))


def training_images(path, table):
    """The set of a table's images that a run was trained on. path: the run's splits.csv.

    Raises UserError where it is missing or damaged.
    """
    try:
        splits = pd.read_csv(path, dtype=str, keep_default_na=False)
        trained = set(splits.loc[splits["split"] == "train", "digest"])
    except (OSError, ValueError, KeyError) as error:
        problem = f"{path}: missing or damaged ({type(error).__name__})"
        raise UserError(f"{problem}; it lists the run's training images, so train the run again") from None
    return {image for image, digest in image_digests(table).items() if digest in trained}


def load_generated(folder, table):
    """The pairs of a folder that GAN.py wrote, as rows of the training split; image is an absolute path.

    table: what `load_captions` returns. Raises UserError where the folder has no pairs, or a caption that is not a training
    caption: it was generated for other data, or validation or test captions would get into training.
    """
    generated, image_dir, _ = load_captions(folder)
    unknown = generated.loc[~generated["caption"].isin(table.loc[table["split"] == "train", "caption"]), "caption"]
    if len(unknown):
        raise UserError(
            f"--extra-data {folder}: {len(unknown)} of its {len(generated)} captions are not training captions of this data "
            f"set ({unknown.iloc[0][:60]!r}); generate it again with GAN.py, from a run on this data set"
        )
    return generated.assign(image=[str(image_dir.resolve() / name) for name in generated["image"]], split="train")
