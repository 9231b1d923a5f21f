"""Perceptual hashes of pictures, kept in a SQLite file, so that a later search for duplicates only reads new and changed ones.

A hash has a bit for each of a picture's BITS lowest frequencies: the sign of its coefficient in the discrete cosine transform
(as pHash; C. Zauner 2010). Size, compression and brightness hardly change it. A crop does, so some crops of each picture are
hashed, too: a copy that was cropped is like one of these. Beside the hashes a small grey version of the picture is kept, for a
comparison of pixels.
"""

import contextlib
import io
import sqlite3
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from utils.cache import cache_key
from utils.errors import UserError
from utils.exif import date_taken
from utils.files import digest, read_bytes
from utils.formats import DECODING, HEAD, decode, kind_of, open_with_pillow
from utils.images import read_ahead

BITS = 256
GRID = 32  # height and width of what is transformed
SIDE = 128  # height and width of the small grey version; the aspect ratio is not kept
TINY = 16  # height and width of the colours
EDGES = (0, 0.1)
# Crops as (left, top, right, bottom), in shares of the sides: the whole, 5% or 10% off, and off some edges only.
BOXES = [(0, 0, 1, 1), (0.05, 0.05, 0.95, 0.95), (0.1, 0.1, 0.9, 0.9), (0.05, 0, 0.95, 1), (0, 0.05, 1, 0.95)]
BOXES += [(left, top, left + 0.9, top + 0.9) for left in EDGES for top in EDGES]
BOXES += [(0, 0, 0.9, 1), (0.1, 0, 1, 1), (0, 0, 1, 0.9), (0, 0.1, 1, 1)]
MIN_SIDE = 32  # pixels; smaller pictures, and those of one colour, have no hash
MIN_SPREAD = 4  # standard deviation of the grey levels, 0 to 255
BORDER = 0.15  # of a side: the broadest border that is cut off
PLAIN, BUSY = 6, 12  # standard deviations of a line of pixels in a border and in a photograph
FORMAT = f"signs of 256 frequencies, 13 boxes, 128 x 128, 16 x 16 colours, {DECODING}"  # what is kept; part of the file's name
WRITE_EVERY = 512  # pictures that a killed process may have read in vain
TIMEOUT = 60  # seconds to wait for another command's transaction

# Row and column of the BITS lowest frequencies, (2, BITS); that of the mean is left out.
FREQUENCIES = np.array(sorted(np.ndindex(GRID, GRID), key=lambda ij: (sum(ij), ij))[1 : BITS + 1]).T
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS pictures (path TEXT PRIMARY KEY, bytes INTEGER, changed INTEGER, digest BLOB, width INTEGER, "
    "height INTEGER, date TEXT, codes BLOB, small BLOB, colours BLOB)",  # changed: in ns; the last three: NULL without a hash
    "CREATE TEMP TABLE listed (path TEXT PRIMARY KEY, bytes INTEGER, changed INTEGER) WITHOUT ROWID",
)


@dataclass
class Picture:
    """A picture file. date: when it was taken, or else changed, as in ISO 8601. relation: to the best copy of its group."""

    path: str
    bytes: int
    width: int
    height: int
    date: str
    relation: str = ""
    digest: bytes = field(default=b"", repr=False)  # of the file's contents
    codes: np.ndarray | None = field(default=None, repr=False)  # (len(BOXES), BITS / 8) uint8, or None without a hash
    colours: np.ndarray | None = field(default=None, repr=False)  # (TINY, TINY, 3) uint8, or None without a hash

    def label(self):
        """What a person wants to know of it beside its name."""
        return f"{self.width} x {self.height}, {self.bytes / 1000:,.0f} kB, {self.relation}"


class Hashes:
    """The hashes of picture files; a context, which closes the SQLite file at its end.

    cache_dir: folder of that file; None: in memory only.
    Raises UserError where the folder cannot be used or the file is damaged, here and in the methods.
    """

    def __init__(self, cache_dir):
        self.path = Path(cache_dir) / f"duplicates-{cache_key(FORMAT, cv2.__version__)}.sqlite" if cache_dir else ":memory:"
        with self.errors():
            if cache_dir:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(self.path, timeout=TIMEOUT, isolation_level="IMMEDIATE")
            for statement in SCHEMA:
                self.database.execute(statement)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.database.close()

    @contextlib.contextmanager
    def errors(self):
        """A context that turns errors of the disk and of SQLite into a UserError."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise UserError(f"{self.path}: cannot be used ({error}); free space, or name another --cache-dir") from None
        except sqlite3.DatabaseError as error:
            raise UserError(f"{self.path}: damaged ({error}); delete it, then run the command again") from None

    def update(self, files, num_workers):
        """Lists files, (path, bytes, modification time in ns), and hashes those that are new or have changed.

        Returns what is wrong with each file that cannot be read, as texts.
        """
        files, rows, problems = list(files), [], []  # listed first: finding them can take long, and a transaction locks
        with self.errors():
            with self.database:
                self.database.execute("DELETE FROM listed")
                self.database.executemany("INSERT OR REPLACE INTO listed VALUES (?, ?, ?)", files)
            new = "SELECT * FROM listed EXCEPT SELECT path, bytes, changed FROM pictures"
            stale = self.database.execute(f"{new} ORDER BY path").fetchall()
            read = read_ahead(hash_file, [path for path, *_ in stale], num_workers)
            progress = tqdm(read, total=len(stale), desc="hashing", leave=False, unit="img", disable=None)
            for entry, (hashed, problem) in zip(stale, progress):
                if problem:
                    problems.append(problem)
                else:
                    rows.append((*entry, *hashed))
                if len(rows) == WRITE_EVERY:
                    self.write(rows)
                    rows = []
            self.write(rows)
        return problems

    def write(self, rows):
        with self.database:  # a transaction: all of these or none
            self.database.executemany(f"INSERT OR REPLACE INTO pictures VALUES ({', '.join('?' * 10)})", rows)

    def pictures(self):
        """The `Picture`s of the listed files that could be read, in the order of their paths."""
        columns = "path, bytes, width, height, date, changed, digest, codes, colours"
        query = f"SELECT {columns} FROM listed JOIN pictures USING (path, bytes, changed) ORDER BY path"
        found = []
        with self.errors():
            for *facts, date, changed, digest, codes, colours in self.database.execute(query):
                date = date or datetime.fromtimestamp(changed / 1e9).isoformat(timespec="seconds")
                codes = None if codes is None else np.frombuffer(codes, dtype=np.uint8).reshape(len(BOXES), -1)
                colours = None if colours is None else np.frombuffer(colours, dtype=np.uint8).reshape(TINY, TINY, 3)
                found.append(Picture(*facts, date, digest=digest, codes=codes, colours=colours))
        return found

    def small(self, path):
        """The small grey version of a picture that has a hash: (SIDE, SIDE) uint8."""
        with self.errors():
            [contents] = self.database.execute("SELECT small FROM pictures WHERE path = ?", [path]).fetchone()
        return cv2.imdecode(np.frombuffer(contents, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)


def hash_file(path):
    """Reads a picture file. Returns (digest, width, height, date or None, codes or None, small or None, colours or None).

    codes: the bytes of `box_codes`. small: a JPEG of the small grey version. colours: the bytes of (TINY, TINY, 3) uint8, RGB.
    Raises `utils.formats.PictureError` where it cannot be decoded, OSError where it cannot be read.
    """
    contents = read_bytes(path)
    image, width, height = decode_reduced(contents, Path(path).suffix.lower())
    content, date = digest(contents), date_taken(io.BytesIO(contents))
    grey, image = without_border(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), image)
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    if min(width, height) < MIN_SIDE or small.std() < MIN_SPREAD:
        return content, width, height, date, None, None, None
    jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    colours = cv2.resize(image, (TINY, TINY), interpolation=cv2.INTER_AREA).tobytes()
    return content, width, height, date, box_codes(small).tobytes(), jpeg, colours


def decode_reduced(contents, ending):
    """The bytes of a picture file -> ((h, w, 3) uint8, width, height), as `utils.formats.decode`, perhaps reduced in size.

    width, height: the full ones.
    """
    # The decoder of JPEG can leave out the higher frequencies, which saves most of the time for large photographs.
    width, height = jpeg_size(contents, ending)
    scale = next((scale for scale in (8, 4, 2) if min(width, height) >= 2 * SIDE * scale), 1)
    if scale > 1:
        with contextlib.suppress(cv2.error):  # `decode` then says what is wrong
            image = cv2.imdecode(np.frombuffer(contents, dtype=np.uint8), getattr(cv2, f"IMREAD_REDUCED_COLOR_{scale}"))
            if image is not None:
                turned = (image.shape[1] > image.shape[0]) != (width > height)  # by the EXIF rotation
                return image[..., ::-1], *((height, width) if turned else (width, height))
    image = decode(contents, ending)
    return image, image.shape[1], image.shape[0]


def jpeg_size(contents, ending):
    """The width and height of a JPEG, before its EXIF rotation; zeros for what is none."""
    if kind_of(contents[:HEAD], ending) != "JPEG":
        return 0, 0
    try:
        with open_with_pillow(contents, "JPEG") as picture:
            return picture.size
    except Exception:  # of many types: a damaged head; `decode` then says what is wrong
        return 0, 0


def without_border(grey, colours=None):
    """A grey picture, (h, w), without a border of one colour: lines that are plain, then soon one that is busy.

    colours: the same in colour, (h, w, 3); given them, the pair of both without that border.
    """
    pictures = [grey] if colours is None else [grey, colours]
    for _ in range(4):
        pictures = [np.rot90(picture) for picture in pictures]  # each edge in turn comes to the top
        grey = pictures[0]
        lines = grey[: round(BORDER * len(grey))].astype(np.float32)
        if len(lines):
            spread, mean = lines.std(axis=1), lines.mean(axis=1)
            plain = (spread < PLAIN) & (np.abs(mean - mean[0]) < PLAIN)
            first = int(np.argmin(plain))  # line that is not plain; 0 if all are
            busy = np.flatnonzero(spread[first : first + 2 + len(lines) // 8] > BUSY)  # compression blurs what is between
            if first and len(busy):
                pictures = [picture[first + busy[0] + 1 :] for picture in pictures]
    pictures = [np.ascontiguousarray(picture) for picture in pictures]
    return pictures[0] if colours is None else pictures


def box_codes(small):
    """The hashes of a small grey picture's BOXES: (len(BOXES), BITS / 8) uint8, BITS in each row, lowest frequencies first."""
    rows, columns = FREQUENCIES
    bits = []
    for box in BOXES:
        left, top, right, bottom = (round(share * len(small)) for share in box)
        cells = cv2.resize(small[top:bottom, left:right], (GRID, GRID), interpolation=cv2.INTER_AREA)
        bits.append(cv2.dct(cells.astype(np.float32))[rows, columns] > 0)
    return np.packbits(bits, axis=1)


def differing_bits(a, b):
    """How many bits of two pictures' hashes differ, where the whole of one is compared with that crop of the other that is
    most like it.

    a, b: `Picture.codes`. Returns (number of bits, index of the crop in BOXES, whether it is a crop of a).
    """
    of_a, of_b = (np.bitwise_count(boxes ^ whole[0]).sum(axis=1) for boxes, whole in ((a, b), (b, a)))
    cropped, counts = (True, of_a) if of_a.min() <= of_b.min() else (False, of_b)
    return int(counts.min()), int(counts.argmin()), cropped
