"""Which split an image is in, which rule said so, and what is said of images that are in none."""

import json
import os

import pytest

from captions import load_captions
from Datasets import flickr8k
from loading.official import SIGNATURE, caution, official_splits
from loading.splits import find_splits, hashed_split, split_name
from utils.errors import UserError

NAMES = [f"{i}.jpg" for i in range(20)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(flickr8k, "KAGGLE_INPUT", str(tmp_path / "input"))
    (tmp_path / "data" / "Images").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "data" / "Images" / name).touch()
    (tmp_path / "data" / "captions.txt").write_text("image,caption\n" + "".join(f"{name},picture {name}\n" for name in NAMES))
    return tmp_path / "data"


def write_lists(folder, splits, name="Flickr_8k.{}Images.txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (folder / name.format(split)).write_text("".join(f"{name}\n" for name in names))


def load(folder):
    """({image: split}, what is said of the split)."""
    table, _, _ = load_captions(folder)
    return dict(zip(table["image"], table["split"])), "\n".join(table.attrs["split"].lines())


def write_column(folder, values, column="split"):
    rows = "".join(f"{name},{value},picture {name}\n" for name, value in zip(NAMES, values))
    (folder / "captions.txt").write_text(f"file_name,{column},text\n{rows}")


def test_hashed_splits_are_worked_from_the_name_and_nearly_80_10_10():
    """SHA-1 of 1000268201_693b08cb0e.jpg begins with 8f61, so 0.56 of the way; of 2.jpg, 11.jpg with 0 and 2 (sha1sum)."""
    names = ["1000268201_693b08cb0e.jpg", "2.jpg", "11.jpg"]
    assert list(map(hashed_split, names)) == ["train", "val", "test"]
    splits = [hashed_split(f"{i}.jpg") for i in range(10_000)]
    assert [splits.count(split) for split in ("train", "val", "test")] == pytest.approx([8000, 1000, 1000], abs=120)


@pytest.mark.parametrize("column", ["split", "Split", "partition", "set"])
def test_a_column_gives_the_split_by_any_of_its_names(folder, column):
    values = ["train", "Training", "restval", "val", "valid", "validation", "dev", "test", "testing", " TEST "] * 2
    write_column(folder, values, column)
    splits, said = load(folder)
    assert [splits[name] for name in NAMES] == (["train"] * 3 + ["val"] * 4 + ["test"] * 3) * 2
    assert said == f"split: the column {column.lower()} of captions.txt"


def test_a_set_column_of_something_else_is_no_split(folder):
    write_column(folder, ["A", "B"] * 10, "set")
    splits, said = load(folder)
    assert splits == {name: hashed_split(name) for name in NAMES} and "hash" in said


def test_a_split_column_with_something_else_is_refused_at_its_row(folder):
    write_column(folder, ["train"] * 18 + ["holdout", "val"])
    with pytest.raises(UserError, match=r"captions\.txt, row 20: 'holdout' is no split"):
        load_captions(folder)


def test_an_image_in_two_splits_of_a_column_is_refused(folder):
    with open(folder / "captions.txt", "w") as file:
        file.write("image,caption,split\n0.jpg,a dog,train\n1.jpg,a cat,val\n0.jpg,a big dog,test\n")
    with pytest.raises(UserError, match=r"row 4: 0\.jpg is test here, but train above"):
        load_captions(folder)


def test_an_empty_field_of_the_column_is_counted_and_named(folder):
    write_column(folder, ["train"] * 14 + ["val", "test"] + [""] * 4)
    splits, said = load(folder)
    assert [splits[name] for name in NAMES[14:]] == ["val", "test", "", "", "", ""]
    assert "4 images are in no split there, and are not used: 16.jpg, 17.jpg, 18.jpg and 1 more" in said


def test_a_column_without_validation_takes_a_tenth_of_its_training_images(folder):
    write_column(folder, ["train"] * 18 + ["test"] * 2)
    splits, said = load(folder)
    assert {name for name in NAMES if splits[name] == "val"} == {name for name in NAMES[:18] if hashed_split(name) == "val"}
    assert splits["18.jpg"] == splits["19.jpg"] == "test" and "about a tenth of its training images" in said


def test_the_rule_that_holds_is_said(folder):
    assert load(folder)[1] == "split: by a hash of each image's name, about 80/10/10"
    images = [
        {"filename": name, "split": "val" if i < 4 else "train", "sentences": [{"raw": "x"}]} for i, name in enumerate(NAMES)
    ]
    (folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    splits, said = load(folder)
    assert splits["3.jpg"] == "val" and said == f"split: Karpathy's JSON in {folder} (dataset_flickr8k.json)"
    write_column(folder, ["train"] * 15 + ["val"] * 5)
    splits, said = load(folder)
    assert splits["3.jpg"] == "train" and "column split" in said
    write_lists(folder / "Flickr8k_text", {"train": NAMES[5:], "dev": NAMES[:5]})
    splits, said = load(folder)
    assert splits["3.jpg"] == "val"
    files = "Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt"
    assert said == f"split: official lists in {folder / 'Flickr8k_text'} ({files})"


def test_names_without_folders_endings_or_case_are_those_of_the_images(folder):
    write_lists(folder, {"train": ["0", "IMAGES/1.JPG", "data\\2.jpg", "3.png"], "dev": ["4"], "test": ["5"]})
    splits, _ = load(folder)
    assert [splits[f"{i}.jpg"] for i in range(7)] == ["train"] * 4 + ["val", "test", ""]


def test_a_name_that_two_images_share_is_not_guessed():
    splits, _ = find_splits(["a/1.jpg", "b/1.jpg", "2.jpg"], [], {"1.jpg": "train", "2.jpg": "val"}, "lists")
    assert splits == {"a/1.jpg": "", "b/1.jpg": "", "2.jpg": "val"}


def test_images_that_no_list_names_and_pictures_without_captions_are_counted_and_named(folder):
    write_lists(folder, {"train": NAMES[:10], "dev": NAMES[10:12], "test": NAMES[12:15]})
    for name in ("x.jpg", "y.jpg", "notes.md"):
        (folder / "Images" / name).touch()
    _, said = load(folder)
    assert "5 images are in no split there, and are not used: 15.jpg, 16.jpg, 17.jpg and 2 more" in said
    assert f"2 pictures in {folder / 'Images'} have no caption, and are not used: x.jpg, y.jpg" in said


@pytest.mark.parametrize("place", ["Flickr8k_text", "lists", "Flickr8k_text/Flickr8k_text", "", "input/a/b", "input/a/b/c/d"])
@pytest.mark.parametrize("kind", ["lists", "json"])
def test_lists_are_found_beside_the_data_and_where_kaggle_attaches_them(folder, place, kind):
    place = folder.parent / place
    if kind == "lists":
        write_lists(place, {"train": NAMES[:10], "dev": NAMES[10:15], "test": NAMES[15:]})
    else:
        place.mkdir(parents=True, exist_ok=True)
        split = ["train"] * 10 + ["val"] * 5 + ["test"] * 5
        images = [{"filename": name, "split": split[i], "sentences": []} for i, name in enumerate(NAMES)]
        (place / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    splits, said = load(folder)
    assert [splits[name] for name in NAMES] == ["train"] * 10 + ["val"] * 5 + ["test"] * 5 and str(place) in said


def test_lists_of_other_data_beside_it_are_not_taken(folder):
    write_lists(folder.parent / "other", {"train": NAMES, "dev": ["a.jpg"]})
    (folder.parent / "other" / "Images").mkdir()  # a data set of its own, whose names are the same by chance
    write_lists(folder.parent / "more", {"train": NAMES[:9], "dev": ["a.jpg"]})  # names fewer than half of the images
    (folder.parent / "input" / "broken").mkdir(parents=True)
    (folder.parent / "input" / "broken" / "dataset_flickr8k.json").write_text("{")
    assert "hash" in load(folder)[1]


def test_the_digests_are_those_of_the_official_lists(real_photographs):
    lists = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt"}
    names = {split: (real_photographs / "flickr8k" / name).read_text().split() for split, name in lists.items()}
    splits = {name: split for split in names for name in names[split]}
    found = official_splits(splits)
    assert len(found) == sum(len(digests.split()) for digests in SIGNATURE.values()) == 96
    assert found.items() <= splits.items() and caution(splits, is_hashed=False) == ""


def test_flickr8k_without_its_lists_is_recognised_and_said(real_photographs, folder):
    source = real_photographs / "flickr8k"
    names = [line.split(",")[0] for line in (source / "captions.txt").read_text().splitlines()[1::5]]
    for name in names:
        os.symlink(source / "Images" / name, folder / "Images" / name)
    (folder / "captions.txt").write_text("image,caption\n" + "".join(f"{name},a dog\n" for name in names))
    _, said = load(folder)
    assert "Flickr8k without its official split" in said and "no score of this run may stand beside a published one" in said
    lists = {split: (source / f"Flickr_8k.{split}Images.txt").read_text().split() for split in ("train", "dev")}
    write_lists(folder.parent / "whole" / "Images", {})  # a neighbour with pictures of its own: names of Flickr8k are unique
    write_lists(folder.parent / "whole", lists)
    splits, said = load(folder)
    assert "Flickr8k without" not in said and sum(split == "val" for split in splits.values()) == 1000


def test_other_pictures_are_not_taken_for_flickr8k():
    assert caution(dict.fromkeys(NAMES, "train"), is_hashed=True) == ""


@pytest.mark.parametrize("text", ["holdout", "0", "trainval", None])
def test_what_is_no_split_is_refused(text):
    with pytest.raises(ValueError, match="no split"):
        split_name(text)


def test_a_row_that_stands_twice_counts_once_and_is_said(folder):
    with open(folder / "captions.txt", "a") as file:
        file.write("0.jpg,picture 0.jpg\n0.jpg,another caption\n1.jpg,picture 0.jpg\n0.jpg, picture 0.jpg \n")
    table, _, skipped = load_captions(folder)
    assert len(table) == 22 and not table.duplicated(["image", "caption"]).any()
    assert skipped == [f"{folder / 'captions.txt'}, row {row}: 0.jpg has this caption already" for row in (22, 25)]
