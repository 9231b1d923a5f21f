"""What is kept of a gallery on disk: a SQLite file with its pictures, and beside it a file with their vectors.

The file of vectors is memory-mapped: a header, then a row of float16 numbers per picture. Rows are only added; a row whose
picture was deleted or has changed stays behind until `Store.compact`. A block of rows is on disk, with its checksum, before
SQLite's transaction names it, so a process that is killed leaves nothing half-written. Two processes can use the same store.

A generation is one numbering of the rows; its name is in the names of the files beside the database. What a command searches is
first listed in a temporary table.
"""

import contextlib
import os
import sqlite3
import unicodedata
import uuid
import zlib

import cv2
import numpy as np
import PIL

from utils.cache import cache_key
from utils.formats import DECODING

SCHEMA = (
    # changed: in ns; row: NULL if the picture cannot be decoded; taken: NULL if EXIF has no date
    # content: a hash of the file, or the DECODERS that could not read it
    "CREATE TABLE IF NOT EXISTS pictures (path TEXT PRIMARY KEY, bytes INTEGER NOT NULL, "
    "changed INTEGER NOT NULL, row INTEGER UNIQUE, content BLOB, taken TEXT) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS blocks (first INTEGER PRIMARY KEY, count INTEGER NOT NULL, checksum INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS generation (name TEXT NOT NULL)",  # in the names of the files that belong to this database
    "CREATE TEMP TABLE listed (path TEXT PRIMARY KEY, bytes INTEGER, changed INTEGER) WITHOUT ROWID",
)
# The time a picture was taken, or else that of its file, as 2021-06-03T12:30:00.
DATE = "COALESCE(taken, strftime('%Y-%m-%dT%H:%M:%S', pictures.changed / 1000000000, 'unixepoch', 'localtime'))"
DECODERS = cache_key(DECODING, cv2.__version__, PIL.__version__).encode()  # others may read what these could not
STALE = (  # listed files that are new, have changed or were not decoded by older decoders; further conditions may follow
    "listed LEFT JOIN pictures USING (path) WHERE (pictures.path IS NULL "
    "OR pictures.bytes != listed.bytes OR pictures.changed != listed.changed "
    f"OR pictures.row IS NULL AND pictures.content IS NOT x'{DECODERS.hex()}')"
)
FORMAT = "pictures with a hash of the file, a date, and their hubness"  # part of cache keys
TIMEOUT = 60  # seconds to wait for another command's transaction
MAGIC = b"CLIP vectors 1"
HEADER = 64  # bytes, so that rows are aligned
BLOCK = 32_768  # rows that are copied at once
MAX_UNUSED = 0.2  # share of rows without a picture, above which they are removed


class Store:
    """A gallery's pictures and vectors of a width. path: of the SQLite file.

    Raises sqlite3.DatabaseError where it is damaged, and ValueError where the file of vectors is.
    """

    def __init__(self, path, width):
        self.path, self.width = path, width
        self.database = sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None, check_same_thread=False)
        self.database.create_function("nfc", 1, lambda text: unicodedata.normalize("NFC", text), deterministic=True)
        with self.transaction():
            for statement in SCHEMA:
                self.database.execute(statement)
            self.database.execute(
                "INSERT INTO generation SELECT ? WHERE NOT EXISTS (SELECT * FROM generation)", [uuid.uuid4().hex[:8]]
            )
            self.vectors()
            self.remove_leftovers()

    def remove_leftovers(self):
        """Removes files of earlier generations, which a process that was killed may have left."""
        own = self.companion("").name
        for path in self.path.parent.glob(f"{self.path.stem}-*"):
            if path.suffix in (".vectors", ".faiss") and path.stem != own:
                with contextlib.suppress(OSError):  # on Windows one that another process has mapped stays
                    path.unlink()

    @contextlib.contextmanager
    def transaction(self, kind="IMMEDIATE"):
        """A context whose changes are all kept or, after an exception, all dropped. IMMEDIATE: no other process writes."""
        self.database.execute(f"BEGIN {kind}")
        try:
            yield
            self.database.execute("COMMIT")
        except BaseException:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise

    def one(self, query, values=()):
        """The first column of the first row that a query finds."""
        return self.database.execute(query, values).fetchone()[0]

    def generation(self):
        """The name of the present numbering of the rows."""
        return self.one("SELECT name FROM generation")

    def companion(self, suffix):
        """The path of a file that belongs to this database."""
        return self.path.with_name(f"{self.path.stem}-{self.generation()}{suffix}")

    def num_rows(self):
        """How many rows the file of vectors has."""
        return self.one("SELECT COALESCE(MAX(first + count), 0) FROM blocks")

    def vectors(self):
        """All rows, memory-mapped: (M, width) float16. Raises ValueError where the file is missing, shorter or another."""
        count, path = self.num_rows(), self.companion(".vectors")
        if not count:
            return np.empty((0, self.width), dtype=np.float16)
        size = HEADER + 2 * count * self.width
        if not path.exists() or path.stat().st_size < size:
            raise ValueError(f"{path.name} is missing or truncated")
        with open(path, "rb") as file:
            if file.read(HEADER) != header(self.width):
                raise ValueError(f"{path.name} is another file, or of another width")
        return np.memmap(path, mode="c", dtype=np.float16, offset=HEADER, shape=(count, self.width))

    def add(self, pictures):
        """Adds or replaces pictures, (path, bytes, changed, content, taken, vector).

        vector: (width,), or None for one that cannot be read. The others: as in the table.
        """
        vectors = [vector for *_, vector in pictures if vector is not None]
        with self.transaction():
            row, entries = self.num_rows(), []
            if vectors:
                self.write_rows(row, np.stack(vectors).astype(np.float16))
            for path, size, changed, content, taken, vector in pictures:
                entries.append((path, size, changed, None if vector is None else row, content, taken))
                row += vector is not None
            self.database.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?)", entries)

    def write_rows(self, first, vectors):
        """Writes a block of rows, and notes it; within a transaction."""
        contents, path = vectors.tobytes(), self.companion(".vectors")
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.write(header(self.width))
            file.seek(HEADER + 2 * first * self.width)
            file.write(contents)
            file.truncate()  # what a killed process left
            file.flush()
            os.fsync(file.fileno())
        self.database.execute("INSERT INTO blocks VALUES (?, ?, ?)", [first, len(vectors), zlib.crc32(contents)])

    def drop_damaged(self, last_only=False):
        """Forgets the pictures of blocks whose checksum does not match, so that they are embedded again. Returns how many.

        last_only: only the last block is read, which is the one that a crash of the machine can have damaged.
        """
        limit, dropped = " ORDER BY first DESC LIMIT 1" if last_only else "", 0
        with self.transaction():
            vectors = self.vectors()
            for first, count, checksum in self.database.execute(f"SELECT * FROM blocks{limit}").fetchall():
                if zlib.crc32(vectors[first : first + count].tobytes()) != checksum:
                    bounds = [first, first + count - 1]
                    dropped += self.database.execute("DELETE FROM pictures WHERE row BETWEEN ? AND ?", bounds).rowcount
        return dropped

    def list_files(self, files):
        """Notes the files of a gallery, (path, bytes, changed). Returns how many there are."""
        with self.transaction("DEFERRED"):  # listing takes long, and writes a temporary table only
            self.database.execute("DELETE FROM listed")
            self.database.executemany("INSERT OR REPLACE INTO listed VALUES (?, ?, ?)", files)
        return self.one("SELECT COUNT(*) FROM listed")

    def forget(self, folder):
        """Forgets the pictures of a folder that are not listed.

        Those in tar files there stay, as they are never listed, and so do those in folders that cannot be listed now.
        """
        # All paths in it lie between these.
        bounds = [os.path.join(os.path.abspath(folder), ""), os.path.join(os.path.abspath(folder), "\U0010ffff")]
        gone = "path BETWEEN ? AND ? AND path NOT LIKE '%.tar/%' AND path NOT IN (SELECT path FROM listed)"
        if self.one(f"SELECT EXISTS (SELECT * FROM pictures WHERE {gone})", bounds):
            with self.transaction():
                paths = [path for (path,) in self.database.execute(f"SELECT path FROM pictures WHERE {gone}", bounds)]
                closed = {parent for parent in set(map(os.path.dirname, paths)) if not is_open(parent)}
                deleted = ([path] for path in paths if os.path.dirname(path) not in closed)
                self.database.executemany("DELETE FROM pictures WHERE path = ?", deleted)

    def count_stale(self):
        """How many of the listed files are new or have changed."""
        return self.one(f"SELECT COUNT(*) FROM {STALE}")

    def stale(self):
        """Yields the listed files that are new or have changed, (path, bytes, changed)."""
        return self.database.execute(f"SELECT listed.* FROM {STALE} ORDER BY path")

    def stale_with_known_size(self):
        """Those of them that have as many bytes as a picture with a vector, a list: they may be that one, renamed."""
        known = "listed.bytes IN (SELECT bytes FROM pictures WHERE row IS NOT NULL)"
        return self.database.execute(f"SELECT listed.* FROM {STALE} AND {known}").fetchall()

    def with_content(self, contents):
        """{content: (row, taken)} of pictures that have one of these contents, a set."""
        rows = self.database.execute("SELECT content, row, taken FROM pictures WHERE row IS NOT NULL")
        return {content: (row, taken) for content, row, taken in rows if content in contents}

    def pictures(self):
        """Yields (row, path) of the listed files that can be read, in the order of their paths."""
        joined = "listed CROSS JOIN pictures USING (path)"  # so that SQLite goes through the listed ones in their order
        return self.database.execute(f"SELECT row, path FROM {joined} WHERE row IS NOT NULL ORDER BY path")

    def pictures_where(self, where, values):
        """Yields (row, path) of all pictures that can be read and meet a condition on the table's columns and DATE."""
        query = f"SELECT row, path FROM pictures WHERE row IS NOT NULL AND {where} ORDER BY path"
        return self.database.execute(query, values)

    def files(self):
        """Yields (row, path, bytes, changed) of all pictures that can be read."""
        return self.database.execute("SELECT row, path, bytes, changed FROM pictures WHERE row IS NOT NULL")

    def undecoded(self):
        """The paths of listed files that have no vector, in their order."""
        query = "SELECT path FROM listed LEFT JOIN pictures USING (path) WHERE pictures.row IS NULL ORDER BY path"
        return [path for (path,) in self.database.execute(query)]

    def date_of(self, path):
        """The time a picture was taken, or else that of its file; None for one that is not here."""
        found = self.database.execute(f"SELECT {DATE} FROM pictures WHERE path = ?", [path]).fetchone()
        return found[0] if found else None

    def path_of(self, row, generation):
        """The path of a row's picture; None if it is gone since, or if rows were numbered again since this generation."""
        same = "(SELECT name FROM generation) = ?"
        found = self.database.execute(f"SELECT path FROM pictures WHERE row = ? AND {same}", [int(row), generation]).fetchone()
        return found[0] if found else None

    def has_many_unused_rows(self):
        """Whether too many rows have no picture."""
        count = self.num_rows()
        return count - self.one("SELECT COUNT(row) FROM pictures") > MAX_UNUSED * count

    def compact(self):
        """Copies the rows that have a picture into a new file of vectors, where too many have none."""
        if not self.has_many_unused_rows():
            return
        self.drop_damaged()  # what is copied gets new checksums
        with self.transaction():
            if not self.has_many_unused_rows():  # another process was faster
                return
            vectors = self.vectors()
            rows = np.sort(
                np.fromiter((r for (r,) in self.database.execute("SELECT row FROM pictures WHERE row >= 0")), np.int64)
            )
            self.database.execute("UPDATE generation SET name = ?", [uuid.uuid4().hex[:8]])
            self.database.execute("DELETE FROM blocks")
            for start in range(0, len(rows), BLOCK):
                self.write_rows(start, vectors[rows[start : start + BLOCK]])
            # Row numbers are unique at each moment, so they first become negative.
            self.database.execute("UPDATE pictures SET row = -1 - row WHERE row IS NOT NULL")
            moved = ((new, -1 - int(row)) for new, row in enumerate(rows))
            self.database.executemany("UPDATE pictures SET row = ? WHERE row = ?", moved)
        self.remove_leftovers()


def is_open(folder):
    """Whether a folder can be listed, or is no longer there; else what is in it is not known."""
    try:
        os.scandir(folder).close()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return True


def header(width):
    return (MAGIC + b" %d" % width).ljust(HEADER, b"\0")
