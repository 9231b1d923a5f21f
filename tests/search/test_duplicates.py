"""Files that are the same photograph: which are found, which are not, the best copy, and what is kept on disk."""

import json
import os
import sqlite3
from datetime import datetime

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from search import duplicates, hashes
from search.duplicates import as_records, draw_duplicates, find_duplicates
from utils.errors import UserError


def textured(seed, height=240, width=320):
    """A drawn picture with coarse and fine structure, (height, width, 3) uint8."""
    rng, picture = np.random.default_rng(seed), 0
    for cells, weight in ((6, 0.6), (20, 0.3), (60, 0.1)):
        noise = rng.uniform(0, 255, size=(cells, cells, 3))
        picture = picture + weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return picture.clip(0, 255).astype(np.uint8)


def with_disc(picture, x, y):
    return cv2.circle(picture.copy(), (x, y), 28, (240, 240, 240), -1)


def write(path, picture, quality=92):
    ending = path.suffix if path.suffix == ".png" else ".jpg"
    cv2.imencode(ending, picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tofile(path)
    return path


def found(paths, cache_dir=None):
    """The groups, as lists of (name, relation)."""
    stats = [(str(path), os.stat(path)) for path in paths]
    groups = find_duplicates([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats], cache_dir, num_workers=2)
    return [[(os.path.basename(picture.path), picture.relation) for picture in group] for group in groups]


def named(*names):
    """What `found` returns where the first of the names is the best copy of one group, and the others are not equal to it."""
    return [[(name, "same photograph" if i else "best copy") for i, name in enumerate(names)]]


@pytest.fixture
def folder(tmp_path):
    """A picture, and others that have nothing to do with it."""
    write(tmp_path / "original.png", textured(0))
    for seed in range(1, 5):
        write(tmp_path / f"other{seed}.jpg", textured(seed))
    return tmp_path


def add_exif(path, **tags):
    """Writes EXIF tags into a JPEG file: orientation, date."""
    exif = Image.Exif()
    if "orientation" in tags:
        exif[0x0112] = tags["orientation"]
    if "date" in tags:
        exif.get_ifd(0x8769)[0x9003] = tags["date"]
    with Image.open(path) as picture:
        picture.save(path, quality="keep", exif=exif)


def rotated(picture, path):
    write(path, cv2.rotate(picture, cv2.ROTATE_90_COUNTERCLOCKWISE))
    add_exif(path, orientation=6)


def stamped(picture):
    return cv2.putText(picture.copy(), "2019 08 17", (190, 232), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (40, 140, 255), 1)


COPIES = {
    "compressed": lambda picture, path: write(path, picture, 40),
    "half": lambda picture, path: write(path, cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)),
    "quarter": lambda picture, path: write(path, cv2.resize(picture, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)),
    "cropped": lambda picture, path: write(path, picture[12:-12, 16:-16]),
    "off centre": lambda picture, path: write(path, picture[24:, :-32]),
    "darker": lambda picture, path: write(path, (picture * 0.7).astype(np.uint8)),
    "grey": lambda picture, path: write(path, cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)),
    "colour cast": lambda picture, path: write(path, (picture * [0.8, 0.95, 1.0]).astype(np.uint8)),
    "rotated": rotated,
    "stamped": lambda picture, path: write(path, stamped(picture)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found(folder, kind):
    COPIES[kind](textured(0), folder / "copy.jpg")
    assert found(sorted(folder.iterdir())) == named("original.png", "copy.jpg")


def test_a_border_is_cut_off(folder):
    write(folder / "copy.jpg", cv2.copyMakeBorder(textured(0), 10, 10, 12, 12, cv2.BORDER_CONSTANT, value=[255] * 3))
    assert found(sorted(folder.iterdir())) == named("copy.jpg", "original.png")  # it has more pixels
    without = textured(0)[..., 0]
    assert (hashes.without_border(without) == without).all()
    assert hashes.without_border(cv2.copyMakeBorder(without, 7, 9, 0, 5, cv2.BORDER_CONSTANT)).shape == pytest.approx(
        (240, 320), abs=2
    )


def test_a_mirrored_picture_is_another_one(folder):
    write(folder / "mirrored.jpg", cv2.flip(textured(0), 1))
    assert found(sorted(folder.iterdir())) == []


@pytest.mark.parametrize("shift", [12, 40])
def test_where_an_object_has_moved_it_is_a_burst(tmp_path, shift):
    background = textured(0)
    paths = [write(tmp_path / f"{i}.jpg", with_disc(background, 140 + i * shift, 120)) for i in range(2)]
    first, second = hash_of(paths[0])[4], hash_of(paths[1])[4]
    assert hashes.differing_bits(first, second)[0] < duplicates.MAX_BITS  # the hashes alone would not tell them apart
    assert found(paths) == []


def hash_of(path):
    facts = hashes.hash_file(str(path))
    return (*facts[:4], np.frombuffer(facts[4], dtype=np.uint8).reshape(len(hashes.BOXES), -1), facts[5])


def test_equal_bytes_are_found_whatever_they_show(folder):
    write(folder / "copy.jpg", textured(0))
    for name in ("same1.png", "same2.png"):
        write(folder / name, textured(0))
    for name in ("plain1.png", "plain2.png", "tiny1.png", "tiny2.png"):
        write(folder / name, np.full((90, 90, 3) if "plain" in name else (1, 1, 3), 200, dtype=np.uint8))
    write(folder / "plain3.png", np.full((91, 90, 3), 200, dtype=np.uint8))  # one colour: nothing says that it is the same
    groups = found(sorted(folder.iterdir()))
    equal = [("original.png", "best copy"), ("same1.png", "equal bytes"), ("same2.png", "equal bytes")]
    assert groups[0] == [*equal, ("copy.jpg", "same photograph")]
    assert sorted(groups[1:]) == [[(f"{n}1.png", "best copy"), (f"{n}2.png", "equal bytes")] for n in ("plain", "tiny")]


def test_the_best_copy_has_most_pixels_then_most_bytes_then_is_the_oldest(tmp_path):
    picture = textured(0)
    for name, quality in (("fine", 95), ("middle", 80), ("coarse", 40)):
        write(tmp_path / f"{name}.jpg", picture, quality)
    write(tmp_path / "small.png", cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    [group] = found(sorted(tmp_path.iterdir()))
    assert [name for name, _ in group] == ["fine.jpg", "middle.jpg", "coarse.jpg", "small.png"]


def test_the_date_is_that_of_the_camera_or_else_of_the_file(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.jpg", textured(0))
        add_exif(tmp_path / f"{name}.jpg", date={"a": "2021:01:01 00:00:00", "b": "2020:01:01 00:00:00"}.get(name, ""))
    os.utime(tmp_path / "c.jpg", (0, 0))
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():  # as many bytes each: what follows a JPEG's end is not read
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(tmp_path / "c.jpg", (0, 0))
    files = [(str(path), size, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    [group] = find_duplicates(files, None)
    dates = [datetime.fromtimestamp(0).isoformat(), "2020-01-01T00:00:00", "2021-01-01T00:00:00"]
    assert [picture.date for picture in group] == dates


def test_every_copy_matches_the_best_one(monkeypatch):
    """Three pictures, of which each resembles the next: the third is no copy of the first."""
    pictures = [hashes.Picture(f"{i}", 10 - i, 10, 10, "") for i in range(4)]
    near = {0: [1], 1: [0, 2, 3], 2: [1, 3], 3: [1, 2]}
    asked = []

    def same(a, b, _):
        asked.append((a.path, b.path))
        return (a.path, b.path) in {("0", "1"), ("0", "3"), ("1", "2"), ("2", "3")}

    monkeypatch.setattr(duplicates, "near_pairs", lambda _: near)
    monkeypatch.setattr(duplicates, "same_photograph", same)
    found = [[picture.path for picture in copies] for copies in duplicates.matching(pictures, None)]
    assert found == [["0", "1", "3"], ["2"]]  # 3 is near 1 only, yet compared with 0
    assert asked == [("0", "1"), ("0", "2"), ("0", "3")]


def test_a_second_run_reads_no_picture(folder, monkeypatch):
    write(folder / "copy.jpg", textured(0))
    first = found(sorted(folder.iterdir()), folder / "cache")
    paths, read = [path for path in sorted(folder.iterdir()) if path.is_file()], []
    hash_file = hashes.hash_file
    monkeypatch.setattr(hashes, "hash_file", lambda path: read.append(os.path.basename(path)) or hash_file(path))
    assert found(paths, folder / "cache") == first and read == []
    write(folder / "copy.jpg", textured(9))
    assert found(paths, folder / "cache") == [] and read == ["copy.jpg"]
    assert found([path for path in paths if path.name != "original.png"], folder / "cache") == []


def test_what_is_kept_is_complete_and_shared(folder):
    """A process that is stopped within a transaction leaves none of it, and another one can write meanwhile."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    with hashes.Hashes(folder / "cache") as one, hashes.Hashes(folder / "cache") as other:
        one.update(files[:2], 0)
        other.update(files, 0)
        with pytest.raises(sqlite3.ProgrammingError):
            one.write([(*files[0], b"new", 1, 1, None, None, None), ("too few",)])
        one.update(files, 0)
        assert len(one.pictures()) == len(other.pictures()) == len(files)
        assert all(picture.width == 320 for picture in one.pictures())


def test_a_damaged_cache_ends_in_a_line(folder):
    found([folder / "original.png"], folder / "cache")
    [path] = (folder / "cache").iterdir()
    path.write_bytes(b"damaged" * 1000)
    with pytest.raises(UserError, match="delete it"):
        found([folder / "original.png"], folder / "cache")
    with pytest.raises(UserError, match="--cache-dir"):
        found([folder / "original.png"], folder / "original.png")


def test_broken_pictures_are_left_out_and_counted(folder, capsys):
    write(folder / "copy.jpg", textured(0))
    whole = (folder / "copy.jpg").read_bytes()
    for name, contents in (("empty.jpg", b""), ("text.jpg", b"no picture"), ("head.png", whole[:200])):
        (folder / name).write_bytes(contents)
    assert found(sorted(folder.iterdir())) == named("original.png", "copy.jpg")
    assert capsys.readouterr().out == "left out 3 pictures that cannot be decoded: empty.jpg, head.png, text.jpg\n"


def test_few_pictures_and_odd_ones(tmp_path):
    assert found([]) == []
    assert found([write(tmp_path / "one.jpg", textured(0))]) == []
    shapes = {"panorama": (40, 9000), "column": (9000, 40), "line": (1, 500), "pixel": (1, 1), "small": (33, 35)}
    paths = [write(tmp_path / f"{name}.png", textured(20 + i, *shape)) for i, (name, shape) in enumerate(shapes.items())]
    alpha = np.dstack([textured(8), np.full((240, 320), 128, dtype=np.uint8)])
    paths += [write(tmp_path / "alpha.png", alpha), write(tmp_path / "deep.png", textured(8).astype(np.uint16) * 257)]
    assert [sorted(name for name, _ in group) for group in found(paths)] == [["alpha.png", "deep.png"]]


def test_many_plain_pictures_are_not_compared_with_each_other(tmp_path):
    paths = [write(tmp_path / f"{level}.png", np.full((64, 64), level, dtype=np.uint8)) for level in range(40)]
    assert found(paths) == []


def test_a_hash_has_the_signs_of_the_lowest_frequencies():
    small = cv2.resize(textured(3)[..., 1], (hashes.SIDE, hashes.SIDE), interpolation=cv2.INTER_AREA)
    cells = small.reshape(32, 4, 32, 4).mean(axis=(1, 3)).round()
    signs = dctn(cells, norm="ortho") > 0
    bits = np.unpackbits(hashes.box_codes(small)[0])
    expected = [signs[i, j] for i, j in [(0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (0, 3)]]
    assert bits[:6].tolist() == expected


def test_differing_bits_are_counted_over_crops():
    a = np.zeros((len(hashes.BOXES), 32), dtype=np.uint8)
    b = np.full_like(a, 255)
    assert hashes.differing_bits(a, b) == (256, 0, True)
    a[3] = 255
    a[3, 0] = 0b11111000  # this crop of a differs from the whole of b in three bits
    assert hashes.differing_bits(a, b) == (3, 3, True) and hashes.differing_bits(b, a) == (3, 3, False)


def test_a_box_is_where_the_crop_was():
    """The centres of the first and the last pixel of a crop from 10% to 60% of 100 pixels; each covers half a pixel."""
    warp = duplicates.box_warp((0.1, 0, 0.6, 1), 100)
    assert (warp @ [0, 0, 1]).tolist() == pytest.approx([9.75, 0])
    assert (warp @ [99, 99, 1]).tolist() == pytest.approx([59.25, 99])
    low = duplicates.scale_warp(warp, 0.5)  # at half the resolution
    assert low == pytest.approx(duplicates.box_warp((0.1, 0, 0.6, 1), 50))


@pytest.mark.drawn
def test_groups_become_records_and_a_drawing(folder):
    write(folder / "copy.jpg", textured(0))
    for number in range(5):
        (folder / f"copy{number}.jpg").write_bytes((folder / "copy.jpg").read_bytes())
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    groups = find_duplicates(files, folder / "cache")
    [[best, *others]] = json.loads(json.dumps(as_records(groups)))
    assert best.items() >= {"width": 320, "height": 240, "relation": "best copy"}.items() and len(others) == 6
    assert set(best) == {"path", "width", "height", "bytes", "date", "relation"}
    draw_duplicates(groups, folder / "drawn.png")
    assert cv2.imread(str(folder / "drawn.png")).shape[1] > 600


@pytest.mark.parametrize(
    "colours", [((220, 30, 30), (30, 30, 220)), ((30, 160, 30), (200, 40, 160)), ((0, 200, 255), (60, 40, 220))]
)
def test_icons_that_differ_in_colour_alone_are_not_the_same(tmp_path, colours):
    for name, colour in zip("ab", colours):
        icon = cv2.circle(np.full((128, 128, 3), 255, np.uint8), (64, 64), 40, colour, -1)
        write(tmp_path / f"{name}.png", cv2.rectangle(icon, (20, 100), (50, 120), (40, 40, 40), -1))
    assert found(sorted(tmp_path.iterdir())) == []
    write(tmp_path / "c.png", cv2.resize(cv2.imread(str(tmp_path / "a.png")), (96, 96), interpolation=cv2.INTER_AREA))
    assert found(sorted(tmp_path.iterdir())) == named("a.png", "c.png")


def test_what_is_alike_in_bulk_is_compared_with_few_others(tmp_path, monkeypatch):
    codes = np.zeros((200, len(hashes.BOXES), 32), dtype=np.uint8)
    codes[:, :, 0] = np.arange(200, dtype=np.uint8)[:, None]
    pictures = [hashes.Picture(f"{i}", 10, 10, 10, "", codes=code) for i, code in enumerate(codes)]
    monkeypatch.setattr(duplicates, "MAX_NEIGHBOURS", 5)
    neighbours = duplicates.near_pairs(pictures)
    assert sum(map(len, neighbours.values())) <= 2 * 5 * 200 and all(
        i in neighbours[j] for i in neighbours for j in neighbours[i]
    )


@pytest.mark.parametrize("orientation", [1, 6])
def test_width_and_height_are_those_of_the_upright_picture(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.tiff", "a.jpg", "a.png", "a.webp"):
        Image.fromarray(textured(0, 600, 800)).save(tmp_path / name, exif=exif)
        assert hashes.hash_file(str(tmp_path / name))[1:3] == ((800, 600) if orientation == 1 else (600, 800)), name


def test_no_pair_is_compared_twice_and_no_picture_is_in_two_groups(monkeypatch):
    """Each of six pictures is near all others. The comparison, which need not be symmetric, finds earlier ones alike only."""
    compared = []
    monkeypatch.setattr(duplicates, "near_pairs", lambda pictures: {i: set(range(6)) - {i} for i in range(6)})
    monkeypatch.setattr(duplicates, "same_photograph", lambda a, b, _: compared.append((a, b)) or b < a)
    assert list(duplicates.matching(list(range(6)), None)) == [[i] for i in range(6)]
    assert len(compared) == len({frozenset(pair) for pair in compared}) == 15
