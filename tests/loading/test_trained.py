"""What a run was trained on: recognised by content, inherited by what starts from it, and left out of scores."""

import csv
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

import main
from captions import load_captions
from config import parse_config
from evaluation.splits import select_rows
from loading.trained import (
    EARLIER,
    UNLISTED,
    caption_digests,
    content_digests,
    old_digests,
    read_splits,
    recognised,
    trained_rows,
    with_contents,
    write_splits,
)
from training.data import read_table
from utils.errors import UserError


def train(flags):
    return main.train(parse_config(flags, "shapes")[0])


def change_captions(source, target, change):
    """Copies a data folder, and passes each (image, caption) of its captions file through `change`."""
    shutil.copytree(source, target)
    with open(target / "captions.txt", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    with open(target / "captions.txt", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(change(*row) for row in rows)])
    return target


def swap_lists(folder, source):
    """Writes lists in which the test images are the first 24 training images of a sample, and the others are swapped too."""
    train, test = ((source / f"shapes.{split}Images.txt").read_text().split() for split in ("train", "test"))
    (folder / "shapes.trainImages.txt").write_text("\n".join(train[24:] + test))
    (folder / "shapes.testImages.txt").write_text("\n".join(train[:24]))
    return train[:24]


@pytest.fixture(scope="module")
def table(sample):
    table, image_dir, _ = load_captions(sample)
    return with_contents(table, image_dir)


def test_a_picture_is_its_bytes_whatever_its_name_and_captions(table, tmp_path):
    write_splits(tmp_path / "splits.csv", table)
    rows = trained_rows(read_splits(tmp_path))
    trained = set(table["image"][table["split"] == "train"])
    renamed = table.assign(image="a" + table["image"], caption="something else")
    assert recognised(rows, renamed) == ({f"a{name}" for name in trained}, set())
    other = table.assign(image=table["image"], caption="something else", content="0" * 32)
    assert recognised(rows, other) == (set(), set())  # 1.jpg of another data set


def test_a_copy_with_other_bytes_is_known_by_name_and_captions_if_these_are_its_own(table, tmp_path):
    write_splits(tmp_path / "splits.csv", table)
    rows, trained = trained_rows(read_splits(tmp_path)), set(table["image"][table["split"] == "train"])
    changed = table.assign(
        image="small/" + table["image"].str.replace(".png", ".JPG"),
        caption=table["caption"].str.upper().str.replace(" .", "."),
        content="0" * 32,
    )
    assert recognised(rows, changed) == (set(), {f"small/{name[:-4]}.JPG" for name in trained})
    write_splits(tmp_path / "splits.csv", table.assign(caption="a dog"))  # a class, which no image has alone
    assert recognised(trained_rows(read_splits(tmp_path)), table.assign(caption="a dog", content="")) == (set(), set())


def test_an_earlier_versions_list_still_protects(sample, table, run, tmp_path, capsys):
    old = table.groupby("image", as_index=False)["split"].first()
    shutil.copytree(run, tmp_path / "run")
    old.assign(digest=old["image"].map(old_digests(table))).to_csv(tmp_path / "run" / "splits.csv", index=False)
    data = shutil.copytree(sample, tmp_path / "data")
    trained, val = swap_lists(data, sample), (data / "shapes.devImages.txt").read_text().split()
    (data / "shapes.devImages.txt").write_text("\n".join(val[:12]))
    (data / "shapes.testImages.txt").write_text("\n".join(trained + val[12:]))
    rows, _, _ = select_rows(str(tmp_path / "run"), (str(data), "", ""), "test", False)
    assert set(rows["image"]) == set(val[12:])
    said = capsys.readouterr().out
    assert "left out: 24 images of the test split, which this run was trained on" in said
    assert "is of an earlier version: its training pictures are recognised by name and captions" in said


def test_a_list_that_is_damaged_or_missing_is_refused(tmp_path):
    for text in ("image\n1.jpg\n", "", None):
        (tmp_path / "splits.csv").unlink() if text is None else (tmp_path / "splits.csv").write_text(text)
        with pytest.raises(UserError, match=r"splits\.csv: missing or damaged"):
            read_splits(tmp_path)


def test_former_training_images_are_not_scored_under_other_names_and_captions(sample, run, tmp_path, capsys):
    """In the issue a space before each full stop was removed; here the names are others, too."""
    data = change_captions(sample, tmp_path / "data", lambda image, text: (f"new-{image}", text.replace(" .", ".")))
    for path in (data / "Images").iterdir():
        path.rename(path.with_name(f"new-{path.name}"))
    trained = [f"new-{name}" for name in swap_lists(data, sample)]
    (data / "shapes.devImages.txt").write_text("")
    new = [f"new-{name}" for name in (sample / "shapes.devImages.txt").read_text().split()]
    (data / "shapes.testImages.txt").write_text("\n".join(trained + new))
    rows, _, _ = select_rows(str(run), (str(data), "", ""), "test", False)
    assert set(rows["image"]) == set(new)
    assert "left out: 24 images of the test split, which this run was trained on" in capsys.readouterr().out


def test_fine_tuning_inherits_what_its_start_was_trained_on(sample, run, small_flags, tmp_path, capsys):
    """B starts from A on the same pictures under other lists; C starts from B, and knows A's pictures, too."""
    data = shutil.copytree(sample, tmp_path / "data")
    moved, val = swap_lists(data, sample), (data / "shapes.devImages.txt").read_text().split()
    (data / "shapes.devImages.txt").write_text("\n".join(val[:12] + moved[:6]))
    (data / "shapes.testImages.txt").write_text("\n".join(moved[6:] + val[12:]))
    train(small_flags("b", data_dir=data, model=run, epochs=1))
    said = capsys.readouterr().out
    assert f"left out: 6 of 18 validation images, which {run} was trained on" in said
    assert f"left out: 18 of 30 test images, which {run} was trained on" in said
    assert len((tmp_path / "b" / "skipped.txt").read_text().splitlines()) == 24
    rows = pd.read_csv(tmp_path / "b" / "splits.csv")
    assert (rows["split"] == "val").sum() == 12 and (rows["split"] == EARLIER).sum() == 96
    for split, expected in (("val", val[:12]), ("test", val[12:])):
        scored, _, _ = select_rows(str(tmp_path / "b"), ("", "", ""), split, False)
        assert set(scored["image"]) == set(expected)
    train(small_flags("c", data_dir=data, model=tmp_path / "b", epochs=1))
    scored, _, _ = select_rows(str(tmp_path / "c"), ("", "", ""), "test", False)
    assert set(scored["image"]) == set(val[12:])


def test_a_resumed_run_keeps_what_it_inherited_though_its_start_is_gone(run, small_flags, tmp_path):
    start = shutil.copytree(run, tmp_path / "a")
    train(small_flags("b", model=start, epochs=1))
    before = (tmp_path / "b" / "splits.csv").read_bytes()
    (start / "splits.csv").unlink()
    train([*small_flags("b", model=start, epochs=2), "--resume"])
    assert (tmp_path / "b" / "splits.csv").read_bytes() == before and b",earlier," in before


def test_fine_tuning_where_every_validation_image_was_trained_on_is_refused(sample, run, small_flags, tmp_path):
    data = shutil.copytree(sample, tmp_path / "data")
    (data / "shapes.devImages.txt").write_text("\n".join(swap_lists(data, sample)))
    (data / "shapes.testImages.txt").unlink()
    with pytest.raises(UserError, match="it was trained on all of the 24 validation images"):
        train(small_flags("b", data_dir=data, model=run))
    assert not (tmp_path / "b").exists()


def test_a_start_that_lists_nothing_is_said_once_and_later(run, small_flags, tmp_path, capsys):
    start = shutil.copytree(run, tmp_path / "a")
    (start / "splits.csv").unlink()
    train(small_flags("b", model=start, epochs=1))
    line = "it started from a model trained on a, whose pictures are not listed: see that none of these is among them"
    assert line in capsys.readouterr().out
    assert (pd.read_csv(tmp_path / "b" / "splits.csv")["split"] == UNLISTED).sum() == 1
    select_rows(str(tmp_path / "b"), ("", "", ""), "test", False)
    assert f"b: {line}" in capsys.readouterr().out


def test_copies_of_training_images_under_other_names_are_left_out(sample, small_flags, tmp_path, capsys):
    data = shutil.copytree(sample, tmp_path / "data")
    train_names, val, test = ((data / f"shapes.{s}Images.txt").read_text().split() for s in ("train", "dev", "test"))
    for name, copy in zip(train_names, [*val[:3], *test[:2]]):
        shutil.copyfile(data / "Images" / name, data / "Images" / copy)
    config = parse_config(small_flags(data_dir=data), "shapes")[0]
    table, _, skipped = read_table(config)
    assert table["image"][table["split"] == "val"].nunique() == 21 and len(skipped) == 5
    said = "\n".join(table.attrs["split"].lines())
    assert "left out: 3 of 24 validation images, which are copies of training images under another name" in said
    assert "left out: 2 of 24 test images" in said


def test_contents_are_read_once_and_again_when_a_file_changes(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths[:2]):
        cv2.imwrite(str(path), np.full((8, 8, 3), i, np.uint8))
    digests, file = content_digests(paths, cache_dir=tmp_path / "cache")
    assert digests[2] == "" and len(set(digests)) == 3 and all(len(digest) == 32 for digest in digests[:2])
    np.save(file, np.array(["a" * 32, "b" * 32, ""]))
    assert content_digests(paths, cache_dir=tmp_path / "cache")[0] == ["a" * 32, "b" * 32, ""]  # not read again
    cv2.imwrite(str(paths[0]), np.full((9, 9, 3), 7, np.uint8))
    changed, _ = content_digests(paths, cache_dir=tmp_path / "cache")
    assert changed[0] != digests[0] and changed[1] == digests[1]


def test_captions_identify_an_image_regardless_of_case_and_punctuation():
    table = pd.DataFrame({"image": ["a.jpg", "a.jpg", "b.jpg", "c.jpg"], "caption": ["A dog .", "a Cat", "a bird", "A bird!"]})
    other = pd.DataFrame({"image": ["x/A.png"] * 2, "caption": ["a cat .", "A dog"]})
    digests = caption_digests(table)
    assert digests["a.jpg"] == caption_digests(other)["x/A.png"] != ""
    assert digests["b.jpg"] == digests["c.jpg"] == ""
