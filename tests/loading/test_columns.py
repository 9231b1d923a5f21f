"""Which columns are read, and the captions of a row: the rule that captions files, tar files and parquet share."""

import numpy as np
import pytest

from loading.columns import caption_columns, captions_in_cell, captions_in_row, image_column

TWO = ["a dog runs .", 'two "big" dogs, it\'s fun']
CELLS = {
    "a caption": ("  a dog ", ["a dog"]),
    "in brackets": ("[laughs] a dog", ["[laughs] a dog"]),
    "all in brackets": ("[a dog]", ["[a dog]"]),
    "in parentheses": ("(a dog)", ["(a dog)"]),
    "JSON": ('["a dog runs .", "two \\"big\\" dogs, it\'s fun"]', TWO),
    "JSON, other letters": ('["\\u0915", "b"]', ["क", "b"]),
    "Python": (str(TWO), TWO),
    "a Python tuple": (str(tuple(TWO)), TWO),
    "NumPy": ("['a dog' 'a cat'\n 'a bird']", ["a dog", "a cat", "a bird"]),
    "Karpathy's sentences": (str([{"tokens": ["a", "dog"], "raw": "A dog .", "sentid": 1}, {"raw": "b"}]), ["A dog .", "b"]),
    "a list": (TWO, TWO),
    "an array": (np.array(TWO, dtype=object), TWO),
    "records": ([{"caption": "a dog"}, {"text": "a cat"}], ["a dog", "a cat"]),
    "numbers": ("[1, 2]", ["[1, 2]"]),
    "an empty list": ("[]", []),
    "nothing": ("  ", []),
    "None": (None, []),
    "not a number": (float("nan"), []),
    "pandas' nan": ("nan", []),
    "pandas' None": ("None", []),
    "null": ("null", []),
    "missing ones in a list": (["a dog", None, "nan", ""], ["a dog"]),
    "none as a word": ("none of them", ["none of them"]),
    "a deep nest": ("[" * 5000 + "]", ["[" * 5000 + "]"]),
}


@pytest.mark.parametrize("kind", CELLS)
def test_the_captions_of_a_cell(kind):
    cell, captions = CELLS[kind]
    assert captions_in_cell(cell) == captions


@pytest.mark.parametrize(
    ("names", "image", "captions"),
    [
        (["image", "caption"], "image", ["caption"]),
        (["Image Name", "Caption"], "Image Name", ["Caption"]),
        (["image", "caption", "caption2", "caption3"], "image", ["caption", "caption2", "caption3"]),
        (["id", "file", "caption_1", "caption_2"], "file", ["caption_1", "caption_2"]),
        (["filepath", "title"], "filepath", ["title"]),
        (["photo", "caption 1", "Caption-2"], "photo", ["caption 1", "Caption-2"]),
        (["image_name", "comment_number", "comment"], "image_name", ["comment"]),
        (["image_id", "caption_id", "sentences", "split"], "image_id", ["sentences"]),
        (["a", "b"], None, []),
    ],
)
def test_the_columns_of_a_table(names, image, captions):
    assert image_column(names) == image and caption_columns(names) == captions


def test_a_column_that_is_named_is_the_only_one():
    assert caption_columns(["image", "caption", "caption2", "de"], "DE") == ["de"]
    assert image_column(["image", "other"], "other") == "other"
    assert caption_columns(["image", "caption"], "nowhere") == []


def test_the_captions_of_a_row_come_in_the_order_of_its_columns():
    row = {"image": "0.jpg", "caption": "a", "caption2": '["b", "c"]', "caption3": None}
    assert captions_in_row(row, ["caption", "caption2", "caption3"]) == ["a", "b", "c"]
