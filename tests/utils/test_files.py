"""What commands replace, rename and delete: what they wrote themselves, and nothing of the user's."""

import os
import time

import cv2
import numpy as np
import pytest
from conftest import run_script

import GAN
from Datasets import shapes
from generation.options import GANConfig
from search.map import require_own_map
from utils import files as storage
from utils import plots
from utils.cache import Cache, cache, cache_key
from utils.errors import UserError
from utils.files import atomic_dir, remove_leftovers, require_own_results, write_json


def contents(folder):
    """{name: bytes} of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def photographs(folder):
    (folder / "album").mkdir(parents=True)
    (folder / "holiday.jpg").write_bytes(b"a picture")
    (folder / "album" / "other.png").write_bytes(b"another")
    return folder


def draw(folder):
    shapes.draw(folder, train=3, val=1, test=1)


def test_a_folder_of_the_users_is_not_replaced_by_a_sample_or_by_generated_pictures(tmp_path):
    folder = photographs(tmp_path / "photos")
    before = contents(tmp_path)
    process = run_script("Datasets/shapes.py", folder, cwd=tmp_path)
    assert process.returncode == 2 and "which this command did not write" in process.stderr
    assert process.stderr.startswith(f"error: {folder}: holds ") and process.stderr.count("\n") == 1
    with pytest.raises(UserError, match=f"{folder}: holds .*, which this command did not write"):
        GAN.write_pairs(GANConfig(generate=20, output=str(folder)), "shapes")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("draw", [draw, lambda folder: shapes.draw_classes(folder, pictures=1, colors=("red",))])
def test_what_a_command_drew_itself_is_drawn_again_unless_something_was_added_or_changed(tmp_path, draw):
    folder = tmp_path / "drawn"
    draw(folder)
    first = contents(folder)
    (folder / ".DS_Store").write_bytes(b"of a file manager")
    draw(folder)
    assert contents(folder) == first
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds notes.txt, which this command did not write"):
        draw(folder)
    (folder / "notes.txt").unlink()
    edited = next(path for path in sorted(folder.rglob("*")) if path.is_file())
    edited.write_text("corrected by hand")
    with pytest.raises(UserError, match=f"holds .*{edited.name}, which was changed after this command wrote it"):
        draw(folder)
    assert edited.read_text() == "corrected by hand" and len(list(tmp_path.iterdir())) == 1


def test_a_captions_file_alone_is_not_a_sample(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\n")
    for own in (shapes.SAMPLE_FILES, GAN.PAIR_FILES):
        with pytest.raises(UserError, match="holds captions.txt alone"), atomic_dir(tmp_path, own):
            pass
    assert (tmp_path / "captions.txt").exists()


def test_a_file_the_current_folder_and_a_link_are_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, problem in ((tmp_path / "file", "is a file"), (".", "is the current folder"), ("..", "is the current folder")):
        with pytest.raises(UserError, match=problem):
            draw(name)
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target", target_is_directory=True)
    draw(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "captions.txt").exists()


def test_a_tmp_of_the_users_is_no_leftover(tmp_path, forked):
    process = forked(int)
    process.join()
    ours = tmp_path / f"notes.{storage.HOST}-{process.pid}.tmp"
    of_another_machine = tmp_path / f"images-{cache_key(1)}.another-123.tmp"
    theirs = [tmp_path / name for name in ("thesis.tmp", "chapter.draft-2.tmp", "below/old.tmp", f"x.host-{'9' * 30}.tmp")]
    for path in (ours, of_another_machine, *theirs):
        path.mkdir(parents=True)
        (path / "file").write_text("x")
        os.utime(path, (0, 0))  # long ago
    remove_leftovers(tmp_path)
    assert not ours.exists() and not of_another_machine.exists()
    assert all((path / "file").exists() for path in theirs)
    of_another_machine.mkdir()
    os.utime(of_another_machine, (time.time(), time.time()))
    remove_leftovers(tmp_path)
    assert of_another_machine.exists()  # it may still be written


def test_only_what_is_of_the_cache_is_deleted_from_its_folder(tmp_path, capsys):
    key = cache_key("of nobody")
    ours = [f"activations-{key}.npy", f"gallery-{key}.sqlite-wal", f"gallery-{key}-0123abcd.vectors", f"run-{key}.json"]
    theirs = ["results.csv", "text-notes.txt", "run-2024.json", "captions-final.npy", f"relevance-{key}"]
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("x")
    (tmp_path / f"images-{key}").mkdir()
    (tmp_path / f"images-{key}" / "pixels.bin").write_text("x")
    photographs(tmp_path / "images-2024")
    photographs(tmp_path / "photos")
    cache(Cache(str(tmp_path), (str(tmp_path / "runs"),), delete=True))
    assert sorted(os.listdir(tmp_path)) == sorted([*theirs, "images-2024", "photos"])
    assert "not of the cache, and left alone: 6 others, such as captions-final.npy" in capsys.readouterr().out


def test_results_replace_earlier_results_and_no_file_of_the_users(tmp_path):
    results, figure = tmp_path / "scores.json", tmp_path / "figure.png"
    for _ in range(2):
        require_own_results(results, figure)
        write_json(results, {"images": 3, "rsum": 600.0})
        plots.save(plots.plt.figure(), figure)
    require_own_map(tmp_path / "figure.html")  # the PNG beside it is ours
    for contents in (b'{"images": []}', b'{\n  "mine": 1\n}\n', b"[]", b"text", b"\xff"):
        results.write_bytes(contents)
        with pytest.raises(UserError, match="--json .*scores.json: is there, and this command did not write it"):
            require_own_results(results)
    cv2.imwrite(str(figure), np.zeros((3, 3, 3), np.uint8))
    for check, flag in (
        (lambda: require_own_results(output=figure), "--output"),
        (lambda: require_own_map(tmp_path / "figure.html"), "--map"),
    ):
        with pytest.raises(UserError, match=f"{flag} .*png: is there, and this command did not write it"):
            check()
    results.write_bytes(b"")  # as mktemp makes it
    require_own_results(results)
    with pytest.raises(UserError, match="is a folder or a device"):
        require_own_results(tmp_path)


def test_a_lesson_replaces_no_file_of_the_users(tmp_path):
    folder = photographs(tmp_path / "photos")
    (folder / "table.md").write_text("mine")
    before = contents(tmp_path)
    process = run_script("lessons.py", "temperature", "--quick", "--output", folder, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.startswith(f"error: --output {folder}: holds what is not of a lesson")
    assert contents(tmp_path) == before


def test_a_starter_file_that_somebody_has_worked_in_is_kept(tmp_path, monkeypatch):
    from assignment import make

    monkeypatch.setattr(make, "STARTER", tmp_path)
    for _ in range(2):
        make.make(tmp_path)
    text = (tmp_path / "loss.py").read_text()
    (tmp_path / "loss.py").write_text(text.replace('raise NotImplementedError("your code")', "return 0"))
    with pytest.raises(UserError, match="loss.py: is there already"):
        make.make(tmp_path)
    assert "return 0" in (tmp_path / "loss.py").read_text()
