"""Captions files and pictures of any bytes: an answer or one line, never a traceback, a hang, or memory without bound.

`python -m pytest tests/test_fuzz.py --long` tries 50,000 captions files and 2,000 pictures of each format.
"""

import resource
import signal
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_captions import LAYOUTS, PAIRS

from captions import load_captions
from utils.errors import UserError
from utils.images import read_image

SECONDS = 20  # after which an answer counts as a hang
MEBIBYTES = 1800  # that reading a picture may take: three copies of the largest that is decoded
SPECIAL = [b"\0", b"\n", b"\r", b'"', b",", b"\t", b"|", b";", b"#0\t", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"../"]
SPECIAL += [b"{", b"]", b"image", b"caption", b"NaN", b"null", b"1e999", b"-1", b"0.jpg", b"a" * 200_000, b"[" * 5000]
FORMATS = [".jpg", ".png", ".webp", ".bmp", ".tiff"]


@st.composite
def harmed(draw, originals):
    """One of some files' contents with a few bytes changed, cut out, doubled or put in."""
    content = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 4, 40, 10**6]))
        other = draw(st.one_of(st.binary(max_size=8), st.sampled_from(SPECIAL), st.just(content[start:end] * 2)))
        content = content[:start] + other + content[end:]
    return content


@pytest.fixture
def no_hang():
    def late(*_):
        raise AssertionError(f"no answer after {SECONDS} s")

    earlier = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, earlier)


def rounds(times, short, long):
    return settings(
        max_examples=times(short, long), deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def test_any_captions_file_gives_a_table_or_one_line(tmp_path, no_hang, times):
    (tmp_path / "Images").mkdir()
    for name, _ in PAIRS:
        (tmp_path / "Images" / name).touch()
    layouts = {name: text.encode() for name, text in LAYOUTS.items()}
    lists = "".join(f"{i}.jpg\n" for i in range(10)).encode()
    answers = []

    @rounds(times, 800, 50_000)
    @given(st.sampled_from(sorted(layouts)), st.data(), st.booleans())
    def one(name, data, skip_bad):
        content = data.draw(st.one_of(harmed([layouts[name]]), harmed(list(layouts.values())), st.binary()))
        train_list = data.draw(st.one_of(st.none(), harmed([lists])))
        (tmp_path / name).write_bytes(content)
        if train_list is not None:
            (tmp_path / "my.trainImages.txt").write_bytes(train_list)
        no_hang()
        try:
            table, image_dir, _ = load_captions(tmp_path, skip_bad=skip_bad)
            assert len(table) and all((image_dir / image).is_file() for image in table["image"])
            assert set(table["split"]) <= {"train", "val", "test", ""}
            answers.append("table")
        except UserError as error:
            assert str(error).isprintable()
            answers.append("line")
        finally:
            (tmp_path / name).unlink()
            (tmp_path / "my.trainImages.txt").unlink(missing_ok=True)

    one()
    assert {"table", "line"} == set(answers)


def pictures(ending):
    """The same picture in a format, small enough that most bytes matter, in colour, grey and with transparency."""
    random = np.random.default_rng(0).integers(256, size=(12, 16, 4), dtype=np.uint8)
    found = [random[..., :3], random[..., 0]] + ([random] if ending in (".png", ".webp", ".tiff") else [])
    return [cv2.imencode(ending, picture)[1].tobytes() for picture in found]


def peak_mebibytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def read_any(path, content):
    """What is wrong with a picture; None where it can be read."""
    path.write_bytes(content)
    try:
        picture = read_image(path, 24)
    except (ValueError, OSError) as error:
        assert str(error).isprintable()
        return str(error)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and min(picture.shape[:2]) == 24


@pytest.mark.parametrize("ending", FORMATS)
def test_any_picture_file_gives_a_picture_or_one_line(ending, tmp_path, no_hang, times):
    originals, before, answers = pictures(ending), peak_mebibytes(), []

    @rounds(times, 100, 2000)
    @given(harmed(originals))
    def one(content):
        no_hang()
        answers.append(read_any(tmp_path / f"picture{ending}", content))

    one()
    assert None in answers and any(answers)
    assert peak_mebibytes() - before < MEBIBYTES


def declared(ending, side):
    """A small picture whose header declares side x side pixels."""
    content = bytearray(pictures(ending)[0])
    if ending == ".png":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    elif ending == ".jpg":
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", side, side)
    elif ending == ".bmp":
        content[18:26] = struct.pack("<ii", side, side)
    elif ending == ".tiff":
        [directory] = struct.unpack("<I", content[4:8])
        for entry in range(directory + 2, directory + 2 + 12 * content[directory], 12):
            if struct.unpack("<H", content[entry : entry + 2])[0] in (256, 257):  # width and height
                content[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, side)
    return bytes(content)


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".tiff"])  # a WebP cannot declare more than 16,383
def test_a_picture_that_declares_50_000_x_50_000_is_refused_before_it_is_decoded(ending, tmp_path, forked):
    process = forked(refuse, tmp_path / f"huge{ending}", declared(ending, 50_000))
    process.join()
    assert process.exitcode == 0


def refuse(path, content):
    before = peak_mebibytes()
    assert read_any(path, content) == "has more than 200,000,000 pixels"
    assert peak_mebibytes() - before < 50
