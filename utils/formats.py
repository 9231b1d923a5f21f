"""Decode the bytes of a picture file of any format: JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF, HEIC, and cameras' raw files."""

import functools
import importlib.util
import io
import os

MAX_PIXELS = 200_000_000  # larger images are not decoded, to limit memory
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)  # read when OpenCV is imported

import cv2
import numpy as np
from PIL import Image, ImageOps

PILLOW_FORMATS = {
    ".gif": "GIF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}  # decoded by Pillow; of a GIF the first frame
RAW_ENDINGS = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"}
PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", *PILLOW_FORMATS, *RAW_ENDINGS}

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # we report broken files ourselves


@functools.cache
def missing_package(ending):
    """The optional package that pictures with this ending need and that is not installed; empty: they can be read."""
    package = {".heic": "pillow-heif", ".heif": "pillow-heif"}.get(ending, "rawpy" if ending in RAW_ENDINGS else "")
    return package if package and not importlib.util.find_spec(package.replace("-", "_")) else ""


def decode(contents, ending=""):
    """The bytes of a picture file -> (h, w, 3) uint8, RGB, EXIF rotation applied. ending: of its name, such as .heic.

    Raises ValueError or OSError where it cannot be decoded.
    """
    ending = ending.lower()
    if package := missing_package(ending):
        raise ValueError(f"{ending} pictures need {package}: pip install {package}")
    if not contents:
        raise ValueError("empty, truncated or not a picture")
    if ending in PILLOW_FORMATS:
        return decode_with_pillow(contents, PILLOW_FORMATS[ending])
    return decode_raw(contents) if ending in RAW_ENDINGS else decode_with_opencv(contents)


def decode_with_opencv(contents):
    try:
        image = cv2.imdecode(np.frombuffer(contents, dtype=np.uint8), cv2.IMREAD_COLOR_RGB)  # 16 bits become 8
    except cv2.error as error:
        too_large = "CV_IO_MAX_IMAGE" in str(error)
        raise ValueError(f"has more than {MAX_PIXELS:,} pixels" if too_large else "cannot be decoded by OpenCV") from None
    if image is None:
        raise ValueError("empty, truncated or not a picture")
    return image


def decode_with_pillow(contents, kind):
    if kind == "HEIF":
        import pillow_heif  # only here: it is optional

        pillow_heif.register_heif_opener()
    try:
        with Image.open(io.BytesIO(contents), formats=[kind]) as picture:  # only this decoder: the file could be of any format
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from None


def decode_raw(contents):
    import rawpy  # only here: it is optional

    try:
        with rawpy.imread(io.BytesIO(contents)) as raw:
            return raw.postprocess(use_camera_wb=True)  # also turns it upright
    except rawpy.LibRawError as error:
        raise ValueError(f"cannot be decoded by LibRaw ({error})") from None
