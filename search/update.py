"""Embed those pictures of a gallery that are new or have changed, and recognise those that were only moved.

Several processes (torchrun) embed a share of the pictures each. Each writes its own files, which the first process adds to the
store.
"""

import contextlib
import io
import uuid
import zlib
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np

from search.store import DECODERS
from utils import processes
from utils.exif import date_taken
from utils.files import atomic_write, digest, read_bytes
from utils.images import decode_image, read_ahead

WRITE_EVERY = 512  # pictures per write; at most so many are embedded again after a kill
SHOW_EVERY = 64  # the same where progress is shown


def update(store, searcher, num_workers, count, on_progress=None):
    """Embeds the files listed in a `Store` that it does not have. searcher: a `search.searcher.Searcher`.

    count: how many files are listed. on_progress: called with count after each write.
    """
    with processes.main_process_first():
        if processes.is_main_process():
            take_over_moved(store)
    size, rank, num_stale, own, pending = processes.size(), processes.rank(), 0, [], []
    for entry in store.stale():
        num_stale += 1
        if zlib.crc32(entry[0].encode()) % size == rank:
            own.append(entry)
    if num_stale:
        print(f"embedding {num_stale:,} of {count:,} pictures: new, changed, or not yet embedded with this model", flush=True)
    write = store.add if size == 1 else partial(write_part, parts_folder(store))

    def write_pending():
        if pending:
            write(pending)
            pending.clear()
            if on_progress:
                on_progress(count)

    for picture in embedded(searcher, own, num_workers) if own else ():
        pending.append(picture)
        if len(pending) >= (SHOW_EVERY if on_progress else WRITE_EVERY):
            write_pending()
    write_pending()
    processes.barrier()
    if processes.is_main_process():
        merge_parts(store, parts_folder(store))
    processes.barrier()


def take_over_moved(store):
    """Adds listed files that have the bytes of a picture whose vector is there: renamed, moved or copied ones."""
    contents = {}
    for entry in store.stale_with_known_size():
        with contextlib.suppress(OSError):  # gone meanwhile
            contents[entry] = digest(read_bytes(entry[0]))
    if not contents:
        return
    with store.transaction():  # so that no other process numbers the rows again in between
        known, vectors = store.with_content(set(contents.values())), store.vectors()
    moved = [(*entry, content, *known[content]) for entry, content in contents.items() if content in known]
    if moved:
        store.add([(path, size, changed, content, taken, vectors[row]) for path, size, changed, content, row, taken in moved])
        print(f"recognised {len(moved):,} pictures by their content: renamed, moved or copied")


def read_picture(path, size, resize):
    """(image, content, taken) of a picture file: resized as by `utils.images.read_image`, and as in the `Store`'s table."""
    contents = read_bytes(path)
    return decode_image(contents, size, resize, Path(path).suffix), digest(contents), date_taken(io.BytesIO(contents))


def embedded(searcher, entries, num_workers):
    """Yields (path, bytes, changed, content, taken, vector) for each of (path, bytes, changed), as for `Store.add`.

    A file that cannot be read now, which another try may change, is left out.
    """
    from embedding import image_feature_batches, picture_vectors  # only here: these imports take seconds

    model, device, dtype = searcher.opened
    read = partial(read_picture, size=model.image_encoder.size, resize=model.image_encoder.resize)
    waiting, unreadable = deque(), deque()

    def pictures():
        for entry, (found, problem) in zip(entries, read_ahead(read, [path for path, *_ in entries], num_workers)):
            if problem:
                if not problem.passing:
                    unreadable.append((*entry, DECODERS, None, None))
            else:
                image, content, taken = found
                waiting.append((*entry, content, taken))
                yield image

    # image_feature_batches draws from pictures(), so `waiting` holds the entries whose vectors are not computed yet.
    for I_f in image_feature_batches(model, pictures(), device, dtype, len(entries)):
        for vector in picture_vectors(model, I_f, device).numpy():
            yield *waiting.popleft(), vector
        while unreadable:
            yield unreadable.popleft()
    yield from unreadable


def parts_folder(store):
    """Where several processes write; some may have been killed before their files were added."""
    return store.path.with_suffix(".parts")


def write_part(folder, pictures):
    """Writes pictures as for `Store.add` into a file of their own."""
    *columns, vectors = zip(*pictures)
    readable = np.array([vector is not None for vector in vectors])
    found = np.stack([vector for vector in vectors if vector is not None] or [np.empty(0)]).astype(np.float16)
    names = "paths", "sizes", "changed", "contents", "taken"  # None becomes an empty text
    texts = [[value.hex() if isinstance(value, bytes) else value or "" for value in column] for column in columns[3:]]

    def write(temporary):
        with open(temporary, "wb") as file:  # else NumPy adds an ending to the name
            np.savez(file, readable=readable, vectors=found, **dict(zip(names, map(np.array, [*columns[:3], *texts]))))

    atomic_write(folder / f"{uuid.uuid4().hex}.npz", write)


def merge_parts(store, folder):
    """Adds the files of `write_part` to a store, and removes them."""
    for path in sorted(folder.glob("*.npz")):
        try:
            with np.load(path) as part:
                vectors = iter(part["vectors"])
                names = "paths", "sizes", "changed", "contents", "taken", "readable"
                columns = zip(*(part[name].tolist() for name in names))
                store.add(
                    [
                        (*entry, bytes.fromhex(content) or None, taken or None, next(vectors) if readable else None)
                        for *entry, content, taken, readable in columns
                    ]
                )
        except FileNotFoundError:  # another command has added it meanwhile
            continue
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or another process writes there
        folder.rmdir()
