"""The pictures of a folder and their embeddings, kept on disk in an SQLite file for each model.

A later search takes in new and changed pictures and drops deleted ones. SQLite makes every change whole: two commands may
work on one file at a time, and one that is killed loses what it had not yet written and nothing else.
"""

import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import PICTURE_ENDINGS, VIEW
from embedding import file_embeddings
from index import FROM, Graph, open_graph
from storage import UserError, key_of, key_of_model, remove_unfinished
from utils.cache import note_use

TABLE = """CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again: not for another picture or another file
    path TEXT UNIQUE NOT NULL,
    bytes INTEGER NOT NULL,
    changed INTEGER NOT NULL,              -- ns
    embedding BLOB                         -- d_e numbers of 32 bits; NULL: cannot be read
)"""
FIRST_ID = "INSERT INTO sqlite_sequence SELECT 'pictures', ? WHERE NOT EXISTS (SELECT * FROM sqlite_sequence)"
PATIENCE = 60  # seconds to wait for another command's change
WRITE_EVERY = 512  # pictures


def find_pictures(folder):
    """{path: (bytes, time of change in ns)} of the pictures under a folder, at any depth.

    Subfolders that may not be read and names that are not UTF-8 are left out, and a line counts them.
    Raises UserError where there are none.
    """
    found, unreadable, unnameable = {}, 0, 0
    if not Path(folder).is_dir():
        raise UserError(f"--images {folder}: no such folder")
    folders = [os.path.abspath(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except PermissionError:
            unreadable += 1
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in PICTURE_ENDINGS and entry.is_file():
                if not is_unicode(entry.path):
                    unnameable += 1
                    continue
                stat = entry.stat()
                found[entry.path] = (stat.st_size, stat.st_mtime_ns)
    if unreadable or unnameable:
        print(f"left out {unreadable:,} folders that may not be read and {unnameable:,} pictures whose names are not UTF-8")
    if not found:
        raise UserError(f"--images {folder}: no pictures there ({', '.join(sorted(PICTURE_ENDINGS))})")
    return dict(sorted(found.items()))


def is_unicode(path):
    """False for a path with bytes that are not UTF-8, which Python carries as surrogates and SQLite does not take."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Gallery:
    """N pictures to search."""

    paths: list  # N strings
    embeddings: torch.Tensor  # (N, d_e), each of length 1
    graph: Graph | None  # of the embeddings, where there are many

    @property
    def searched(self):
        """What `index.nearest` takes."""
        return self.graph or self.embeddings


def open_gallery(model, files, folder, cache_dir, device, dtype, num_workers=0, exact=False):
    """The Gallery of picture files, of which those that are new, changed or not yet seen by this model are embedded.

    files: {path: (bytes, time of change)}, as `find_pictures` gives them. folder: what lies under it and is no longer among
    the files is forgotten; None where they are not all of a folder. exact: without a graph, however many there are.
    Raises UserError where no picture can be read or cache_dir cannot be written.
    """
    path = Path(cache_dir) / f"gallery-{key_of(key_of_model(model), VIEW, dtype)}.sqlite"
    remove_unfinished(cache_dir)
    if model.run_dir:
        note_use(model.run_dir, path)
    arguments = model, files, folder, device, dtype, num_workers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            ids, paths, embeddings = update(path, *arguments)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            print(f"{path}: {error}; it is built again")
            path.unlink()
            ids, paths, embeddings = update(path, *arguments)
    except (sqlite3.OperationalError, OSError) as error:
        raise UserError(f"--cache-dir {cache_dir}: cannot be used ({error}); free space, or name another folder") from None
    if len(paths) < len(files):
        print(f"left out {len(files) - len(paths):,} pictures that cannot be decoded")
    if not paths:
        raise UserError(f"{os.path.commonpath(files)}: none of its {len(files):,} pictures can be decoded")
    graph = open_graph(path.with_suffix(".faiss"), ids, embeddings) if len(paths) > FROM and not exact else None
    return Gallery(paths, embeddings, graph)


def update(path, model, files, folder, device, dtype, num_workers):
    """Brings the database at `path` up to date with files, and returns (ids, paths, embeddings) of those that can be read.

    ids: (N,) int64. The other arguments are those of `open_gallery`.
    """
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as database:
        with database:
            database.execute(TABLE)
            database.execute(FIRST_ID, [time.time_ns()])  # the search graph may be left from a file that was lost
        begin = os.path.abspath(folder) if folder else os.path.commonpath([os.path.dirname(name) for name in files])
        inside = (os.path.join(begin, ""), os.path.join(begin, "\U0010ffff"))  # all paths that begin so
        rows = database.execute("SELECT path, bytes, changed FROM pictures WHERE path BETWEEN ? AND ?", inside)
        known = {name: (size, changed) for name, size, changed in rows}
        if folder:
            with database:
                gone = [(name,) for name in known if name not in files]
                database.executemany("DELETE FROM pictures WHERE path = ?", gone)
        stale = [name for name, facts in files.items() if known.get(name) != facts]
        if stale:
            print(f"embedding {len(stale):,} of {len(files):,} pictures: new, changed, or not yet seen by this model")
        waiting = []
        for position, embedding in file_embeddings(model, stale, device, dtype, num_workers):
            name = stale[position]
            waiting.append((name, *files[name], None if embedding is None else embedding.numpy().tobytes()))
            if len(waiting) == WRITE_EVERY:
                write(database, waiting)
                waiting = []
        write(database, waiting)
        rows = database.execute("SELECT id, path, embedding FROM pictures WHERE path BETWEEN ? AND ?", inside)
        rows = sorted((name, number, blob) for number, name, blob in rows if name in files and blob is not None)
    width = model.image_projection.projection.out_features
    embeddings = np.frombuffer(bytearray(b"".join(blob for _, _, blob in rows)), dtype=np.float32).reshape(-1, width)
    return np.array([number for _, number, _ in rows]), [name for name, _, _ in rows], torch.from_numpy(embeddings)


def write(database, rows):
    with database:
        database.executemany("INSERT OR REPLACE INTO pictures (path, bytes, changed, embedding) VALUES (?, ?, ?, ?)", rows)
