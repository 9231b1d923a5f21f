"""When a picture was taken, from its EXIF or XMP data."""

import contextlib
import io
import re
from datetime import datetime

from PIL import Image

EXIF_IFD = 0x8769  # the part of EXIF data with the date of the camera
DATE_ORIGINAL, DATE_DIGITIZED, DATE_CHANGED = 0x9003, 0x9004, 0x0132  # tags of the EXIF standard
# 2021:06:30 23:59:59, 2021-06-30T23:59:59.25Z, 2021-06-30, 20210630T235959; what follows, as +0200, is left out.
DATE = re.compile(
    r"\s*(\d{4})[:\-/. ]?\s?(\d{1,2})[:\-/. ]?\s?(\d{1,2})(?!\d)?(?:[T\s]+(\d{1,2}):?\s?(\d{1,2})(?::?\s?(\d{1,2}))?)?"
)
XMP_DATE = re.compile(r"(?:exif:DateTimeOriginal|photoshop:DateCreated|xmp:CreateDate)(?:=[\"']|>)\s*([^<\"']+)")
TIFF_HEADS = {
    b"IIRO": b"II*\0",
    b"IIRS": b"II*\0",
    b"IIU\0": b"II*\0",
    b"MMOR": b"MM\0*",
}  # of raw files: what a TIFF begins with
TIFF_HEADS |= {head: head for head in (b"II*\0", b"MM\0*")}


def date_taken(file):
    """The time when a picture was taken, as its camera's clock had it: "2021-06-03T12:30:00"; None where nothing says it.

    file: a path, or an open file. The first of: the original's date, that of its digitisation, that of the last change, XMP.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = file if hasattr(file, "read") else stack.enter_context(open(file, "rb"))
            exif, xmp = read_exif(file)
        except Exception:  # of many types: not a picture, or damaged EXIF data, which is no reason to leave the picture out
            return None
    camera = {}
    with contextlib.suppress(Exception):  # this part can be damaged by itself
        camera = exif.get_ifd(EXIF_IFD)
    texts = [camera.get(DATE_ORIGINAL), exif.get(DATE_ORIGINAL), camera.get(DATE_DIGITIZED), exif.get(DATE_CHANGED)]
    return next(filter(None, map(parse_date, [*texts, *XMP_DATE.findall(xmp)])), None)


def read_exif(file):
    """(Exif, the text of XMP data) of an open file. The first is read without its pixels' format, which may be a raw file's."""
    head = file.read(16)
    if head[:4] in TIFF_HEADS:
        return load_exif(TIFF_HEADS[head[:4]] + head[4:] + file.read()), ""
    if head[4:12] == b"ftypcrx ":  # Canon's CR3: TIFF data in two boxes, of the picture and of the camera
        contents = head + file.read()
        exif = load_exif(contents[contents.index(b"CMT1") + 4 :])
        exif._ifds = {EXIF_IFD: dict(load_exif(contents[contents.index(b"CMT2") + 4 :]))}
        return exif, ""
    if head.startswith(b"FUJIFILMCCD-RAW"):  # has a JPEG in it
        contents = head + file.read()
        file = io.BytesIO(contents[int.from_bytes(contents[84:88], "big") :])
    file.seek(0)
    with Image.open(file) as picture:
        xmp = picture.info.get("xmp") or picture.info.get("XML:com.adobe.xmp") or ""
        return picture.getexif(), xmp if isinstance(xmp, str) else xmp.decode(errors="replace")


def load_exif(contents):
    """The Exif of data that begin as a TIFF file does."""
    exif = Image.Exif()
    exif.load(contents)
    return exif


def parse_date(value):
    """A date in one of the ways that cameras and programs write it, as "2021-06-03T12:30:00"; None for anything else."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    found = DATE.match(text)
    if not found:
        return None
    try:  # "0000:00:00 00:00:00" is of a camera without a clock
        return datetime(*(int(number or 0) for number in found.groups())).isoformat()
    except ValueError:
        return None
