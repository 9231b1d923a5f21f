"""Pictures of all formats are decoded, and what cannot be is named."""

import io
import sys
import types

import cv2
import numpy as np
import pytest
from PIL import Image

from utils import formats
from utils.exif import date_taken
from utils.formats import PictureError, decode
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


@pytest.mark.parametrize("kind", ["png", "webp", "gif", "tiff", "palette", "avif"])
def test_transparent_parts_are_white(kind):
    picture = np.zeros((40, 60, 4), np.uint8)  # black, on the left transparent
    picture[:, 30:, 3] = 255
    picture = Image.fromarray(picture)
    if kind == "palette":
        picture, kind = picture.quantize(4), "png"
    image = decode(saved(picture, format=kind, **({"lossless": True} if kind == "webp" else {})), f".{kind}")
    assert image.shape == (40, 60, 3) and image[20, 10].min() > 245 and image[20, 50].max() < 10


def test_opaque_pictures_stay_the_same_to_the_bit():
    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    for contents in (saved(Image.fromarray(pixels), format=kind) for kind in ("png", "jpeg", "bmp", "tiff", "webp")):
        expected = cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert (decode(contents) == expected).all()
    assert (decode(saved(Image.fromarray(pixels).convert("RGBA"), format="png")) == pixels).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("ending", [".png", ".tiff"])
def test_more_than_eight_bits_are_scaled_by_the_range_used(bits, ending):
    grey = np.linspace(0, 2**bits - 1, 60).astype(np.uint16)[None].repeat(40, axis=0)
    blue = np.dstack([grey, grey * 0, grey * 0])  # blue, green, red
    for picture in (grey, blue):
        image = decode(cv2.imencode(ending, picture)[1].tobytes(), ending)
        assert image[0, 0].max() < 3 and image[0, -1, 2] == 255 and abs(int(image[0, 30, 2]) - 129) < 5
        assert picture is grey or image[..., :2].max() == 0


def test_tiffs_of_real_numbers_are_read():
    contents = saved(Image.fromarray(np.linspace(0, 1, 60, dtype=np.float32)[None].repeat(40, axis=0)), format="tiff")
    assert decode(contents)[0, 0].max() == 0 and decode(contents)[0, -1].min() == 255


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "avif", "webp"])
@pytest.mark.parametrize("ending", [".heic", ".gif", ".jpg", ".avif", ".nef", ""])
def test_contents_count_and_not_the_ending(kind, ending):
    assert is_halves(decode(saved(halves(), format=kind), ending))


def harmed(contents, count, seed):
    """Truncations, and changes of one byte."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        if number % 3:
            place = int(rng.integers(len(contents)))
            yield contents[:place] + bytes([contents[place] ^ int(rng.integers(1, 256))]) + contents[place + 1 :]
        else:
            yield contents[: int(rng.integers(len(contents)))]


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff", "gif", "avif", "heif", "jpeg2000", "ppm"])
def test_whatever_a_decoder_throws_is_one_kind_of_error(kind, times):
    if kind == "heif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes()} if kind in ("jpeg", "png", "webp", "avif", "heif") else {}
    mode = "RGBA" if kind in ("png", "webp", "tiff") else "RGB"
    contents, failed = saved(halves(12, 16).convert(mode), format=kind, **options), 0
    for broken in harmed(contents, times(150, 3000), 0):
        try:
            assert decode(broken, f".{kind}").dtype == np.uint8
        except PictureError as error:  # and nothing else
            failed += 1
            assert str(error) and "object at" not in str(error) and "<" not in str(error)
        assert date_taken(io.BytesIO(broken)) is None
    assert failed


def test_what_a_decoder_throws_of_any_type_becomes_a_picture_error(monkeypatch):
    contents = saved(halves(), format="gif")
    for thrown in (RuntimeError("x"), EOFError(), MemoryError(), SyntaxError("x"), OSError(5, "x"), IndexError(), KeyError(1)):

        def throw(*_, thrown=thrown, **__):
            raise thrown

        monkeypatch.setattr(formats.Image, "open", throw)
        with pytest.raises(PictureError) as caught:
            decode(contents, ".gif")
        assert caught.value.passing == isinstance(thrown, MemoryError)


def test_between_pillows_limit_and_ours_there_is_a_date():
    exif = Image.Exif()
    exif[0x0132] = "2022:01:01 10:00:00"
    assert date_taken(io.BytesIO(saved(Image.new("1", (19_000, 10_000)), format="png", exif=exif))) == "2022-01-01T10:00:00"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("2021:06:30 23:59:59+0000", "2021-06-30T23:59:59"),
        ("2021:06:30 23:59:59.25 +02:00", "2021-06-30T23:59:59"),
        ("2021-06-30T23:59:59.5Z", "2021-06-30T23:59:59"),
        ("2021/06/30 1:02", "2021-06-30T01:02:00"),
        ("20210630T235959", "2021-06-30T23:59:59"),
        ("2021:06:30", "2021-06-30T00:00:00"),
        ("0000:00:00 00:00:00", None),
        ("2021:13:30 00:00:00", None),
        ("30/06/2021", None),
    ],
)
def test_dates_are_read_as_cameras_and_programs_write_them(text, expected):
    for tag in (0x9003, 0x9004):  # the second: when it was digitised
        exif = Image.Exif()
        exif[0x0110] = "model"
        exif.get_ifd(0x8769)[tag] = text
        assert date_taken(io.BytesIO(saved(halves(), format="jpeg", exif=exif))) == expected
        assert date_taken(io.BytesIO(exif.tobytes()[6:])) == expected  # as a camera's raw file begins, whatever its pixels are
