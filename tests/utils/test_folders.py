"""Which files of a folder are pictures: hidden and foreign names, links, endings, and what cannot be listed."""

import os

import numpy as np
import pytest
from PIL import Image

from search.files import find_pictures
from utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for name in ("a", ".thumbnails", "@eaDir", ".Trash-1000", "__MACOSX", ".ipynb_checkpoints"):
        (root / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / name / "picture.jpg")
    (root / "a" / "._picture.jpg").write_bytes(b"\0\5\x16\7")
    return root


def names(root):
    return sorted(os.path.relpath(path, root) for path, *_ in find_pictures(root))


def test_hidden_and_foreign_names_are_left_out_and_said(folder, capsys):
    assert names(folder) == ["a/picture.jpg"]
    line = capsys.readouterr().out
    assert line.startswith("left out 6 files hidden, or kept there by another program: ") and line.count("\n") == 1
    list(find_pictures(folder, verbose=True))
    assert all(name in capsys.readouterr().out for name in ["@eaDir"])
    assert names(folder / ".thumbnails") == ["picture.jpg"]  # where it is what the user names


def test_contents_tell_pictures_whose_ending_does_not(folder):
    contents = (folder / "a" / "picture.jpg").read_bytes()
    for name in ("a.jfif", "a.jpe", "no ending", "a.JPG_large", "a.dat"):
        (folder / "a" / name).write_bytes(contents)
    (folder / "a" / "notes").write_text("BMW and P1 are no pictures")
    (folder / "a" / "text.txt").write_text("no picture")
    assert names(folder) == sorted(f"a/{n}" for n in ("picture.jpg", "a.jfif", "a.jpe", "no ending", "a.JPG_large", "a.dat"))


def test_links_are_followed_and_each_file_is_taken_once(folder, tmp_path, capsys):
    outside = tmp_path / "outside"
    (outside / "deeper").mkdir(parents=True)
    (folder / "a" / "picture.jpg").rename(outside / "deeper" / "one.jpg")
    (folder / "a" / "link").symlink_to(outside)
    (outside / "back").symlink_to(folder)  # a loop
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "nothing.jpg").symlink_to(folder / "gone.jpg")
    (folder / "file.jpg").symlink_to(outside / "deeper" / "one.jpg")
    (folder / "again").symlink_to(folder / "a")
    assert names(folder) == ["a/link/deeper/one.jpg", "file.jpg"]
    said = capsys.readouterr().out
    assert "that are links to nothing: nothing.jpg" in said and "symbolic links): self.jpg" in said
    (folder / "other.jpg").symlink_to(folder / "@eaDir" / "picture.jpg")  # as git-annex keeps all its files
    assert "other.jpg" in names(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch, capsys):
    scandir = os.scandir

    def failing(path):
        if os.path.basename(path) == "down":
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    (folder / "down").mkdir()
    monkeypatch.setattr(os, "scandir", failing)
    assert names(folder) == ["a/picture.jpg"]
    assert "left out 1 file that cannot be listed (Input/output error): down" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--images .*down: cannot be listed \(Input/output error\)"):
        names(folder / "down")
    with pytest.raises(UserError, match="picture.jpg: is a file; name the folder"):
        names(folder / "a" / "picture.jpg")
