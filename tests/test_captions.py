"""Caption files of every layout, splits, and what is said of bad ones."""

import json
import random

import pytest

from captions import load_captions
from loading.splits import hashed_split
from utils.errors import UserError

PAIRS = [(f"{i}.jpg", f"caption {j} of picture {i} , with a comma") for i in range(20) for j in range(1 + i % 3)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Images").mkdir()
    for name, _ in PAIRS:
        (tmp_path / "Images" / name).touch()
    return tmp_path


def as_csv(header="image,caption", delimiter=","):
    return "\n".join([header, *(f'{name}{delimiter}"{caption}"' for name, caption in PAIRS)]) + "\n"


def as_karpathy():
    names = sorted({name for name, _ in PAIRS})
    images = [
        {
            "filename": name,
            "split": ["train", "val", "test", "restval"][i % 4],
            "sentences": [{"raw": caption} for other, caption in PAIRS if other == name],
        }
        for i, name in enumerate(names)
    ]
    return json.dumps({"images": images})


def as_token():
    numbered = "".join(f"{name}#{j}\t{caption}\n" for j, (name, caption) in enumerate(PAIRS))
    return numbered + "2258277193_586949ec62.jpg.1#0\tan unpublished picture\n"


LAYOUTS = {
    "captions.txt": as_csv(),
    "captions.csv": as_csv("﻿image,caption"),  # as Excel saves it, with a byte order mark
    "Flickr8k.token.txt": as_token(),
    "dataset_flickr8k.json": as_karpathy(),
    "results.csv": as_csv("image_name| comment", "|"),
    "own.csv": as_csv("Filename;Text", ";"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_table(folder, name):
    (folder / name).write_text(LAYOUTS[name], encoding="utf-8")
    table, image_dir, skipped = load_captions(folder)
    assert sorted(zip(table["image"], table["caption"])) == sorted(PAIRS)
    assert image_dir == folder / "Images" and skipped == []
    assert set(table["split"]) == {"train", "val", "test"}


def test_image_and_captions_path_need_no_data_dir(folder, tmp_path):
    (folder / "words.tsv").write_text(as_csv("path\tsentence", "\t"), encoding="utf-8")
    (folder / "Images").rename(folder / "pictures")
    table, _, _ = load_captions(captions_path=folder / "words.tsv", image_path=folder / "pictures")
    assert len(table) == len(PAIRS)


def test_a_name_has_the_same_split_whatever_other_images_there_are(folder):
    """In Kaggle's layout, without lists, one file less moves no other image."""
    (folder / "captions.txt").write_text(as_csv(), encoding="utf-8")
    before = dict(load_captions(folder)[0][["image", "split"]].to_numpy())
    (folder / "captions.txt").write_text("\n".join(line for line in as_csv().splitlines() if not line.startswith("7.jpg")))
    after = dict(load_captions(folder)[0][["image", "split"]].to_numpy())
    assert set(before) - set(after) == {"7.jpg"} and after.items() <= before.items()


def test_no_image_stands_in_two_splits_under_shuffled_rows(folder):
    header, *rows = as_csv().splitlines()
    random.Random(1).shuffle(rows)
    (folder / "captions.txt").write_text("\n".join([header, *rows]), encoding="utf-8")
    table, _, _ = load_captions(folder)
    assert table.groupby("image")["split"].nunique().max() == 1


def test_official_lists_win_and_leave_images_out(folder):
    (folder / "captions.txt").write_text(as_csv(), encoding="utf-8")
    (folder / "dataset_flickr8k.json").write_text(as_karpathy(), encoding="utf-8")
    (folder / "Flickr8k_text").mkdir()
    for ending, names in {"train": range(10), "dev": range(10, 14), "test": range(14, 18)}.items():
        listed = "".join(f"{i}.jpg\n" for i in names)
        (folder / "Flickr8k_text" / f"Flickr_8k.{ending}Images.txt").write_text(listed)
    table, _, _ = load_captions(folder)
    splits = dict(zip(table["image"], table["split"]))
    assert [splits[f"{i}.jpg"] for i in (0, 9, 10, 13, 14, 17, 18, 19)] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2 + [""] * 2


def test_karpathy_splits_serve_another_captions_file(folder):
    (folder / "captions.txt").write_text(as_csv(), encoding="utf-8")
    (folder / "dataset_flickr8k.json").write_text(as_karpathy(), encoding="utf-8")
    table, _, _ = load_captions(folder)
    expected = {image["filename"]: image["split"].replace("restval", "train") for image in json.loads(as_karpathy())["images"]}
    assert dict(zip(table["image"], table["split"])) == expected


def test_validation_comes_from_training_where_no_list_names_it(folder):
    (folder / "captions.txt").write_text(as_csv(), encoding="utf-8")
    (folder / "my.trainImages.txt").write_text("".join(f"{i}.jpg\n" for i in range(20)))
    table, _, _ = load_captions(folder)
    validation = {name for name in table["image"] if hashed_split(name) == "val"}
    assert set(table["image"][table["split"] == "val"]) == validation and 0 < len(validation) < 5


@pytest.mark.parametrize("delimiter", ["\t", "|"])
def test_a_single_quotation_mark_between_tabs_or_bars_swallows_no_row(folder, delimiter):
    rows = [
        ("1.jpg", '"a dog', '"a dog'),
        ("2.jpg", 'a cat"', 'a cat"'),
        ("3.jpg", f'"a bird{delimiter} or two"', f"a bird{delimiter} or two"),
        ("4.jpg", '"a ""big"" fish"', 'a "big" fish'),
        ("5.jpg", 'a 5" pipe', 'a 5" pipe'),
    ]
    lines = [f"image{delimiter}caption", *(f"{name}{delimiter}{written}" for name, written, _ in rows)]
    (folder / "captions.txt").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    table, _, skipped = load_captions(folder)
    assert list(zip(table["image"], table["caption"])) == [(name, caption) for name, _, caption in rows] and skipped == []


def test_a_row_that_a_quotation_mark_between_commas_swallows_is_named(folder):
    text = 'image,caption\n1.jpg,"a dog\n2.jpg,a cat"\n3.jpg,"a bird\non two lines"\n'
    (folder / "captions.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="row 2: a quotation mark that is not closed before the next row"):
        load_captions(folder)
    table, _, _ = load_captions(folder, skip_bad=True)
    assert list(table["caption"]) == ["a bird\non two lines"]


BAD = {
    "no columns": ("picture,words\na.jpg,b\n", "row 1"),
    "empty caption": (as_csv() + '1.jpg,""\n', "row 41: empty caption"),
    "empty name": (as_csv() + ',"a dog"\n', "row 41: empty file name"),
    "unquoted comma": (as_csv() + '1.jpg,"a dog", running\n', "row 41: 3 fields"),
    "missing file": (as_csv() + "nowhere.jpg,a dog\n", "nowhere.jpg"),
    "empty file": ("", "captions.txt"),
    "only a header": ("image,caption\n", "no caption"),
}


@pytest.mark.parametrize("problem", BAD)
def test_bad_files_are_named_in_one_line(folder, problem):
    text, expected = BAD[problem]
    (folder / "captions.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=expected) as error:
        load_captions(folder)
    assert "captions.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("problem", ["empty caption", "empty name", "unquoted comma", "missing file"])
def test_skip_bad_drops_and_lists(folder, problem):
    (folder / "captions.txt").write_text(BAD[problem][0], encoding="utf-8")
    table, _, skipped = load_captions(folder, skip_bad=True)
    assert sorted(zip(table["image"], table["caption"])) == sorted(PAIRS)
    assert len(skipped) == 1


@pytest.mark.parametrize("missing", ["nan", "None", "null", "NA"])
def test_what_programs_write_for_a_missing_caption_is_none(folder, missing):
    (folder / "captions.txt").write_text(f"image,caption\n1.jpg,{missing}\n2.jpg,none of them\n", encoding="utf-8")
    assert list(load_captions(folder, skip_bad=True)[0]["caption"]) == ["none of them"]


@pytest.mark.parametrize("raw", [b"\xff\xfeimage", b'image,caption\n1.jpg,"never closed'])
def test_files_that_are_no_utf8_table_are_refused(folder, raw):
    (folder / "captions.txt").write_bytes(raw)
    with pytest.raises(UserError, match=r"captions\.txt"):
        load_captions(folder)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(UserError, match="--data-dir"):
        load_captions(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--captions-path"):
        load_captions(tmp_path)
    (tmp_path / "captions.txt").write_text("image,caption\n1.jpg,a dog\n")
    with pytest.raises(UserError, match="--image-path"):
        load_captions(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        '{"images": [{"filename": "1.jpg", "split": "holdout", "sentences": [{"raw": "a dog"}]}]}',
        '{"images": [{"filename": 1, "split": "train", "sentences": [{"raw": "a dog"}]}]}',
        '{"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": null}]}]}',
    ],
)
def test_json_of_another_layout_is_refused(folder, text):
    (folder / "dataset_flickr8k.json").write_text(text)
    with pytest.raises(UserError, match="layout of Karpathy"):
        load_captions(folder)
