"""Pictures that stand in two splits."""

import json

import cv2
import numpy as np
import pytest

from utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Six noisy pictures, two to a split."""
    (tmp_path / "Images").mkdir()
    rng, captions = np.random.default_rng(0), ["image,caption"]
    for number, split in enumerate(["train", "train", "dev", "dev", "test", "test"]):
        coarse = rng.integers(256, size=(9, 12, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (160, 120), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / "Images" / f"{number}.png"), picture)
        captions.append(f"{number}.png,noise number {number}")
        with open(tmp_path / f"my.{split}Images.txt", "a") as file:
            file.write(f"{number}.png\n")
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    return tmp_path


def test_pictures_of_their_own_are_no_leak(folder, evaluate_here):
    evaluate_here("leaks", "--data-dir", folder, "--json", folder / "found.json")
    found = json.loads((folder / "found.json").read_text())
    assert found == {"images": {"test": 2, "train": 2, "val": 2}, "same_name": [], "near_duplicates": []}


def test_a_smaller_darker_recompressed_copy_under_another_name_is_found(folder, evaluate_here):
    picture = cv2.imread(str(folder / "Images" / "1.png"))
    harmed = cv2.resize(picture, (96, 72), interpolation=cv2.INTER_AREA) * 0.8
    copy = cv2.imencode(".jpg", harmed.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    copy.tofile(folder / "Images" / "4.png")  # the ending says nothing
    evaluate_here("leaks", "--data-dir", folder, "--json", folder / "found.json")
    [pair] = json.loads((folder / "found.json").read_text())["near_duplicates"]
    assert (pair["train"], pair["test"]) == ("1.png", "4.png") and pair["differing_bits"] <= 26


def test_one_name_in_two_folders_is_found(folder, evaluate_here):
    (folder / "Images" / "more").mkdir()
    (folder / "Images" / "5.png").rename(folder / "Images" / "more" / "0.png")
    for path in (folder / "captions.txt", folder / "my.testImages.txt"):
        path.write_text(path.read_text().replace("5.png", "more/0.png"))
    evaluate_here("leaks", "--data-dir", folder, "--json", folder / "found.json")
    found = json.loads((folder / "found.json").read_text())
    assert found["same_name"] == ["0.png"] and found["near_duplicates"] == []


def test_copies_within_a_split_are_no_leak_and_pairs_are_sorted(folder, evaluate_here):
    for name, copies in (("0", ["1", "2"]), ("3", ["5"])):  # the first two are both for training
        picture = cv2.imread(str(folder / "Images" / f"{name}.png"))
        for number, copy in enumerate(copies):
            cv2.imwrite(str(folder / "Images" / f"{copy}.png"), picture[12 * number :, : 160 - 16 * number])
    evaluate_here("leaks", "--data-dir", folder, "--json", folder / "found.json")
    pairs = json.loads((folder / "found.json").read_text())["near_duplicates"]
    assert pairs[0] == {"test": "5.png", "val": "3.png", "differing_bits": 0}
    assert [(pair["train"], pair["val"]) for pair in pairs[1:]] == [("0.png", "2.png"), ("1.png", "2.png")]


def test_a_folder_that_is_not_named_and_a_broken_picture_end_in_a_line(folder, evaluate_here):
    with pytest.raises(UserError, match="--data-dir"):
        evaluate_here("leaks")
    (folder / "Images" / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3\.png"):
        evaluate_here("leaks", "--data-dir", folder)


def test_the_split_rule_and_columns_with_other_names_are_taken(folder, evaluate_here, capsys):
    table = (folder / "captions.txt").read_text().replace("image,caption", "bild,satz")
    (folder / "captions.txt").write_text(table)
    with pytest.raises(UserError, match="--image-column and --caption-column"):
        evaluate_here("leaks", "--data-dir", folder)
    evaluate_here("leaks", "--data-dir", folder, "--image-column", "bild", "--caption-column", "satz")
    assert "2 test, 2 train, 2 val images\nsplit: " in capsys.readouterr().out


@pytest.mark.parametrize("task", ["retrieval", "match", "calibrate", "compare"])
def test_every_task_that_reads_a_captions_file_takes_names_of_columns(run, folder, evaluate_here, task):
    """A column that is not there is named, so the flag has reached the reader."""
    runs = [run, "RN50"] if task == "compare" else [run]
    with pytest.raises(UserError, match="no image and caption columns"):
        evaluate_here(task, "--run", *runs, "--data-dir", folder, "--image-column", "image", "--caption-column", "satz")
