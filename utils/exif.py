"""When a picture was taken, from its EXIF data."""

import contextlib
from datetime import datetime

from PIL import Image

EXIF_IFD, DATE_ORIGINAL, DATE_CHANGED = 0x8769, 0x9003, 0x0132  # tags of the EXIF standard


def date_taken(file):
    """The time when a picture was taken, as its camera's clock had it: "2021-06-03T12:30:00"; None where EXIF has none.

    file: a path, or an open file. Only the file's head is read.
    """
    try:
        with Image.open(file) as picture:
            exif = picture.getexif()
        texts = exif.get_ifd(EXIF_IFD).get(DATE_ORIGINAL), exif.get(DATE_CHANGED)
    except Exception:  # of many types: not a picture, or damaged EXIF data, which is no reason to leave the picture out
        return None
    for text in texts:
        with contextlib.suppress(TypeError, ValueError):  # missing, or "0000:00:00 00:00:00" of a camera without a clock
            return datetime.strptime(str(text).strip("\0 "), "%Y:%m:%d %H:%M:%S").isoformat()
    return None
