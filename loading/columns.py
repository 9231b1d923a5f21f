"""Which columns of a table hold images and captions, and the captions in a row or a cell: one rule for all readers."""

import ast
import json
import re

IMAGE_COLUMNS = ["image", "image_name", "filename", "file_name", "file", "image_path", "path"]
IMAGE_COLUMNS += ["filepath", "file_path", "image_file", "image_filename", "img", "img_path", "photo", "picture", "jpg"]
IMAGE_COLUMNS += ["photo_id", "picture_id", "image_id", "img_id", "key", "id"]  # of images whose names are ids
CAPTION_COLUMNS = ["caption", "comment", "caption_text", "text", "sentence", "description", "title"]
CAPTION_COLUMNS += ["captions", "comments", "texts", "sentences", "descriptions", "titles"]  # with several in a cell
CAPTION_COLUMNS += ["raw", "prompt", "alt_text", "alt"]
MISSING = {"nan", "NaN", "None", "null", "NULL", "<NA>", "NA", "N/A", "#N/A"}  # how programs write a caption that is missing
QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""  # a string as Python and NumPy print it
PRINTED_LIST = re.compile(rf"[\[(]\s*{QUOTED}(?:\s*,?\s*{QUOTED})*\s*,?\s*[\])]", re.DOTALL)


def plain_column(name):
    """A column's name without what differs from one table to the next: "Image Name" is image_name."""
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def image_column(names, wanted=""):
    """The name of the image column, or None. names: of all columns; wanted: the one that a user named, if any."""
    return find_column(names, [wanted] if wanted else IMAGE_COLUMNS)


def caption_columns(names, wanted=""):
    """The names of the caption columns, one or several such as caption, caption2, caption_3; empty where there are none.

    names: of all columns. wanted: the one that a user named, if any; it is then the only one.
    """
    if wanted:
        return [name for name in [find_column(names, [wanted])] if name is not None]
    for known in CAPTION_COLUMNS:
        if family := [name for name in names if re.fullmatch(rf"{known}_?\d*", plain_column(name))]:
            return family
    return []


def find_column(names, wanted):
    """The first of the wanted names that is among the names of columns, as it is written there, or None."""
    plain = {}
    for name in names:
        plain.setdefault(plain_column(name), name)
    return next((plain[plain_column(name)] for name in wanted if plain_column(name) in plain), None)


def captions_in_row(row, columns):
    """The captions of a row, without empty ones. row: {column: cell}; columns: those with captions, from `caption_columns`."""
    return [caption for column in columns for caption in captions_in_cell(row[column])]


def captions_in_cell(cell):
    """The captions in a cell, without empty ones.

    cell: a caption; a list of captions or of records with a caption (Karpathy's {"raw": ...}); either of these as text, as
    JSON, Python or NumPy write it; or anything else, which is no caption.
    """
    if isinstance(cell, dict):
        return captions_in_row(cell, caption_columns(cell))
    if isinstance(cell, str):
        values = listed_in_text(cell)
        if values is None:
            caption = cell.strip()
            return [caption] if caption and caption not in MISSING else []
        cell = values
    if hasattr(cell, "tolist"):  # an array
        cell = cell.tolist()
    return [caption for value in cell for caption in captions_in_cell(value)] if isinstance(cell, (list, tuple)) else []


def listed_in_text(text):
    """The list that a text is the print of, or None where it is something else, such as a caption in brackets."""
    text = text.strip()
    if text[:1] + text[-1:] not in ("[]", "()"):
        return None
    if PRINTED_LIST.fullmatch(text):  # of NumPy, without commas, Python would join the strings
        return [unquoted(quoted) for quoted in re.findall(QUOTED, text, re.DOTALL)]
    for read in (json.loads, ast.literal_eval):
        try:
            values = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(values, (list, tuple)) and all(isinstance(value, (str, dict, type(None))) for value in values):
            return list(values)
    return None


def unquoted(text):
    """A string from the way in which JSON, Python or NumPy print it."""
    try:
        return json.loads(text) if text[0] == '"' else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text[1:-1]
