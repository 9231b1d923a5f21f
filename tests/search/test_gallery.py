"""Galleries on disk: what is embedded when, what survives, and approximate search."""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import tarfile
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image

import clip
from Datasets import shapes
from search import gallery, index, store, update
from search.files import find_pictures
from search.gallery import Filters, open_gallery
from search.searcher import Searcher
from search.store import Store
from training import distributed
from utils.errors import UserError
from utils.files import digest
from utils.images import read_image


@pytest.fixture
def searcher(run, tmp_path):
    return Searcher(run, "cpu", "fp32", tmp_path / "cache")


@pytest.fixture
def folder(sample, tmp_path):
    """Six pictures, two folders deep."""
    deeper = tmp_path / "pictures" / "deeper"
    deeper.mkdir(parents=True)
    for path in sorted((sample / "Images").iterdir())[:6]:
        shutil.copy(path, deeper)
    return tmp_path / "pictures"


@pytest.fixture
def opened(searcher, folder):
    def open_now(**options):
        return open_gallery(options.pop("searcher", searcher), find_pictures(folder), folder, **options)

    return open_now


def embeddings(found):
    """(N, d_e + 1) vectors in the order of the paths."""
    return torch.from_numpy(found.vectors[found.rows].astype(np.float32))


@pytest.fixture
def counted(monkeypatch):
    """The names of the files that are embedded."""
    names, original = [], update.embedded

    def counting(searcher, entries, *others):
        names.extend(os.path.basename(path) for path, *_ in entries)
        return original(searcher, entries, *others)

    monkeypatch.setattr(update, "embedded", counting)
    return names


def test_embeddings_are_those_of_the_model(run, opened):
    model, preprocess = clip.load(run, "cpu")
    found = opened()
    assert len(found.paths) == 6 and found.compressed is None
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in found.paths])
        expected = torch.nn.functional.normalize(model.encode_image(pixels), dim=1)
    alone = torch.from_numpy(found.embeddings().astype(np.float32))
    torch.testing.assert_close(alone, expected, atol=1e-3, rtol=1e-3)  # float16
    hubness = model.hubness.of_pictures(expected) if model.hubness else torch.zeros(6)
    torch.testing.assert_close(embeddings(found)[:, -1], -hubness, atol=1e-3, rtol=1e-3)


def test_only_what_is_new_or_changed_is_embedded_and_what_is_gone_is_dropped(opened, folder, sample, counted):
    first = opened()
    names = sorted(counted)
    assert len(names) == 6
    counted.clear()
    assert torch.equal(embeddings(opened()), embeddings(first)) and counted == []
    new = sorted((sample / "Images").iterdir())[10]
    shutil.copy(new, folder / "new.png")
    shutil.copy(new, folder / "deeper" / names[0])  # changed
    (folder / "deeper" / names[1]).unlink()
    found = opened()
    assert sorted(counted) == [names[0], "new.png"]
    assert [os.path.basename(path) for path in found.paths] == [names[0], *names[2:], "new.png"]
    torch.testing.assert_close(embeddings(found)[0], embeddings(found)[-1])
    torch.testing.assert_close(embeddings(found)[1:-1], embeddings(first)[2:])


def test_a_renamed_moved_or_copied_file_is_recognised_and_not_embedded_again(opened, folder, counted, capsys):
    first = opened()
    a, b, c = sorted((folder / "deeper").iterdir())[:3]
    a.rename(folder / "renamed.png")
    shutil.copy(b, folder / "copied.png")
    c.touch()  # another time, the same bytes
    counted.clear()
    found = opened()
    assert counted == [] and "recognised 3 pictures by their content" in capsys.readouterr().out
    assert len(found.paths) == 7 and str(a) not in found.paths
    place = dict(zip(found.paths, embeddings(found)))
    for path, before in ((folder / "renamed.png", a), (folder / "copied.png", b), (c, c)):
        assert torch.equal(place[str(path)], embeddings(first)[first.paths.index(str(before))])
    (folder / "other.png").write_bytes(b"\0" * (folder / "renamed.png").stat().st_size)  # as many bytes, but others
    assert len(opened().paths) == 7 and counted == ["other.png"]


def test_pictures_are_selected_by_date_and_folder(opened, folder):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2021:06:30 23:59:59"
    names = sorted(path.name for path in (folder / "deeper").iterdir())
    Image.open(folder / "deeper" / names[0]).convert("RGB").save(folder / "deeper" / "dated.jpg", exif=exif)
    (folder / "It[a]ly").mkdir()
    (folder / "deeper" / names[1]).rename(folder / "It[a]ly" / names[1])
    for name, year in ((f"deeper/{names[0]}", 2019), (f"It[a]ly/{names[1]}", 2021)):
        moment = time.mktime((year, 1, 1, 0, 0, 0, 0, 0, -1))
        os.utime(folder / name, (moment, moment))
    found = opened()

    def selected(**wanted):
        gallery = found.select(Filters(**wanted))
        scores, positions = gallery.top_k(gallery.embedding_of(0), 1)
        assert positions.tolist() == [0] and scores[0] == pytest.approx(1, abs=1e-3)
        assert all(gallery.position_of(gallery.key_of(position)) == position for position in range(len(gallery.paths)))
        return [os.path.basename(path) for path in gallery.paths]

    assert selected(before="2021") == [names[0]]
    assert selected(after="2021", before="2021-06") == [names[1]]
    assert selected(after="2021-06-30", before="2021-07-01") == ["dated.jpg"]
    assert len(selected(after="2022-01")) == 4 and len(selected()) == 7
    assert selected(folder="It[[]a]ly/*") == [names[1]] and len(selected(folder="deeper/*")) == 6
    for wrong in ("2021-13", "June", "2021-06-31"):
        with pytest.raises(UserError, match=f"after {wrong}: no date"):
            found.select(Filters(after=wrong))
    with pytest.raises(UserError, match="none of the 7 pictures"):
        found.select(Filters(before="1990"))


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


def test_another_model_has_its_own_embeddings(opened, run, tmp_path, capsys):
    first = opened()
    other = Searcher(shutil.copytree(run, tmp_path / "other"), "cpu", "fp32", tmp_path / "cache")
    weights = safetensors.torch.load_file(tmp_path / "other" / "model.safetensors")
    weights["image_projection.projection.weight"].neg_()
    safetensors.torch.save_file(weights, tmp_path / "other" / "model.safetensors")
    capsys.readouterr()
    torch.testing.assert_close(embeddings(opened(searcher=other))[:, :-1], -embeddings(first)[:, :-1])
    assert "6 of 6 pictures: new, changed, or not yet embedded with this model" in capsys.readouterr().out
    assert torch.equal(embeddings(opened()), embeddings(first))


def test_a_damaged_file_is_built_again(opened, tmp_path, capsys):
    first = opened()
    [path] = (tmp_path / "cache").glob("*.sqlite")
    path.write_bytes(b"no database" * 100)
    assert torch.equal(embeddings(opened()), embeddings(first))
    assert "built again" in capsys.readouterr().out


def test_after_a_damaged_file_a_large_gallery_still_finds_each_picture_by_itself(opened, tmp_path, folder, small_index):
    """The index outlives the database whose rows it holds: those must not name other pictures now."""
    shapes.draw(folder / "drawn", train=260, val=1, test=1)  # a rotation of 256 dimensions is learned from as many
    opened()
    [path] = (tmp_path / "cache").glob("*.sqlite")
    (folder / "aaa.png").write_bytes(sorted((folder / "deeper").iterdir())[0].read_bytes()[::-1])  # shifts what comes after
    for harm in (lambda: path.write_bytes(b"no database" * 100), path.unlink):
        harm()
        found = opened()
        assert len(found.paths) == 268 and found.compressed is not None
        for position, embedding in enumerate(embeddings(found)):
            scores, best = index.top_k(found, embedding.numpy(), 1)
            assert best.tolist() == [position] and scores[0] == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("harm", ["truncated", "missing", "another"])
def test_vectors_that_are_damaged_are_embedded_again(opened, tmp_path, capsys, counted, harm):
    first = embeddings(opened())
    [path] = (tmp_path / "cache").glob("*.vectors")
    contents = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(contents[:-100] if harm == "truncated" else b"x" * len(contents))
    counted.clear()
    assert torch.equal(embeddings(opened()), first)
    assert "built again" in capsys.readouterr().out and len(counted) == 6


def test_a_block_whose_checksum_differs_is_embedded_again(opened, tmp_path, capsys, counted):
    first = embeddings(opened())
    [path] = (tmp_path / "cache").glob("*.vectors")
    contents = bytearray(path.read_bytes())
    contents[200] ^= 1
    path.write_bytes(contents)
    counted.clear()
    assert torch.equal(embeddings(opened()), first)
    assert "6 vectors were damaged; they are embedded again" in capsys.readouterr().out and len(counted) == 6


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
    assert "left out 1 file that cannot be listed (Permission denied): private" in said
    assert "left out 1 file with names that are not UTF-8: caf\ufffd.png" in said


def test_a_read_error_that_passes_hides_no_picture(opened, folder, counted, monkeypatch, capsys):
    name = sorted((folder / "deeper").iterdir())[0].name
    read_bytes = update.read_bytes

    def failing(path):
        if os.path.basename(path) == name:
            raise OSError(5, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr(update, "read_bytes", failing)
    assert len(opened().paths) == 5 and f"cannot be decoded: {name}" in capsys.readouterr().out
    monkeypatch.setattr(update, "read_bytes", read_bytes)
    assert len(opened().paths) == 6 and "left out" not in capsys.readouterr().out


def test_pictures_of_a_folder_that_cannot_be_listed_now_are_not_forgotten(opened, folder, counted, monkeypatch):
    shutil.copy(sorted((folder / "deeper").iterdir())[0], folder / "one.png")
    assert len(opened().paths) == 7
    counted.clear()
    scandir = os.scandir

    def failing(path):
        if os.path.basename(path) == "deeper":
            raise OSError(5, "Input/output error", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert len(opened().paths) == 1
    monkeypatch.setattr(os, "scandir", scandir)
    assert len(opened().paths) == 7 and counted == []


def test_decomposed_and_composed_names_are_the_same_folder(opened, folder):
    (folder / "deeper").rename(folder / "Cafe\u0301")  # as macOS writes it
    assert len(opened().select(Filters(folder="Caf\u00e9/*")).paths) == 6


def test_a_heic_file_is_read_by_its_own_decoder_alone(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = np.zeros((40, 60, 3), np.uint8)
    picture[:, :30] = (200, 30, 30)
    pillow_heif.from_pillow(Image.fromarray(picture)).save(tmp_path / "a.heic", quality=90)
    image = read_image(tmp_path / "a.heic", 40)
    assert image.shape == (40, 60, 3) and abs(image[20, 10].astype(int) - (200, 30, 30)).max() < 20
    (tmp_path / "b.heic").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")  # would run a program
    with pytest.raises((ValueError, OSError)):
        read_image(tmp_path / "b.heic", 40)


def test_a_cache_that_cannot_be_written_is_named(opened, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="--cache-dir .*cache: cannot be used"):
        opened()


def embedding_of(path):
    """A vector of 257 that tells a file's bytes."""
    seed = int.from_bytes(hashlib.sha256(Path(path).read_bytes()).digest()[:4], "big")
    return torch.from_numpy(np.random.default_rng(seed).random(257, dtype=np.float32).astype(np.float16).astype(np.float32))


def test_a_command_killed_at_any_moment_leaves_a_gallery_that_is_right(searcher, tmp_path, monkeypatch):
    monkeypatch.setattr(update, "WRITE_EVERY", 7)
    rng = random.Random(0)
    folder = tmp_path / "pictures"
    folder.mkdir()

    def slow_embeddings(searcher, entries, *others):
        for path, size, changed in entries:
            time.sleep(0.0005)
            yield path, size, changed, digest(Path(path).read_bytes()), None, embedding_of(path).numpy()

    monkeypatch.setattr(update, "embedded", slow_embeddings)
    assert searcher.keys  # known before the children start

    def open_now():
        return open_gallery(searcher, find_pictures(folder), folder)

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
        assert all(torch.equal(row, embedding_of(path)) for path, row in zip(found.paths, embeddings(found)))
    assert died >= 10  # or the children were too fast for this to test anything
    [path] = (tmp_path / "cache").glob("*.sqlite")
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


# ---- several processes -------------------------------------------------------------------------------------------


def embed_as_one_of(rank, size, meeting, run, folder, cache, die_after):
    """A process of `torchrun inference.py --embed-only`, which is killed after so many pictures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    update.WRITE_EVERY = 5
    embedded, original = [], update.embedded

    def counting(searcher, entries, *others):
        for picture in original(searcher, entries, *others):
            embedded.append(picture[0])
            if len(embedded) == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield picture
        Path(f"{meeting}-{rank}.txt").write_text("\n".join(embedded))

    update.embedded = counting
    open_gallery(Searcher(run, "cpu", "fp32", cache), find_pictures(folder), folder)
    distributed.destroy_distributed()


def test_several_processes_embed_a_share_each_and_what_a_killed_one_wrote_stays(forked, run, sample, tmp_path, counted):
    folder = sample / "Images"  # 144 pictures
    cache = tmp_path / "cache"

    def embed(size, name, die_after=None):
        started = [
            forked(embed_as_one_of, rank, size, tmp_path / name, run, folder, cache, die_after if rank == 0 else None)
            for rank in range(size)
        ]
        for process in started:
            process.join(60)
        embedded = [path.read_text().split() for path in tmp_path.glob(f"{name}-*.txt")]
        return [process.exitcode for process in started], [path for paths in embedded for path in paths]

    codes, _ = embed(2, "killed", die_after=43)
    assert codes[0] == -signal.SIGKILL
    written = sum(len(np.load(part)["paths"]) for part in cache.glob("*.parts/*.npz"))
    assert written >= 40
    codes, embedded = embed(3, "again")
    assert codes == [0, 0, 0] and len(embedded) == len(set(embedded)) == 144 - written
    assert not list(cache.glob("*.parts"))
    found = open_gallery(Searcher(run, "cpu", "fp32", cache), find_pictures(folder), folder)
    assert counted == [] and len(found.paths) == 144
    alone = open_gallery(Searcher(run, "cpu", "fp32", tmp_path / "alone"), find_pictures(folder), folder)
    torch.testing.assert_close(embeddings(found), embeddings(alone), atol=5e-4, rtol=1e-3)  # a last bit of float16


def test_pictures_in_tar_files_are_those_of_the_folder(searcher, sample, tmp_path, opened, capsys):
    names = sorted((sample / "Images").iterdir())[:6]
    with tarfile.open(tmp_path / "a-0.tar", "w") as archive:
        for path in names:
            archive.add(path, f"deeper/{path.name}")
    shutil.copy(tmp_path / "a-0.tar", tmp_path / "a-1.tar")
    (tmp_path / "a-1.tar").write_bytes((tmp_path / "a-1.tar").read_bytes()[:9000])
    pattern = f"{tmp_path}/a-*.tar"
    found = open_gallery(searcher, find_pictures(pattern), "")
    assert "a-1.tar: damaged" in capsys.readouterr().out
    assert found.paths == [f"{tmp_path}/a-0.tar/deeper/{path.name}" for path in names]
    assert torch.equal(embeddings(found), embeddings(opened()))
    assert (read_image(found.paths[2], 80) == read_image(names[2], 80)).all()
    with pytest.raises(UserError, match="no such file as .*b-0.tar"):
        list(find_pictures(f"{tmp_path}/b-{{0..1}}.tar"))


def test_a_folder_that_is_searched_does_not_forget_the_tar_files_in_it(searcher, sample, folder, opened, counted):
    with tarfile.open(folder / "a.tar", "w") as archive:
        for path in sorted((sample / "Images").iterdir())[10:13]:
            archive.add(path, path.name)
    pattern = f"{folder}/*.tar"
    for _ in range(2):
        assert len(open_gallery(searcher, find_pictures(pattern), "").paths) == 3
        assert len(opened().paths) == 6
    assert len(counted) == 9


# ---- exact and approximate ---------------------------------------------------------------------------------------


def draw(count, seed, width=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1).numpy()


@pytest.fixture
def small_index(monkeypatch):
    """Approximate search from 4 pictures on, with codes that so few can teach."""
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 3)
    monkeypatch.setattr(index, "BITS", 3)


def test_exact_search_reads_blocks():
    vectors = draw(500, 0).astype(np.float16)
    for rows in (np.arange(500), np.arange(100, 400), np.random.default_rng(0).permutation(500)[:333], np.array([7])):
        for query in draw(5, 1):
            scores, positions = index.exact_top_k(vectors, rows, query, 10, at_once=64)
            expected = vectors[rows].astype(np.float32) @ query
            best = np.argsort(-expected)[:10]
            assert positions.tolist() == best.tolist()
            np.testing.assert_allclose(scores, expected[best], rtol=1e-5)


@pytest.mark.parametrize("many_lists", [8192, 8])  # from 8 on the nearest lists are found by a graph
def test_an_index_takes_in_new_pictures_and_never_answers_with_those_that_are_gone(
    tmp_path, capsys, small_index, monkeypatch, many_lists
):
    monkeypatch.setattr(index, "MANY_LISTS", many_lists)
    vectors, path = draw(900, 0).astype(np.float16), tmp_path / "gallery.faiss"

    def answers(count, rows):
        compressed = index.CompressedIndex(index.open_index(path, vectors[:count]), vectors[:count], rows)
        hits = 0
        for query in draw(20, 1):
            scores, positions = compressed.top_k(query, 10)
            expected, wanted = index.exact_top_k(vectors, rows, query, 10)
            assert (rows[positions] < count).all() and set(rows[positions]) <= set(rows)
            np.testing.assert_allclose(scores, vectors[rows[positions]].astype(np.float32) @ query, rtol=1e-5)
            hits += len(set(positions.tolist()) & set(wanted.tolist()))
        assert hits >= 0.95 * 200
        return capsys.readouterr().out

    everything = np.random.default_rng(0).permutation(900)  # as paths order them
    assert "building the search index of 700 pictures" in answers(700, everything[everything < 700])
    before = path.stat().st_mtime_ns
    assert answers(700, everything[everything < 700]) == "" and path.stat().st_mtime_ns == before
    assert answers(900, everything) == "" and path.stat().st_mtime_ns > before
    assert answers(900, everything[:300]) == ""  # of another folder, or the others are gone
    path.write_bytes(path.read_bytes()[:1000])
    assert "it is built again" in answers(900, everything)


def test_a_full_disk_is_named_and_leaves_no_index_and_no_vectors(tmp_path, monkeypatch, small_index, opened):
    import faiss

    def full(*_):
        raise RuntimeError("Error in write: fwrite failed: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(UserError, match="gallery.faiss: cannot be written .*No space left on device"):
        index.open_index(tmp_path / "gallery.faiss", draw(300, 0).astype(np.float16))
    assert not list(tmp_path.glob("gallery*"))

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr(store.os, "fsync", no_space)
        with pytest.raises(UserError, match="--cache-dir .* cannot be used .*No space left on device"):
            opened()
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 100)
    assert len(opened().paths) == 6  # and nothing stands in the way once there is space


def test_rows_without_a_picture_are_removed_when_they_are_many(tmp_path):
    kept = Store(tmp_path / "a.sqlite", 4)
    vectors = np.random.default_rng(0).random((40, 4)).astype(np.float16)
    kept.add([(f"{i:02d}", 1, 1, b"", None, vectors[i]) for i in range(40)])
    kept.add([(f"{i:02d}", 2, 2, b"", None, vectors[i] + 1) for i in range(5)])  # five have changed
    kept.compact()
    assert kept.num_rows() == 45
    opened_before = kept.generation()
    kept.list_files([(f"{i:02d}", 2, 2) for i in range(0, 40, 2)])
    kept.database.execute("DELETE FROM pictures WHERE path NOT IN (SELECT path FROM listed)")
    vectors_before = kept.companion(".vectors")
    other = Store(tmp_path / "a.sqlite", 4)
    kept.compact()
    other.compact()  # finds that another process was faster
    (tmp_path / "a-00000000.vectors").write_bytes(b"left by a process that was killed")
    assert not vectors_before.exists()
    kept.database.execute("DELETE FROM listed")
    kept.list_files([(f"{i:02d}", 2, 2) for i in range(0, 40, 2)])
    rows, paths = zip(*kept.pictures())
    assert kept.num_rows() == 20 and list(paths) == [f"{i:02d}" for i in range(0, 40, 2)]
    expected = [vectors[i] + (i < 5) for i in range(0, 40, 2)]
    np.testing.assert_array_equal(kept.vectors()[list(rows)], expected)
    assert kept.path_of(rows[1], kept.generation()) == "02" and kept.path_of(rows[1], opened_before) is None
    assert kept.drop_damaged() == 0 and len(list(tmp_path.glob("*.vectors"))) == 2
    Store(tmp_path / "a.sqlite", 4)
    assert list(tmp_path.glob("*.vectors")) == [kept.companion(".vectors")]


def test_a_second_command_that_waits_while_one_compacts_copies_nothing_wrong(tmp_path, monkeypatch):
    first, second = Store(tmp_path / "a.sqlite", 4), Store(tmp_path / "a.sqlite", 4)
    vectors = np.random.default_rng(0).random((40, 4)).astype(np.float16)
    first.add([(f"{i:02d}", 1, 1, b"", None, vectors[i]) for i in range(40)])
    first.database.execute("DELETE FROM pictures WHERE path < '20'")
    monkeypatch.setattr(second, "drop_damaged", first.compact)  # between the second one's first look and its transaction
    second.compact()
    second.list_files([(f"{i:02d}", 1, 1) for i in range(40)])
    rows, paths = zip(*second.pictures())
    np.testing.assert_array_equal(second.vectors()[list(rows)], vectors[[int(path) for path in paths]])
