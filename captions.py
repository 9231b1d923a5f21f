"""Captions files of any layout (`loading/captions_files.py`) to one table of (image, caption, split)."""

import re
from pathlib import Path

import pandas as pd

from loading.captions_files import find_captions, find_images, read_files
from loading.names import Names
from loading.splits import find_splits, some
from utils.errors import UserError


def image_positions(table):
    """A table's image names in the order of their first captions, and each row's position among them, (m,)."""
    positions, names = table["image"].factorize()
    return list(names), positions


ENGLISH = {"the", "with", "and", "of", "at", "are", "is", "to", "on", "through", "near", "while", "his", "their", "there"}
ENGLISH |= {"wearing", "red", "blue", "white", "black"}
NUM_SHOWN = 3  # bad rows or files listed in an error; the others are counted


def mentions_left_or_right(caption):
    """True where an English caption mentions left or right, so that it may be wrong for the flipped image."""
    return re.search(r"\b(left|right)", caption, re.IGNORECASE) is not None


def is_english(captions):
    """Whether captions are in English: at least a tenth of their words are common in English captions alone."""
    words = [word for caption in captions for word in re.findall(r"\w+", caption.lower())]
    return 10 * sum(word in ENGLISH for word in words) >= len(words)


def may_be_sided(captions):
    """Whether captions may say left or right in another language than English; a line then says that --hflip is off."""
    if is_english(captions):
        return False
    print(
        "--hflip: off, as the captions are not English, and may say left or right; --flip-left-right flips anyway", flush=True
    )
    return True


def load_captions(data_dir="", image_path="", captions_path="", skip_bad=False, columns=("", "")):
    """Reads a data folder.

    data_dir: a folder with a captions file and a folder of images; captions_path and image_path: these two, if elsewhere.
    skip_bad: leave out rows without a caption, a file name or a file, instead of raising.
    columns: (image, caption), the names of a table's columns; empty: those that are found.

    Returns (table, image_dir, skipped): a DataFrame with the columns image, caption and split ("train", "val", "test",
    or "" for an image that is in none), the folder of the images, and a list of lines, one for each row or image left out.
    The table's attrs["split"] is a `loading.splits.SplitNotes`. A row that stands twice is left out once.
    Raises UserError for anything that cannot be used.
    """
    paths = [Path(captions_path)] if captions_path else find_captions(data_dir)
    where, base = paths[0] if len(paths) == 1 else paths[0].parent, Path(data_dir or paths[0].parent)
    image_dir = Path(image_path) if image_path else find_images(base)
    if not image_dir.is_dir():
        raise UserError(f"{image_dir}: no such folder; --image-path must be the folder of the images")
    names = Names(image_dir, paths[0].parent if len(paths) == 1 else base)
    read = read_files(paths, columns, names)
    if read.bad and not skip_bad:
        examples = "; ".join(f"row {number}: {problem}" for number, problem in read.bad[:NUM_SHOWN])
        raise UserError(f"{where}: {len(read.bad)} unusable rows ({examples}); fix them or pass --skip-bad")
    written = list(dict.fromkeys(image for _, image, _ in read.rows))
    names.drop_ambiguous(written)
    files = {name: names.find(name) for name in written}
    missing = sorted(name for name, file in files.items() if not file)
    if missing:
        examples = ", ".join(name + names.near(name) for name in missing[:NUM_SHOWN])
        problem = f"{where}: {len(missing)} of its {len(files)} images are not in {image_dir} ({examples})"
        if not skip_bad:
            raise UserError(f"{problem}; check --image-path or pass --skip-bad")
        print(problem, flush=True)
    print("".join(f"{line}\n" for line in read.notes + names.lines(where, written)), end="", flush=True)
    table = pd.DataFrame(read.rows, columns=["row", "image", "caption"])
    table = table.assign(image=table["image"].map(files))[table["image"].map(files).notna()]
    repeated = table[table.duplicated(["image", "caption"])]
    table = table.drop(repeated.index).drop(columns="row").reset_index(drop=True)
    if table.empty:
        raise UserError(f"{where}: no caption of an image in {image_dir}")
    stated = {files.get(name) or name: split for name, split in read.splits.items()}
    splits, notes = find_splits(table["image"], [image_dir.parent, paths[0].parent], stated, read.rule)
    table["split"] = table["image"].map(splits)
    notes.notes += uncaptioned(table["image"], names.files, image_dir)
    table.attrs["split"] = notes
    skipped = [f"{where}, row {number}: {problem}" for number, problem in read.bad]
    skipped += [f"{image_dir / image}: no such file" for image in missing]
    skipped += [f"{where}, row {row}: {image} has this caption already" for row, image, _ in repeated.to_numpy()]
    return table, image_dir, skipped


def uncaptioned(images, files, image_dir):
    """A line on the files that look like the images of a table, but that no caption names; no line without any."""
    endings = {Path(image).suffix for image in images}
    names = sorted(name for name in files - set(images) if Path(name).suffix in endings)
    return [f"{len(names):,} pictures in {image_dir} have no caption, and are not used: {some(names)}"] if names else []


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
