"""Decode the bytes of a picture file: JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, HEIC, JPEG 2000, PNM, and cameras' raw files.

Its first bytes say what a file is, not the ending of its name; that only tells a camera's raw file from a TIFF. Whatever a
decoder throws becomes a `PictureError`, here and nowhere else.
"""

import functools
import importlib.util
import io
import os
import warnings

MAX_PIXELS = 200_000_000  # larger images are not decoded, to limit memory
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)  # read when OpenCV is imported

import cv2
import numpy as np
from PIL import Image, ImageOps

HEAD = 64  # bytes that tell what a file is
RAW = "raw"
RAW_ENDINGS = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
ENDINGS = {  # what files are called that hold this kind of picture, mostly
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    RAW: tuple(sorted(RAW_ENDINGS)),
}
KIND_OF_ENDING = {ending: kind for kind, endings in ENDINGS.items() for ending in endings}
PICTURE_ENDINGS = set(KIND_OF_ENDING)
PILLOW_KINDS = {"GIF", "AVIF", "HEIF"}  # decoded by Pillow; of a GIF the first frame
OPAQUE_KINDS = {"JPEG", "PPM", ""}
PACKAGES = {"HEIF": "pillow-heif", RAW: "rawpy"}  # optional
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
RAW_MAGIC = (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0")  # of Fuji, Olympus and Panasonic
BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}  # bytes
DEPTHS = 8, 10, 12, 14, 16, 24, 32  # bits that cameras and scanners store in a wider number
BROKEN = "empty, truncated or not a picture"
TOO_LARGE = f"has more than {MAX_PIXELS:,} pixels"
# What becomes of transparency and of more than 8 bits; part of cache keys.
DECODING = "transparent parts white, more than 8 bits by the range used"

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # else Pillow warns of, and then refuses, pictures below our own limit
warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged EXIF data
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # we report broken files ourselves


class PictureError(ValueError):
    """A picture that cannot be decoded: the message says why, without the file's name.

    passing: not because of the file, but for want of memory or of a package, so another try may succeed.
    """

    def __init__(self, message, passing=False):
        super().__init__(message)
        self.passing = passing


@functools.cache
def missing_package(kind):
    """The optional package that pictures of this kind need and that is not installed; empty: they can be read."""
    package = PACKAGES.get(kind, "")
    return package if package and not importlib.util.find_spec(package.replace("-", "_")) else ""


def kind_of(head, ending=""):
    """The kind of picture, a key of ENDINGS, that a file's first HEAD bytes tell; empty where they are of none.

    ending: of the file's name. It tells a raw file, many of which begin as a TIFF does, from a TIFF.
    """
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "GIF"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    if head[4:8] == b"ftyp":  # then its brands, of four letters each
        brands = {head[start : start + 4] for start in range(8, min(len(head), int.from_bytes(head[:4], "big")), 4)}
        if b"crx " in brands:
            return RAW
        return "AVIF" if brands & {b"avif", b"avis"} else "HEIF" if brands & HEIF_BRANDS else ""
    if head[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or head[:4] == b"\xff\x4f\xff\x51":
        return "JPEG2000"
    if head.startswith(RAW_MAGIC) or head[8:10] == b"CR" and head[:2] == b"II":
        return RAW
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return RAW if ending in RAW_ENDINGS else "TIFF"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    return RAW if ending in RAW_ENDINGS else ""


def decode(contents, ending=""):
    """The bytes of a picture file -> (h, w, 3) uint8, RGB, EXIF rotation applied, on white where it is transparent.

    ending: of its name, as for `kind_of`. Raises PictureError where it cannot be decoded.
    """
    ending = ending.lower()
    kind = kind_of(contents[:HEAD], ending)
    if package := missing_package(kind):
        name = ending if KIND_OF_ENDING.get(ending) == kind else kind
        raise PictureError(f"{name} pictures need {package}: pip install {package}", passing=True)
    if not contents:
        raise PictureError(BROKEN)
    try:
        if kind == RAW:
            return decode_raw(contents)
        return decode_with_pillow(contents, kind) if kind in PILLOW_KINDS else decode_with_opencv(contents, kind)
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(TOO_LARGE) from None
    except MemoryError:
        raise PictureError("needs more memory than there is", passing=True) from None
    except Exception:  # of many types: RuntimeError, EOFError, struct.error, SyntaxError, OSError, cv2.error ...
        raise PictureError(f"damaged or truncated {kind}" if kind else BROKEN) from None


def decode_with_opencv(contents, kind):
    buffer = np.frombuffer(contents, dtype=np.uint8)
    try:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB | (0 if kind == "JPEG" else cv2.IMREAD_ANYDEPTH))
    except cv2.error as error:
        raise PictureError(TOO_LARGE if "CV_IO_MAX_IMAGE" in str(error) else BROKEN) from None
    if image is None:
        if kind == "TIFF":  # of real numbers, or of 32 bits
            return decode_with_pillow(contents, kind)
        raise PictureError(BROKEN)
    if image.dtype != np.uint8:
        # Not in the order red, green, blue: with 16 bits OpenCV 5.0 gives wrong colours then.
        image = to_eight_bits(cv2.imdecode(buffer, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)[..., ::-1])
        is_deep = True
    else:
        is_deep = False
    return image if kind in OPAQUE_KINDS else without_transparency(image, contents, kind, is_deep)


def without_transparency(image, contents, kind, is_deep):
    """A picture that OpenCV decoded, which leaves transparency out -> on white. is_deep: of more than 8 bits."""
    try:
        opened = open_with_pillow(contents, kind)
    except PictureError:
        raise
    except Exception:  # OpenCV reads some files that Pillow does not; those have no transparency that we know
        return image
    with opened as picture:
        if not picture.has_transparency_data:
            return image
        rgba = np.asarray(upright(picture).convert("RGBA"))
    if rgba.shape[:2] != image.shape[:2] or rgba[..., 3].min() == 255:
        return image
    return on_white(image if is_deep else rgba[..., :3], rgba[..., 3:])


def on_white(colours, alpha):
    """(h, w, 3) and (h, w, 1) uint8 -> what shows in front of white, (h, w, 3) uint8."""
    image = np.empty(colours.shape, dtype=np.uint8)
    for start in range(0, len(image), 64):  # rows; a large picture's products would not fit into memory at once
        rows = slice(start, start + 64)
        opacity = alpha[rows].astype(np.uint16)
        image[rows] = (colours[rows] * opacity + 255 * (255 - opacity) + 127) // 255
    return image


def to_eight_bits(values):
    """Integers of more than 8 bits, or real numbers, (h, w, 3) or (h, w) -> uint8, by the range that is used.

    Integers lose their lowest bits, with as many of DEPTHS kept as the largest needs. Of real numbers 0 to 1 is the range,
    unless they go beyond.
    """
    if np.issubdtype(values.dtype, np.integer):
        largest = int(values.max())
        bits = next(bits for bits in DEPTHS if largest < 1 << bits)
        return (np.maximum(values, 0) >> (bits - 8)).astype(np.uint8)
    values = np.nan_to_num(values.astype(np.float32), nan=0, posinf=0, neginf=0)
    low, high = min(0, float(values.min())), max(1, float(values.max()))
    return ((values - low) * np.float32(255 / (high - low)) + np.float32(0.5)).astype(np.uint8)


def open_with_pillow(contents, kind):
    """A Pillow picture of this kind, only whose head is read. Raises PictureError where it is too large."""
    if kind == "HEIF":
        register_heif()
    picture = Image.open(io.BytesIO(contents), formats=[kind])  # no other decoder: some formats are programs
    if picture.width * picture.height > MAX_PIXELS:
        raise PictureError(TOO_LARGE)
    return picture


@functools.cache
def register_heif():
    import pillow_heif  # only here: it is optional

    pillow_heif.register_heif_opener()


def upright(picture):
    """A Pillow picture with its EXIF rotation applied; as it is where its EXIF data are damaged."""
    try:
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # of many types; or of the pixels, which the next call then finds as well
        return picture


def decode_with_pillow(contents, kind):
    with open_with_pillow(contents, kind) as picture:
        picture = upright(picture)
        if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
            return np.repeat(to_eight_bits(np.asarray(picture))[..., None], 3, axis=2)
        if picture.has_transparency_data:
            rgba = np.asarray(picture.convert("RGBA"))
            return on_white(rgba[..., :3], rgba[..., 3:])
        return np.asarray(picture.convert("RGB"))


def decode_raw(contents):
    import rawpy  # only here: it is optional

    try:
        with rawpy.imread(io.BytesIO(contents)) as raw:
            return raw.postprocess(use_camera_wb=True)  # also turns it upright
    except rawpy.LibRawError:
        raise PictureError("cannot be decoded by LibRaw") from None
