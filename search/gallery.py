"""The pictures of a folder and their embeddings, which are kept on disk (`search.store`).

A later search embeds only new and changed pictures, and forgets deleted ones.
"""

import os
import re
import sqlite3
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from search import index
from search.files import NoPictures
from search.index import CompressedIndex, exact_top_k, open_index
from search.store import DATE, Store
from search.update import merge_parts, parts_folder, update
from utils import processes
from utils.errors import UserError
from utils.files import remove_leftovers
from utils.folders import NUM_NAMED, printable
from utils.images import read_ahead, read_image

MAX_DIGITS = 18  # of a row
DATE_FORMATS = "%Y", "%Y-%m", "%Y-%m-%d"


class Paths(Sequence):
    """The paths of a gallery's pictures, each read when it is asked for; None for one that was deleted since."""

    def __init__(self, store, rows):
        self.store, self.rows, self.generation = store, rows, store.generation()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, position):
        return self.store.path_of(self.rows[position], self.generation)


@dataclass
class Filters:
    """Limits on dates and folders; empty: none.

    after, before: days, months or years, as 2021-06-30, 2021-06 or 2021; taken since the first moment of one and before that of
    the other. folder: a pattern of its path below the folder that is searched, as Italy/*.
    """

    after: str = ""
    before: str = ""
    folder: str = ""

    def condition(self, root):
        """(where, values), as for `Store.pictures_where`. root: the folder that is searched.

        Raises UserError for what is no date.
        """
        terms, values = [], []
        for flag, sign in (("after", ">="), ("before", "<")):
            if getattr(self, flag):
                terms.append(f"{DATE} {sign} ?")
                values.append(first_moment(getattr(self, flag), flag))
        if self.folder:
            below = os.path.join(os.path.abspath(root), "").replace(os.sep, "/") if root else ""
            pattern = (re.sub(r"([\[?*])", r"[\1]", below) or "*/") + self.folder
            terms.append("nfc(replace(path, ?, '/')) GLOB ?")  # macOS writes an accent as a character of its own
            values += [os.sep, unicodedata.normalize("NFC", pattern)]
        return " AND ".join(terms) or "1", values


def first_moment(day, flag):
    """The first moment of a day, month or year, as in a `Store`. Raises UserError, with the flag's name, for another text."""
    for date_format in DATE_FORMATS:
        try:
            return datetime.strptime(day.strip(), date_format).isoformat()
        except ValueError:
            continue
    raise UserError(f"{flag} {day}: no date; write a year, month or day, as 2021, 2021-06 or 2021-06-30")


@dataclass
class Gallery:
    """N pictures to search."""

    paths: list | Paths
    vectors: np.memmap  # (M, d_e + 1) float16, as in `search.queries`, also of pictures that are not searched
    rows: np.ndarray  # (N,) int64, of the vectors of the N pictures
    compressed: CompressedIndex | None  # for approximate search, if there are many pictures
    store: Store
    generation: str  # of the store, when the rows were read
    folder: str  # that is searched; empty: some files
    order: np.ndarray | None = None  # argsort of the rows, computed at first use

    def top_k(self, embedding, n):
        """As the function `index.top_k`."""
        if self.compressed and n <= index.MAX_APPROXIMATE:
            return self.compressed.top_k(embedding, n)
        return exact_top_k(self.vectors, self.rows, embedding, n)

    def select(self, filters):
        """The Gallery of those pictures that `Filters` let through. Raises UserError where there are none."""
        if filters == Filters():
            return self
        found = list(self.store.pictures_where(*filters.condition(self.folder)))
        rows = np.array([row for row, _ in found], dtype=np.int64)
        in_gallery = np.isin(rows, self.rows)  # the store may have other folders' pictures, too
        if not in_gallery.any():
            hint = "; --folder is the whole path below --images, with * for any part, as 'Italy/*'" if filters.folder else ""
            raise UserError(f"none of the {len(self.paths):,} pictures is from these dates and folders{hint}")
        paths, rows = [path for (_, path), is_in in zip(found, in_gallery) if is_in], rows[in_gallery]
        compressed = None
        if self.compressed and len(rows) > index.APPROXIMATE_FROM:
            compressed = CompressedIndex(self.compressed.index, self.vectors, rows)
        return Gallery(paths, self.vectors, rows, compressed, self.store, self.generation, self.folder)

    def key_of(self, position):
        """A name of one of the N pictures that no other picture has, now or later."""
        return f"{self.generation}-{self.rows[position]}"

    def position_of(self, key):
        """The position of the picture with this key; None where it is none of the N pictures'."""
        generation, _, row = key.partition("-")
        if generation != self.generation or not row.isdecimal() or len(row) > MAX_DIGITS:
            return None
        row = int(row)
        if self.order is None:
            self.order = np.argsort(self.rows)
        place = np.searchsorted(self.rows, row, sorter=self.order)
        return int(self.order[place]) if place < len(self.rows) and self.rows[self.order[place]] == row else None

    def embeddings(self):
        """The embeddings of the N pictures, (N, d_e) float16, L2-normalised."""
        return self.vectors[self.rows][:, :-1]

    def embedding_of(self, position):
        """The query of one of the N pictures to pictures, (d_e + 1,) float32."""
        return np.append(self.vectors[self.rows[position]][:-1], 0).astype(np.float32)


def open_gallery(searcher, files, folder, num_workers=0, exact=False, verbose=False):
    """The Gallery of some picture files. Embeds those that are new, changed or not yet embedded with this model.

    searcher: a `search.searcher.Searcher`. files: (path, bytes, modification time) of each, as `find_pictures` yields them.
    folder: the folder whose pictures these all are, so that deleted ones can be forgotten; empty if they are only some of a
    folder's. exact: never use approximate search. verbose: name every picture that cannot be decoded, and why.
    Raises UserError if no picture can be read or the cache cannot be written.
    """
    path = searcher.gallery_path()
    try:
        store = open_store(path, searcher.width)
        count = update_store(store, searcher, files, folder, num_workers)
        searcher.note_use(path, store.companion(".vectors"))
        gallery = read_gallery(store, folder, exact)
    except (sqlite3.OperationalError, OSError) as error:
        raise UserError(f"--cache-dir {path.parent}: cannot be used ({error}); free space, or name another folder") from None
    except (sqlite3.DatabaseError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, then run the command again") from None
    if len(gallery.rows) < count:
        print_left_out(store.undecoded(), verbose)
    if not len(gallery.rows):
        raise UserError(f"{folder or 'the gallery'}: none of its {count:,} pictures can be decoded")
    return gallery


def print_left_out(paths, verbose):
    """Prints how many pictures cannot be decoded, and which. verbose: all of them, with the reasons."""
    more = ", ..." if len(paths) > NUM_NAMED and not verbose else ""
    names = "" if verbose else ", ".join(printable(os.path.basename(path)) for path in paths[:NUM_NAMED])
    print(f"left out {len(paths):,} pictures that cannot be decoded: {names}{more}".rstrip())
    if verbose:
        for path, (_, problem) in zip(paths, read_ahead(lambda path: read_image(path, 1), paths, 1)):
            print(f"  {printable(problem or path)}")


def update_store(store, searcher, files, folder, num_workers, on_progress=None):
    """Makes a `Store` have what a gallery's files are now. Returns how many there are. Arguments: as for `open_gallery`.

    Where there are none, `search.files.NoPictures` goes on, and nothing is forgotten: it may be a drive that is not mounted.
    on_progress: called with the number of files once they are listed, and whenever some were embedded.
    """
    with processes.main_process_first():
        if processes.is_main_process():
            merge_parts(store, parts_folder(store))
        try:
            count = store.list_files(files)
        except NoPictures:
            store.list_files([])
            raise
    if on_progress:
        on_progress(count)
    if processes.size() > 1 or store.count_stale():
        update(store, searcher, num_workers, count, on_progress)
    if processes.is_main_process():
        if folder:
            store.forget(folder)
        store.compact()
    processes.barrier()
    return count


def read_gallery(store, folder, exact):
    """The `Gallery` of a store's listed files. folder, exact: as for `open_gallery`."""
    with store.transaction():  # so that no other process numbers the rows again meanwhile
        rows = np.fromiter((row for row, _ in store.pictures()), dtype=np.int64)
        vectors, paths = store.vectors(), Paths(store, rows)
        if len(rows) <= index.APPROXIMATE_FROM:
            paths = [path for _, path in store.pictures()]
        index_path, generation = store.companion(".faiss"), store.generation()
    compressed = None
    if len(rows) > index.APPROXIMATE_FROM and not exact:
        if not index_path.exists() and (dropped := store.drop_damaged()):
            raise UserError(f"{store.path}: {dropped:,} of its vectors were damaged; run the command again to embed them again")
        compressed = CompressedIndex(open_index(index_path, vectors), vectors, rows)
    return Gallery(paths, vectors, rows, compressed, store, generation, folder)


def open_store(path, width):
    """The `Store` at a path. One that is damaged is deleted and begun again, by the main process."""
    with processes.main_process_first():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            store = Store(path, width)
            if processes.is_main_process() and (dropped := store.drop_damaged(last_only=True)):
                print(f"{path}: {dropped:,} vectors were damaged; they are embedded again")
            return store
        except (sqlite3.OperationalError, OSError):
            raise
        except (sqlite3.DatabaseError, ValueError) as error:
            print(f"{path}: {error}; it is built again")
            for leftover in path.parent.glob(f"{path.stem}*"):
                if leftover.is_file():
                    leftover.unlink()
            return Store(path, width)
