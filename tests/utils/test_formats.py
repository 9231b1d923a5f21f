"""Pictures of all formats are decoded, and what cannot be is named."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from utils import formats
from utils.exif import date_taken
from utils.formats import decode
from utils.images import decode_image


def halves(height=40, width=60):
    """Red at the left, blue at the right."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = (220, 30, 30), (30, 30, 220)
    return Image.fromarray(picture)


def saved(picture, **options):
    contents = io.BytesIO()
    picture.save(contents, **options)
    return contents.getvalue()


def is_halves(image):
    return (
        abs(image[20, 10].astype(int) - (220, 30, 30)).max() < 20 and abs(image[20, 50].astype(int) - (30, 30, 220)).max() < 20
    )


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff", "gif", "avif"])
def test_each_format_is_decoded(kind):
    image = decode(saved(halves(), format=kind), f".{kind}")
    assert image.shape == (40, 60, 3) and image.dtype == np.uint8 and is_halves(image)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    others = [Image.new("RGB", (60, 40), color) for color in ("green", "white")]
    assert is_halves(decode(saved(halves(), format=kind, save_all=True, append_images=others, duration=100), f".{kind}"))


def test_sixteen_bits_transparency_and_palettes_become_eight_bits_of_colour():
    grey = Image.fromarray(np.linspace(0, 65535, 60, dtype=np.uint16)[None].repeat(40, axis=0))
    image = decode(saved(grey, format="png"), ".png")
    assert image.shape == (40, 60, 3) and image[0, 0].max() < 3 and image[0, -1].min() > 252
    assert is_halves(decode(saved(halves().convert("RGBA"), format="png"), ".png"))
    assert is_halves(decode(saved(halves().quantize(4), format="png"), ".png"))


def test_a_panorama_is_cut_to_its_middle_and_a_line_of_pixels_is_decoded():
    image = decode_image(saved(Image.new("L", (30_000, 20)), format="png"), 32)
    assert image.shape == (32, 96, 3)
    assert decode_image(saved(Image.new("L", (100_000, 1)), format="png"), 32).shape == (32, 96, 3)
    assert decode_image(saved(Image.new("L", (1, 1)), format="png"), 32).shape == (32, 32, 3)


@pytest.mark.parametrize("ending", [".png", ".gif", ".avif", ".heic", ".dng"])
def test_what_is_no_picture_is_named(ending):
    for contents in (b"", b"text", saved(halves(), format="png")[:60]):
        with pytest.raises((ValueError, OSError)):
            decode(contents, ending)


def test_a_raw_file_needs_rawpy_and_is_then_developed(monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    formats.missing_package.cache_clear()
    with pytest.raises(ValueError, match=".nef pictures need rawpy: pip install rawpy"):
        decode(b"raw", ".NEF")

    class Raw:  # stands for rawpy's, as no small raw file is free to be shared
        def __init__(self, file):
            self.contents = file.read()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def postprocess(self, use_camera_wb):
            if self.contents != b"raw":
                raise Broken("no raw file")
            return np.asarray(halves())

    class Broken(Exception):
        pass

    monkeypatch.setitem(sys.modules, "rawpy", types.SimpleNamespace(imread=Raw, LibRawError=Broken))
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: name)
    formats.missing_package.cache_clear()
    assert is_halves(decode(b"raw", ".nef"))
    with pytest.raises(ValueError, match="cannot be decoded by LibRaw"):
        decode(b"other", ".nef")
    formats.missing_package.cache_clear()


def test_the_date_is_that_of_the_camera(tmp_path):
    exif = Image.Exif()
    exif[0x0132] = "2022:01:01 10:00:00"  # when the file was changed
    halves().save(tmp_path / "changed.jpg", exif=exif)
    assert date_taken(tmp_path / "changed.jpg") == "2022-01-01T10:00:00"
    exif.get_ifd(0x8769)[0x9003] = "2021:06:30 23:59:59"
    halves().save(tmp_path / "taken.jpg", exif=exif)
    assert date_taken(tmp_path / "taken.jpg") == "2021-06-30T23:59:59"
    for text in ("0000:00:00 00:00:00", "yesterday", "", "    :  :     :  :  "):
        exif.get_ifd(0x8769)[0x9003] = exif[0x0132] = text
        halves().save(tmp_path / "none.jpg", exif=exif)
        assert date_taken(tmp_path / "none.jpg") is None
    halves().save(tmp_path / "without.png")
    (tmp_path / "text.jpg").write_text("no picture")
    assert date_taken(tmp_path / "without.png") is None and date_taken(tmp_path / "text.jpg") is None
