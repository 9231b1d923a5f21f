"""Perceptual hashes of pictures, kept in a SQLite file, so that a later search for duplicates only reads new and changed ones.

A hash has a bit for each of a picture's BITS lowest frequencies: the sign of its coefficient in the discrete cosine transform
(as pHash; C. Zauner 2010). Size, compression and brightness hardly change it. A crop does, so some crops of each picture are
hashed, too: a copy that was cropped is like one of these. Beside the hashes a small grey version of the picture is kept, for a
comparison of pixels.
"""

import contextlib
import io
import sqlite3
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cache import cache_key
from utils.errors import UserError
from utils.exif import date_taken
from utils.files import digest, read_bytes
from utils.formats import MAX_PIXELS, PILLOW_FORMATS, RAW_ENDINGS, decode
from utils.images import read_ahead

BITS = 256
GRID = 32  # height and width of what is transformed
SIDE = 128  # height and width of the small grey version; the aspect ratio is not kept
EDGES = (0, 0.1)
# Crops as (left, top, right, bottom), in shares of the sides: the whole, 5% or 10% off, and off some edges only.
BOXES = [(0, 0, 1, 1), (0.05, 0.05, 0.95, 0.95), (0.1, 0.1, 0.9, 0.9), (0.05, 0, 0.95, 1), (0, 0.05, 1, 0.95)]
BOXES += [(left, top, left + 0.9, top + 0.9) for left in EDGES for top in EDGES]
BOXES += [(0, 0, 0.9, 1), (0.1, 0, 1, 1), (0, 0, 1, 0.9), (0, 0.1, 1, 1)]
MIN_SIDE = 32  # pixels; smaller pictures, and those of one colour, have no hash
MIN_SPREAD = 4  # standard deviation of the grey levels, 0 to 255
BORDER = 0.15  # of a side: the broadest border that is cut off
PLAIN, BUSY = 6, 12  # standard deviations of a line of pixels in a border and in a photograph
FORMAT = "signs of 256 frequencies, 13 boxes, 128 x 128"  # what is kept; part of the file's name
WRITE_EVERY = 512  # pictures that a killed process may have read in vain
TIMEOUT = 60  # seconds to wait for another command's transaction
ORIENTATION = 0x0112  # tag of the EXIF standard; from 5 on, width and height are exchanged

# Row and column of the BITS lowest frequencies, (2, BITS); that of the mean is left out.
FREQUENCIES = np.array(sorted(np.ndindex(GRID, GRID), key=lambda ij: (sum(ij), ij))[1 : BITS + 1]).T
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS pictures (path TEXT PRIMARY KEY, bytes INTEGER, changed INTEGER, digest BLOB, width INTEGER, "
    "height INTEGER, date TEXT, codes BLOB, small BLOB)",  # changed: in ns; codes, small: NULL where there is no hash
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
        with self.errors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is our limit
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
            self.database.executemany(f"INSERT OR REPLACE INTO pictures VALUES ({', '.join('?' * 9)})", rows)

    def pictures(self):
        """The `Picture`s of the listed files that could be read, in the order of their paths."""
        columns = "path, bytes, width, height, date, changed, digest, codes"
        query = f"SELECT {columns} FROM listed JOIN pictures USING (path, bytes, changed) ORDER BY path"
        found = []
        with self.errors():
            for *facts, date, changed, digest, codes in self.database.execute(query):
                date = date or datetime.fromtimestamp(changed / 1e9).isoformat(timespec="seconds")
                codes = None if codes is None else np.frombuffer(codes, dtype=np.uint8).reshape(len(BOXES), -1)
                found.append(Picture(*facts, date, digest=digest, codes=codes))
        return found

    def small(self, path):
        """The small grey version of a picture that has a hash: (SIDE, SIDE) uint8."""
        with self.errors():
            [contents] = self.database.execute("SELECT small FROM pictures WHERE path = ?", [path]).fetchone()
        return cv2.imdecode(np.frombuffer(contents, dtype=np.uint8), cv2.IMREAD_GRAYSCALE)


def hash_file(path):
    """Reads a picture file. Returns (digest, width, height, date or None, codes or None, small or None).

    codes: the bytes of `box_codes`. small: a JPEG of the small grey version. Raises ValueError or OSError where it cannot be
    decoded.
    """
    contents, ending = read_bytes(path), Path(path).suffix.lower()
    if ending in PILLOW_FORMATS.keys() | RAW_ENDINGS:
        grey = cv2.cvtColor(decode(contents, ending), cv2.COLOR_RGB2GRAY)
        height, width = grey.shape
    else:
        grey, width, height = decode_grey(contents)
    content, date = digest(contents), date_taken(io.BytesIO(contents))
    small = cv2.resize(without_border(grey), (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    if min(width, height) < MIN_SIDE or small.std() < MIN_SPREAD:
        return content, width, height, date, None, None
    jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return content, width, height, date, box_codes(small).tobytes(), jpeg


def decode_grey(contents):
    """The bytes of a picture file -> (grey, width, height), EXIF rotation applied.

    grey: (h, w) uint8, perhaps reduced in size; width and height are the full ones.
    Raises ValueError where it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(contents)) as picture:  # reads the head only
            width, height = picture.size
            if picture.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
        # The decoder of JPEG can leave out the higher frequencies, which saves most of the time for large photographs.
        scale = next((scale for scale in (8, 4, 2) if min(width, height) >= 2 * SIDE * scale), 1)
        flag = cv2.IMREAD_GRAYSCALE if scale == 1 else getattr(cv2, f"IMREAD_REDUCED_GRAYSCALE_{scale}")
        grey = cv2.imdecode(np.frombuffer(contents, dtype=np.uint8), flag)
    except (OSError, SyntaxError, TypeError, cv2.error, Image.DecompressionBombError):
        raise ValueError(f"cannot be decoded, or has more than {MAX_PIXELS:,} pixels") from None
    if grey is None:
        raise ValueError("empty, truncated or not a picture")
    return grey, width, height


def without_border(grey):
    """A grey picture, (h, w), without a border of one colour: lines that are plain, then soon one that is busy."""
    for _ in range(4):
        grey = np.rot90(grey)  # each edge in turn comes to the top
        lines = grey[: round(BORDER * len(grey))].astype(np.float32)
        if len(lines):
            spread, mean = lines.std(axis=1), lines.mean(axis=1)
            plain = (spread < PLAIN) & (np.abs(mean - mean[0]) < PLAIN)
            first = int(np.argmin(plain))  # line that is not plain; 0 if all are
            busy = np.flatnonzero(spread[first : first + 2 + len(lines) // 8] > BUSY)  # compression blurs what is between
            if first and len(busy):
                grey = grey[first + busy[0] + 1 :]
    return np.ascontiguousarray(grey)


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
