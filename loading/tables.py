"""Rows of a table with commas, semicolons, tabs or bars, whatever its quotation marks."""

import csv
import re

from loading.columns import caption_columns, image_column, plain_column
from utils.errors import UserError
from utils.formats import PICTURE_ENDINGS

MAX_RECORD = 131_072  # characters of a row; more are a quotation mark that is never closed
UNCLOSED = "unexpected end of data"  # csv's message


def parse(record, delimiter, skip_spaces=True):
    """The fields of a row. Raises csv.Error for wrong quoting."""
    return next(csv.reader([record], delimiter=delimiter, strict=True, skipinitialspace=skip_spaces), [])


def split_row(record, delimiter):
    """(fields, what is wrong or "") of one line, or of lines that a quotation mark joins."""
    if len(record) > MAX_RECORD:
        return [], f"{len(record):,} characters, more than a caption has"
    try:
        return parse(record, delimiter, skip_spaces=delimiter in ",;"), ""
    except csv.Error as error:
        problem = str(error)
    if delimiter in "\t|":  # such tables are mostly written without quoting: the quotation marks belong to the caption
        return record.split(delimiter), ""
    try:  # a space before the mark makes it a part of the caption
        return parse(record, delimiter, skip_spaces=False), ""
    except csv.Error:
        return [], UNCLOSED if problem == UNCLOSED else 'wrong quotation marks (within a quoted caption, double each: "")'


def split_rows(text, delimiter, is_row):
    """Yields (row number, fields, what is wrong or "") of a table; numbers are those of lines, as in an editor.

    Lines that a quotation mark joins are one row. is_row(line): whether a line within it is a row of its own, so that the mark
    is one that was not closed; that row alone is then wrong, and reading goes on after it.
    """
    lines, start = text.split("\n"), 0
    unclosed = False  # whether a mark is still open, whose partner may end a later row
    while start < len(lines):
        end, record = start + 1, lines[start]
        fields, problem = split_row(record, delimiter)
        parts, quotes, length = [record], record.count('"'), len(record)
        while problem == UNCLOSED and end < len(lines) and not is_row(lines[end]) and length <= MAX_RECORD:
            parts.append(lines[end])
            quotes, length, end = quotes + lines[end].count('"'), length + len(lines[end]) + 1, end + 1
            if quotes % 2 == 0:
                fields, problem = split_row("\n".join(parts), delimiter)
        if problem:
            if problem == UNCLOSED:
                problem, unclosed = "a quotation mark that is not closed before the next row begins", True
            end = start + 1
        elif unclosed and quotes % 2 and record.rstrip().endswith('"'):
            problem, unclosed = "closes a quotation mark of a row before", False
        if problem or any(field.strip() for field in fields):
            yield start + 1, fields, problem
        start = end


def read_table(path, text, columns, is_picture):
    """(header, rows, notes) of a table. rows: [(row number, fields, what is wrong or "")]; notes: lines on how it was read.

    columns: (image, caption) as `columns.image_column` takes them. is_picture(name): whether the folder has such a picture.
    Raises UserError where there is no image or caption column.
    """
    first = next(filter(str.strip, text.split("\n")), "")
    delimiter = max(",;\t|", key=first.count)
    header, image, captions, notes = None, 0, [], []

    def names_picture(field):
        return field.strip().lower().endswith(tuple(PICTURE_ENDINGS)) or is_picture(field.strip())

    def is_row(line):
        fields, _ = split_row(line.replace('"', ""), delimiter)
        cell = fields[image] if header and len(fields) >= len(header) else ""
        prose = delimiter in ",;" and f"{delimiter} " in line and f"{delimiter} " not in first
        return bool(cell.strip()) and not prose and is_picture(cell.strip())

    rows, joined, lines = [], [], text.split("\n")
    for number, fields, problem in split_rows(text, delimiter, is_row):
        if header is None:
            header, is_data = table_header(path, fields, number, columns, names_picture)
            image = header.index(image_column(header, columns[0]))
            captions = [header.index(name) for name in caption_columns(header, columns[1])]
            if not is_data:
                continue
            notes.append(f"{path}: no header; its column {image + 1} was taken for the images")
        if not problem and len(fields) != len(header):
            line = lines[number - 1]
            fields = fields if '"' in line else line.split(delimiter)
            read = join_caption(fields, len(header), image, captions, delimiter, names_picture)
            if read and '"' not in line:
                fields, joined = read, [*joined, number]
            else:
                noun = "field" if len(fields) == 1 else "fields"
                problem = f"{len(fields)} {noun} where the header has {len(header)} (quote captions that contain {delimiter!r})"
        rows.append((number, fields, problem))
    if header is None:
        raise UserError(f"{path}: empty; write a header image,caption and one row per caption")
    if joined:
        rest = "before the last" if captions[0] == 0 else f"after the {'first' if len(header) == 2 else 'last expected'}"
        notes.append(
            f"{path}: {len(joined):,} captions contain {delimiter!r} without quotation marks (row {joined[0]}); all {rest} one "
            "was taken for the caption"
        )
    return header, rows, notes


def table_header(path, fields, number, columns, names_picture):
    """(header, whether its row is data): of a table without a header that has two columns, image,caption.

    Raises UserError where there is no image or caption column.
    """
    header = [plain_column(name) for name in fields]
    if image_column(header, columns[0]) is not None and caption_columns(header, columns[1]):
        return header, False
    pictures = [position for position, field in enumerate(fields) if names_picture(field)]
    if len(fields) == 2 and len(pictures) == 1:
        return (["image", "caption"] if pictures == [0] else ["caption", "image"]), True
    shown = ", ".join(header)[:80] or "nothing"
    if pictures:
        raise UserError(
            f"{path}, row {number}: no header, only {shown}; insert a row above it that names the columns: image,caption"
        )
    raise UserError(
        f"{path}, row {number}: no image and caption columns, only {shown}; rename them to image,caption, or name them with "
        "--image-column and --caption-column"
    )


def join_caption(fields, count, image, captions, delimiter, names_picture):
    """The fields of a row whose caption contains the delimiter, joined to as many as the header has; None if that is not plain.

    There is one way to read it where the one caption column is the last, or the first.
    """
    extra = len(fields) - count
    if extra < 1 or captions not in ([0], [count - 1]):
        return None
    if captions == [0]:
        joined = [delimiter.join(fields[: extra + 1]), *fields[extra + 1 :]]
    else:
        joined = [*fields[: count - 1], delimiter.join(fields[count - 1 :])]
        if names_picture(fields[count - 1]) and not re.search(r"\s", fields[count - 1].strip()):
            return None  # a column more before the image, such as a row's number
    return joined if names_picture(joined[image]) else None
