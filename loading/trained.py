"""Which pictures a run was trained on: its splits.csv, and how a picture is recognised in it.

A picture is the same if its file has the same bytes, whatever its name and captions; or if name and captions are the same, as
those of a copy that was resized or compressed again. A copy that was changed in both ways is not recognised
(`evaluate.py leaks` compares what pictures show).
"""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from config import is_model_name, is_stream, last_part, load_run
from loading.splits import some, stem
from utils.cache import cache_key, file_stats, write_array
from utils.errors import UserError
from utils.files import atomic_write, digest, read_bytes

SPLITS = "splits.csv"  # in a run folder: the split of each image, and digests that identify it
EARLIER = "earlier"  # in place of a split: trained on by the model that the run started from
UNLISTED = "unlisted"  # likewise, but that model does not say which pictures; image is then what it was trained on
COLUMNS = ["image", "split", "content", "captions"]


# ---- what identifies a picture -----------------------------------------------------------------------------------


def content_digests(paths, num_workers=0, cache_dir=""):
    """(digests, file): the digest of each file's bytes, "" for one that cannot be read, and where they are kept in cache_dir.

    Without cache_dir they are not kept, and file is None. Files are read again once their sizes or times have changed.
    """
    file = Path(cache_dir) / f"contents-{cache_key(file_stats(paths))}.npy" if cache_dir else None
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        if file and len(kept := np.load(file)) == len(paths):
            return kept.tolist(), file

    def read(path):
        try:
            return digest(read_bytes(path)).hex()
        except OSError:
            return ""

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        digests = list(pool.map(read, paths))
    if file:
        with contextlib.suppress(UserError):  # the folder is not writable, which is said where pictures are decoded
            write_array(file, np.array(digests, dtype="U32"))
    return digests, file


def caption_digests(table):
    """{image: digest} of an image's name and captions, regardless of case, punctuation, folders and the name's ending.

    "" where another image has the same captions: what is short, such as the names of classes, identifies no picture.
    """
    words = table["caption"].map(lambda caption: " ".join(re.findall(r"\w+", caption.lower())))
    texts = {image: tuple(sorted(set(captions))) for image, captions in words.groupby(table["image"])}
    repeated = pd.Series(list(texts.values())).duplicated(keep=False)
    return {
        image: "" if is_repeated else cache_key(stem(image), captions)
        for (image, captions), is_repeated in zip(texts.items(), repeated)
    }


def with_contents(table, image_dir, num_workers=0, cache_dir=""):
    """A table with the column content, the digests of the images' files. attrs["contents"] is the file where they are kept."""
    positions, names = table["image"].factorize()
    digests, file = content_digests([image_dir / name for name in names], num_workers, cache_dir)
    table = table.assign(content=np.array(digests, dtype=object)[positions])
    table.attrs["contents"] = file
    return table


def old_digests(table):
    """{image: digest} as earlier versions wrote it, of name and captions."""
    return {image: cache_key(image, sorted(set(captions))) for image, captions in table.groupby("image")["caption"]}


# ---- splits.csv --------------------------------------------------------------------------------------------------


def write_splits(path, table, earlier=None):
    """Writes a run's splits.csv. table: with the column content, as of `with_contents`. earlier: rows of `earlier_rows`."""
    rows = table.groupby("image", as_index=False)[["split", "content"]].first()
    rows["captions"] = rows["image"].map(caption_digests(table))
    rows = rows if earlier is None or earlier.empty else pd.concat([rows, earlier], ignore_index=True)
    atomic_write(path, lambda temporary: rows.to_csv(temporary, index=False))


def read_splits(run):
    """A run's splits.csv, with strings only. Earlier versions wrote image, split and digest: `is_old`.

    Raises UserError where it is missing or damaged.
    """
    path = Path(run) / SPLITS
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
        return rows[["image", "split", "digest"] if is_old(rows) else [*COLUMNS, *rows.columns.intersection(["digest"])]]
    except (OSError, ValueError, KeyError) as error:
        problem = f"{path}: missing or damaged ({type(error).__name__})"
        raise UserError(f"{problem}; it lists the run's training images, so train the run again") from None


def is_old(rows):
    """Whether a splits.csv is of an earlier version, which knew a picture by name and captions only."""
    return "content" not in rows


def recognised(rows, table):
    """The images of a table that are among some rows of a splits.csv: (by their bytes, by name and captions), two sets.

    table: with the column content, as of `with_contents`.
    """
    by_content = set()
    if not is_old(rows):
        by_content = set(table["image"][table["content"].isin(set(rows["content"]) - {""})])
    by_captions = set()
    for column, digests in (("captions", caption_digests), ("digest", old_digests)):
        known = set(rows[column]) - {""} if column in rows else set()
        if known:
            by_captions |= {image for image, key in digests(table).items() if key in known}
    return by_content, by_captions - by_content


def trained_rows(rows, own=False):
    """The rows of a splits.csv that a run was trained on; own: without what the model that it started from was trained on."""
    return rows[rows["split"].isin(["train"] if own else ["train", EARLIER])]


def earlier_rows(model, run_dir, is_resumed):
    """Rows for splits.csv of what the model that a run starts from was trained on. model: what --model names.

    A run that is resumed has them in its own splits.csv, as the model's folder may be gone.
    """
    with contextlib.suppress(UserError):
        own = read_splits(run_dir) if is_resumed else None
        if own is not None and not is_old(own):
            return own[own["split"].isin([EARLIER, UNLISTED])]
    if not model or is_model_name(model):
        return pd.DataFrame(columns=COLUMNS)
    data = load_run(model)["config"].data_dir
    unlisted = [last_part(data)] if is_stream(data) else []
    parts = []
    try:
        rows = read_splits(model)
        parts = [trained_rows(rows).assign(split=EARLIER), rows[rows["split"] == UNLISTED]]
    except UserError:
        unlisted.append(last_part(model))
    parts.append(pd.DataFrame({"image": unlisted, "split": UNLISTED}))
    parts = [part for part in parts if len(part)]  # pandas warns of empty ones
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
    return rows.reindex(columns=[*COLUMNS, *rows.columns.intersection(["digest"])], fill_value="").fillna("")


def unlisted_lines(rows):
    """Lines on what is not known of a run's training pictures. rows: of its splits.csv."""
    lines = [
        f"it started from a model trained on {image}, whose pictures are not listed: see that none of these is among them"
        for image in rows["image"][rows["split"] == UNLISTED].unique()
    ]
    if is_old(rows) and not trained_rows(rows).empty:
        lines.append(
            "this run is of an earlier version: its training pictures are recognised by name and captions, not where these "
            "have changed"
        )
    return lines


# ---- leaving out -------------------------------------------------------------------------------------------------


def without_trained(table, earlier, model):
    """A table whose validation and test images are none that were trained on; those that were are in no split, "".

    table: with the column content. earlier: rows of `earlier_rows`. model: where these come from.
    Returns (table, lines about what was left out). Raises UserError where no validation image would remain of those that the
    earlier model was not trained on. If all are copies of training images, they stay.
    """
    lines = [line for line in unlisted_lines(earlier) if not earlier.empty]
    table = table.copy()
    seen = set.union(*recognised(trained_rows(earlier), table)) if len(earlier) else set()
    own = set(table["content"][table["split"] == "train"]) - {""}
    copies = set(table["image"][table["content"].isin(own)])
    for images, why in ((seen, f"{model} was trained on"), (copies, "are copies of training images under another name")):
        for split, name in (("val", "validation"), ("test", "test")):
            is_in, is_out = table["split"] == split, (table["split"] == split) & table["image"].isin(images)
            out = sorted(set(table["image"][is_out]))
            if not out:
                continue
            count = f"{len(out):,} of {table['image'][is_in].nunique():,} {name} images, which {why}"
            if split == "val" and is_out.sum() == is_in.sum():
                if images is seen:
                    raise UserError(
                        f"--model {model}: it was trained on all of the {len(out):,} validation images ({some(out)}), so no "
                        f"score on them is true; use the split of that run, or other validation images"
                    )
                lines.append(f"{count}: all stay, but a score on them is none on new images")
                continue
            table.loc[is_out, "split"] = ""
            lines.append(f"left out: {count} ({some(out)})")
    return table, lines
