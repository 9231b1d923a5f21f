"""Galleries on disk: what is embedded when, what survives, and approximate search."""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import clip
from search import gallery, index
from search.gallery import find_pictures, open_gallery
from utils.errors import UserError
from utils.images import read_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(run):
    return clip.load(run, "cpu")[0]


@pytest.fixture
def folder(sample, tmp_path):
    """Six pictures, two folders deep."""
    deeper = tmp_path / "pictures" / "deeper"
    deeper.mkdir(parents=True)
    for path in sorted((sample / "Images").iterdir())[:6]:
        shutil.copy(path, deeper)
    return tmp_path / "pictures"


@pytest.fixture
def opened(model, folder, tmp_path):
    def open_now(**options):
        files = find_pictures(folder)
        return open_gallery(options.pop("model", model), files, folder, tmp_path / "cache", CPU, torch.float32, **options)

    return open_now


@pytest.fixture
def counted(monkeypatch):
    """The names of the files that are embedded."""
    names, original = [], gallery.file_embeddings

    def counting(model, paths, *others):
        names.extend(os.path.basename(path) for path in paths)
        return original(model, paths, *others)

    monkeypatch.setattr(gallery, "file_embeddings", counting)
    return names


def test_embeddings_are_those_of_the_model(model, run, opened):
    _, preprocess = clip.load(run, "cpu")
    found = opened()
    assert len(found.paths) == 6 and found.graph is None
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in found.paths])
        expected = torch.nn.functional.normalize(model.encode_image(pixels), dim=1)
    torch.testing.assert_close(found.embeddings, expected, atol=1e-4, rtol=1e-4)


def test_only_what_is_new_or_changed_is_embedded_and_what_is_gone_is_dropped(opened, folder, sample, counted):
    first = opened()
    names = sorted(counted)
    assert len(names) == 6
    counted.clear()
    assert torch.equal(opened().embeddings, first.embeddings) and counted == []
    new = sorted((sample / "Images").iterdir())[10]
    shutil.copy(new, folder / "new.png")
    shutil.copy(new, folder / "deeper" / names[0])  # changed
    (folder / "deeper" / names[1]).unlink()
    found = opened()
    assert sorted(counted) == [names[0], "new.png"]
    assert [os.path.basename(path) for path in found.paths] == [names[0], *names[2:], "new.png"]
    torch.testing.assert_close(found.embeddings[0], found.embeddings[-1])
    torch.testing.assert_close(found.embeddings[1:-1], first.embeddings[2:])


def test_files_that_are_no_pictures_are_left_out_and_counted_once_tried(opened, folder, counted, capsys):
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic not one")
    assert len(opened().paths) == 6 and "left out 3 pictures" in capsys.readouterr().out
    counted.clear()
    assert len(opened().paths) == 6 and counted == []
    for path in (folder / "deeper").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="none of its 3 pictures can be decoded"):
        opened()


def test_pictures_that_declare_too_many_pixels_are_not_decoded(folder):
    header = bytearray(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    header[16:24] = (100_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    (folder / "huge.png").write_bytes(header)
    with pytest.raises(ValueError):
        read_image(folder / "huge.png", 32)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_pictures_are_turned_upright(tmp_path, kind):
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30] = 255  # the top left is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / f"turned.{kind}", exif=exif, quality=95)
    image = read_image(tmp_path / f"turned.{kind}", 40)
    assert image.shape == (40, 60, 3)
    assert image[5, 5].min() > 200 and image[35, 5].max() < 50 and image[5, 55].max() < 50


def test_another_model_has_its_own_embeddings(model, opened, run, capsys):
    first = opened()
    other = clip.load(run, "cpu")[0]
    with torch.no_grad():
        other.image_projection.projection.weight.neg_()
    capsys.readouterr()
    torch.testing.assert_close(opened(model=other).embeddings, -first.embeddings)
    assert "6 of 6 pictures: new, changed, or not yet embedded with this model" in capsys.readouterr().out
    assert torch.equal(opened().embeddings, first.embeddings)


def test_a_damaged_file_is_built_again(opened, tmp_path, capsys):
    first = opened()
    [path] = (tmp_path / "cache").glob("*.sqlite")
    path.write_bytes(b"no database" * 100)
    assert torch.equal(opened().embeddings, first.embeddings)
    assert "built again" in capsys.readouterr().out


def test_after_a_damaged_file_a_large_gallery_still_finds_each_picture_by_itself(opened, tmp_path, folder, monkeypatch):
    """The search graph outlives the file whose numbers it holds: those must not name other pictures now."""
    monkeypatch.setattr(gallery, "HNSW_MIN_SIZE", 3)
    opened()
    [path] = (tmp_path / "cache").glob("*.sqlite")
    (folder / "aaa.png").write_bytes(sorted((folder / "deeper").iterdir())[0].read_bytes()[::-1])  # shifts what comes after
    picture = np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "aab.png"), picture)
    for harm in (lambda: path.write_bytes(b"no database" * 100), path.unlink):
        harm()
        found = opened()
        assert len(found.paths) == 7 and found.graph is not None
        for position, embedding in enumerate(found.embeddings):
            scores, best = index.top_k(found.searched, embedding, 1)
            assert best.tolist() == [position] and scores.item() == pytest.approx(1, abs=1e-5)


def test_names_that_are_not_utf8_and_folders_that_may_not_be_read_are_left_out_and_counted(opened, folder, monkeypatch, capsys):
    shutil.copy(sorted((folder / "deeper").iterdir())[0], os.fsencode(folder) + b"/caf\xe9.png")
    (folder / "private").mkdir()
    scandir = os.scandir

    def refusing(path):  # root may read every folder
        if os.path.basename(path) == "private":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(gallery.os, "scandir", refusing)
    assert len(opened().paths) == 6
    said = capsys.readouterr().out
    assert "left out 1 folders without read permission and 1 pictures with non-UTF-8 names" in said


def test_a_heic_file_is_read_by_its_own_decoder_alone(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30] = (200, 30, 30)
    pillow_heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "a.heic", quality=90)
    image = read_image(tmp_path / "a.heic", 40)
    assert image.shape == (40, 60, 3) and abs(image[20, 10].astype(int) - (200, 30, 30)).max() < 20
    Image.fromarray(picture).save(tmp_path / "b.heic", format="PNG")  # stands for PostScript, which runs programs
    with pytest.raises((ValueError, OSError)):
        read_image(tmp_path / "b.heic", 40)


def test_a_cache_that_cannot_be_written_is_named(opened, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="--cache-dir .*cache: cannot be used"):
        opened()


def embedding_of(path):
    """A vector of 256 that tells a file's bytes."""
    seed = int.from_bytes(hashlib.sha256(Path(path).read_bytes()).digest()[:4], "big")
    return torch.from_numpy(np.random.default_rng(seed).random(256, dtype=np.float32))


def test_a_command_killed_at_any_moment_leaves_a_gallery_that_is_right(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "WRITE_EVERY", 7)
    rng = random.Random(0)
    folder = tmp_path / "pictures"
    folder.mkdir()

    def slow_embeddings(model, paths, *others):
        for position, path in enumerate(paths):
            time.sleep(0.0005)
            yield position, embedding_of(path)

    monkeypatch.setattr(gallery, "file_embeddings", slow_embeddings)

    def open_now():
        return open_gallery(model, find_pictures(folder), folder, tmp_path / "cache", CPU, torch.float32)

    died = 0
    for moment in range(20):
        for _ in range(20):  # new and changed pictures, as likely as not written over each other
            (folder / f"{rng.randrange(300)}.png").write_bytes(rng.randbytes(20 + rng.randrange(20)))
        for path in rng.sample(sorted(folder.iterdir()), 3):
            path.unlink()
        children = []
        for _ in range(1 + moment % 2):  # every other time two commands at once
            if not (child := os.fork()):
                try:
                    open_now()
                finally:
                    os._exit(0)
            children.append(child)
        time.sleep(rng.random() * 0.03)
        for child in children:
            os.kill(child, signal.SIGKILL)
            died += os.waitpid(child, 0)[1] == signal.SIGKILL
        found = open_now()
        assert found.paths == sorted(map(str, folder.iterdir()))
        assert all(torch.equal(row, embedding_of(path)) for path, row in zip(found.paths, found.embeddings))
    assert died >= 10  # or the children were too fast for this to test anything
    [path] = (tmp_path / "cache").glob("*.sqlite")
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 16, generator=generator), dim=1)


def test_a_graph_takes_in_new_pictures_and_never_answers_with_those_that_are_gone(tmp_path, capsys):
    embeddings, ids = draw(500, 0), np.arange(500) * 3 + 7
    path = tmp_path / "gallery.faiss"

    def answers(keep):
        graph = index.open_graph(path, ids[keep], embeddings[keep])
        for query in draw(20, 1):
            scores, positions = index.top_k(graph, query, 10)
            expected, wanted = index.top_k(embeddings[keep], query, 10)
            assert positions.tolist() == wanted.tolist()
            torch.testing.assert_close(scores, expected)
        return capsys.readouterr().out

    order = np.random.default_rng(0).permutation(500)
    assert "adding 400 pictures" in answers(order[:400])
    assert answers(order[:400]) == ""
    assert "adding 100 pictures" in answers(order)
    assert answers(order[50:]) == ""  # a tenth is gone: answered around
    assert "adding 350 pictures" in answers(order[150:])  # too much is gone: built again
    path.write_bytes(path.read_bytes()[:1000])
    assert "adding 350 pictures" in answers(order[150:])
