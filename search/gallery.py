"""The pictures of a folder and their embeddings, which are kept on disk (`search.store`).

A later search embeds only new and changed pictures, and forgets deleted ones. Several processes (torchrun) embed a share of the
pictures each. Each writes its own files, which the first process adds to the store.
"""

import contextlib
import os
import sqlite3
import tarfile
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedding import file_embeddings
from search import index
from search.index import CompressedIndex, exact_top_k, open_index
from search.store import Store
from training import distributed
from utils.cache import cache_key, model_key, note_use
from utils.errors import UserError
from utils.files import atomic_write, expand, remove_leftovers, tar_members
from utils.images import PICTURE_ENDINGS, VIEW

FORMAT = "vectors in a file"  # part of cache keys
WRITE_EVERY = 512  # pictures that a killed process may have embedded in vain


def find_pictures(folder):
    """Yields (path, bytes, modification time in ns) of the pictures in a folder and its subfolders, or in tar files.

    folder: 'DIR/*.tar' and 'DIR/{000..099}.tar' stand for tar files, whose pictures have paths such as DIR/000.tar/NAME.
    Folders without read permission and names that are not UTF-8 are left out; how many is printed at the end.
    Raises UserError if there are no pictures.
    """
    if str(folder).endswith(".tar"):
        yield from find_in_tars(str(folder))
        return
    num_found, num_unreadable, num_not_utf8 = 0, 0, 0
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
                stat, num_found = entry.stat(), num_found + 1
                yield entry.path, stat.st_size, stat.st_mtime_ns
    if num_unreadable or num_not_utf8:
        print(f"left out {num_unreadable:,} folders without read permission and {num_not_utf8:,} pictures with non-UTF-8 names")
    if not num_found:
        raise UserError(f"--images {folder}: no pictures there ({', '.join(sorted(PICTURE_ENDINGS))})")


def find_in_tars(pattern):
    """The same for the pictures in tar files. A file that is damaged is left out, with a line."""
    num_found = 0
    for archive in expand(pattern):
        try:
            changed = os.stat(archive).st_mtime_ns
            members = tar_members(archive, changed)
        except FileNotFoundError:
            raise UserError(f"--images {pattern}: no such file as {archive}; check the pattern") from None
        except (OSError, tarfile.TarError) as error:
            print(f"left out {archive}: damaged ({error})")
            continue
        for name, (_, size) in members.items():
            if os.path.splitext(name)[1].lower() in PICTURE_ENDINGS and is_unicode(name):
                num_found += 1
                yield f"{os.path.abspath(archive)}/{name}", size, changed
    if not num_found:
        raise UserError(f"--images {pattern}: no pictures there; check the pattern")


def is_unicode(path):
    """False for a path with bytes that are not UTF-8: Python represents them as surrogates, which SQLite rejects."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


class Paths(Sequence):
    """The paths of a gallery's pictures, each read when it is asked for; None for one that was deleted since."""

    def __init__(self, store, rows):
        self.store, self.rows, self.generation = store, rows, store.generation()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        return self.store.path_of(self.rows[position], self.generation)


@dataclass
class Gallery:
    """N pictures to search."""

    paths: list | Paths
    vectors: np.memmap  # (M, d_e) float16, L2-normalised, also of pictures that are not searched
    rows: np.ndarray  # (N,) int64, of the vectors of the N pictures
    compressed: CompressedIndex | None  # for approximate search, if there are many pictures

    def top_k(self, embedding, n):
        """As the function `index.top_k`."""
        if self.compressed and n <= index.MAX_APPROXIMATE:
            return self.compressed.top_k(embedding, n)
        return exact_top_k(self.vectors, self.rows, embedding, n)


def open_gallery(model, files, folder, cache_dir, device, dtype, num_workers=0, exact=False):
    """The Gallery of some picture files. Embeds those that are new, changed or not yet embedded with this model.

    files: (path, bytes, modification time) of each, as `find_pictures` yields them. folder: the folder whose pictures these all
    are, so that deleted ones can be forgotten; None if they are only some of a folder's. exact: never use approximate search.
    Raises UserError if no picture can be read or cache_dir cannot be written.
    """
    path = Path(cache_dir) / f"gallery-{cache_key(model_key(model), VIEW, dtype, FORMAT)}.sqlite"
    remove_leftovers(cache_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        store = open_store(path, model.image_projection.out_features)
        count = update(store, model, files, folder, device, dtype, num_workers)
        if model.run_dir:
            note_use(model.run_dir, path)
            note_use(model.run_dir, store.companion(".vectors"))
        gallery = read_gallery(store, exact)
    except (sqlite3.OperationalError, OSError) as error:
        raise UserError(f"--cache-dir {cache_dir}: cannot be used ({error}); free space, or name another folder") from None
    except (sqlite3.DatabaseError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, then run the command again") from None
    if len(gallery.rows) < count:
        print(f"left out {count - len(gallery.rows):,} pictures that cannot be decoded")
    if not len(gallery.rows):
        raise UserError(f"{folder or 'the gallery'}: none of its {count:,} pictures can be decoded")
    return gallery


def read_gallery(store, exact):
    """The `Gallery` of a store's listed files. exact: as for `open_gallery`."""
    with store.transaction():  # so that no other process numbers the rows again meanwhile
        rows = np.fromiter((row for row, _ in store.pictures()), dtype=np.int64)
        vectors, paths = store.vectors(), Paths(store, rows)
        if len(rows) <= index.APPROXIMATE_FROM:
            paths = [path for _, path in store.pictures()]
        index_path = store.companion(".faiss")
    compressed = None
    if len(rows) > index.APPROXIMATE_FROM and not exact:
        if not index_path.exists() and (dropped := store.drop_damaged()):
            raise UserError(f"{store.path}: {dropped:,} of its vectors were damaged; run the command again to embed them again")
        compressed = CompressedIndex(open_index(index_path, vectors), vectors, rows)
    return Gallery(paths, vectors, rows, compressed)


def open_store(path, width):
    """The `Store` at a path. One that is damaged is deleted and begun again, by the main process."""
    with distributed.main_process_first():
        try:
            store = Store(path, width)
            if distributed.is_main_process() and (dropped := store.drop_damaged(last_only=True)):
                print(f"{path}: {dropped:,} vectors were damaged; they are embedded again")
            return store
        except sqlite3.OperationalError:
            raise
        except (sqlite3.DatabaseError, ValueError) as error:
            print(f"{path}: {error}; it is built again")
            for leftover in path.parent.glob(f"{path.stem}*"):
                if leftover.is_file():
                    leftover.unlink()
            return Store(path, width)


def update(store, model, files, folder, device, dtype, num_workers):
    """Embeds what a store does not have of a gallery's files. The other arguments are those of `open_gallery`.

    Returns how many files there are.
    """
    parts = store.path.with_suffix(".parts")  # a folder; several processes write there, and may have been killed
    with distributed.main_process_first():
        if distributed.is_main_process():
            merge_parts(store, parts)
        count = store.list_files(files, folder if distributed.is_main_process() else None)
    size, rank, num_stale, own, pending = distributed.size(), distributed.rank(), 0, [], []
    for entry in store.stale():
        num_stale += 1
        if zlib.crc32(entry[0].encode()) % size == rank:
            own.append(entry)
    if num_stale:
        print(f"embedding {num_stale:,} of {count:,} pictures: new, changed, or not yet embedded with this model", flush=True)
    write = store.add if size == 1 else lambda pictures: write_part(parts, pictures)
    for position, embedding in file_embeddings(model, [path for path, *_ in own], device, dtype, num_workers):
        pending.append((*own[position], None if embedding is None else embedding.numpy()))
        if len(pending) == WRITE_EVERY:
            write(pending)
            pending = []
    if pending:
        write(pending)
    distributed.barrier()
    if distributed.is_main_process():
        merge_parts(store, parts)
        store.compact()
    distributed.barrier()
    return count


def write_part(folder, pictures):
    """Writes pictures as for `Store.add` into a file of their own."""
    paths, sizes, changed, vectors = zip(*pictures)
    readable = np.array([vector is not None for vector in vectors])
    found = np.stack([vector for vector in vectors if vector is not None] or [np.empty(0)]).astype(np.float16)
    columns = {"paths": np.array(paths), "sizes": np.array(sizes), "changed": np.array(changed)}

    def write(temporary):
        with open(temporary, "wb") as file:  # else NumPy adds an ending to the name
            np.savez(file, readable=readable, vectors=found, **columns)

    atomic_write(folder / f"{uuid.uuid4().hex}.npz", write)


def merge_parts(store, folder):
    """Adds the files of `write_part` to a store, and removes them."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path) as part:
                vectors = iter(part["vectors"])
                columns = zip(part["paths"].tolist(), part["sizes"].tolist(), part["changed"].tolist(), part["readable"])
                store.add([(*entry, next(vectors) if readable else None) for *entry, readable in columns])
        except FileNotFoundError:  # another command has added it meanwhile
            continue
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or another process writes there
        folder.rmdir()
