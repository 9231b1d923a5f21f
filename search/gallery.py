"""The pictures of a folder and their embeddings, cached on disk in one SQLite file per model.

A later search embeds only new and changed pictures, and removes deleted ones. SQLite transactions are atomic: two commands can
use the same file at the same time, and a command that is killed loses only what it has not yet written.
"""

import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from embedding import file_embeddings
from search.index import HNSW_MIN_SIZE, Graph, open_graph
from utils.cache import cache_key, model_key, note_use
from utils.errors import UserError
from utils.files import remove_leftovers
from utils.images import PICTURE_ENDINGS, VIEW

TABLE = """CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- an id is never used for a second picture
    path TEXT UNIQUE NOT NULL,
    bytes INTEGER NOT NULL,
    changed INTEGER NOT NULL,              -- modification time in ns
    embedding BLOB                         -- (d_e,) fp32; NULL: the picture cannot be read
)"""
FIRST_ID = "INSERT INTO sqlite_sequence SELECT 'pictures', ? WHERE NOT EXISTS (SELECT * FROM sqlite_sequence)"
TIMEOUT = 60  # seconds to wait for another command's transaction
WRITE_EVERY = 512  # pictures per transaction


def find_pictures(folder):
    """{path: (bytes, modification time in ns)} of the pictures in a folder and its subfolders.

    Folders without read permission and names that are not UTF-8 are left out; how many is printed.
    Raises UserError if there are no pictures.
    """
    files, num_unreadable, num_not_utf8 = {}, 0, 0
    if not Path(folder).is_dir():
        raise UserError(f"--images {folder}: no such folder")
    folders = [os.path.abspath(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except PermissionError:
            num_unreadable += 1
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in PICTURE_ENDINGS and entry.is_file():
                if not is_unicode(entry.path):
                    num_not_utf8 += 1
                    continue
                stat = entry.stat()
                files[entry.path] = (stat.st_size, stat.st_mtime_ns)
    if num_unreadable or num_not_utf8:
        print(f"left out {num_unreadable:,} folders without read permission and {num_not_utf8:,} pictures with non-UTF-8 names")
    if not files:
        raise UserError(f"--images {folder}: no pictures there ({', '.join(sorted(PICTURE_ENDINGS))})")
    return dict(sorted(files.items()))


def is_unicode(path):
    """False for a path with bytes that are not UTF-8: Python represents them as surrogates, which SQLite rejects."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Gallery:
    """N pictures to search."""

    paths: list  # N strings
    embeddings: torch.Tensor  # (N, d_e), L2-normalised
    graph: Graph | None  # for approximate search, if there are many pictures

    @property
    def searched(self):
        """What `index.top_k` searches: the graph if there is one, else the embeddings."""
        return self.graph or self.embeddings


def open_gallery(model, files, folder, cache_dir, device, dtype, num_workers=0, exact=False):
    """The Gallery of some picture files. Embeds those that are new, changed or not yet embedded with this model.

    files: {path: (bytes, modification time)}, as `find_pictures` returns it. folder: the folder that `files` lists in full, so
    that embeddings of deleted pictures can be removed; None if they are only some of a folder's pictures. exact: never use
    approximate search.
    Raises UserError if no picture can be read or cache_dir cannot be written.
    """
    path = Path(cache_dir) / f"gallery-{cache_key(model_key(model), VIEW, dtype)}.sqlite"
    remove_leftovers(cache_dir)
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
    graph = open_graph(path.with_suffix(".faiss"), ids, embeddings) if len(paths) > HNSW_MIN_SIZE and not exact else None
    return Gallery(paths, embeddings, graph)


def update(path, model, files, folder, device, dtype, num_workers):
    """Updates the database at `path` so that it matches `files`. The other arguments are those of `open_gallery`.

    Returns (ids, paths, embeddings) of the N pictures that can be read; ids is an (N,) int64 array.
    """
    with closing(sqlite3.connect(path, timeout=TIMEOUT)) as database:
        with database:
            database.execute(TABLE)
            # Ids start at the time, not at 1: if a database is lost, its search graph, which names pictures by their old ids,
            # may still exist.
            database.execute(FIRST_ID, [time.time_ns()])
        parent = os.path.abspath(folder) if folder else os.path.commonpath([os.path.dirname(name) for name in files])
        bounds = (os.path.join(parent, ""), os.path.join(parent, "\U0010ffff"))  # all paths in `parent` lie between these
        rows = database.execute("SELECT path, bytes, changed FROM pictures WHERE path BETWEEN ? AND ?", bounds)
        known = {name: (size, changed) for name, size, changed in rows}
        if folder:
            with database:
                deleted = [(name,) for name in known if name not in files]
                database.executemany("DELETE FROM pictures WHERE path = ?", deleted)
        stale = [name for name, stats in files.items() if known.get(name) != stats]
        if stale:
            print(f"embedding {len(stale):,} of {len(files):,} pictures: new, changed, or not yet embedded with this model")
        pending = []
        for position, embedding in file_embeddings(model, stale, device, dtype, num_workers):
            name = stale[position]
            pending.append((name, *files[name], None if embedding is None else embedding.numpy().tobytes()))
            if len(pending) == WRITE_EVERY:
                write(database, pending)
                pending = []
        write(database, pending)
        rows = database.execute("SELECT id, path, embedding FROM pictures WHERE path BETWEEN ? AND ?", bounds)
        rows = sorted((name, row_id, blob) for row_id, name, blob in rows if name in files and blob is not None)
    width = model.image_projection.out_features
    embeddings = np.frombuffer(bytearray(b"".join(blob for _, _, blob in rows)), dtype=np.float32).reshape(-1, width)
    return np.array([row_id for _, row_id, _ in rows]), [name for name, _, _ in rows], torch.from_numpy(embeddings)


def write(database, rows):
    """Writes rows (path, bytes, changed, embedding) in one transaction."""
    with database:
        database.executemany("INSERT OR REPLACE INTO pictures (path, bytes, changed, embedding) VALUES (?, ?, ?, ?)", rows)
