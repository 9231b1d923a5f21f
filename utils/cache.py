"""The cache folder. python -m utils.cache [--delete] lists its files and the runs that use them.

It holds decoded pictures, features of frozen encoders and embeddings, as computing these takes longer than reading them. All
of it can be computed again. Each run folder's cache.txt lists what the run used.
"""

import sys
from dataclasses import dataclass

from utils.cli import run_cli
from utils.errors import UserError, run_command


@dataclass
class Cache:
    """Lists what is in the cache folder, and deletes what no run uses."""

    cache_dir: str = ".cache"  # the cache folder
    runs: tuple[str, ...] = ("runs",)  # folders to look for runs in, with their subfolders
    delete: bool = False  # delete what none of these runs uses


if __name__ == "__main__":
    OPTIONS = run_command(run_cli, Cache, "-m utils.cache", sys.argv[1:])

import hashlib
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

from utils.files import CACHED, atomic_write, remove_leftovers


def free_space(folder):
    """The free bytes on the disk of a folder, which need not exist yet."""
    folder = Path(folder)
    return shutil.disk_usage(next(path for path in [folder, *folder.absolute().parents] if path.exists())).free


def require_space(folder, size, remedy):
    """Raises UserError where the disk of `folder` has fewer than `size` bytes free. remedy: what else the user can do."""
    free = free_space(folder)
    if free < size:
        raise UserError(
            f"{folder}: {size / 1e9:.1f} GB are needed there, but only {free / 1e9:.1f} GB are free; free space, name a "
            f"folder on another disk with --cache-dir, or {remedy}"
        )


def file_stats(paths):
    """[(path, bytes, modification time in ns)] of files, for cache keys that change when a file is changed or removed."""

    def stats(path):
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return str(path), None, None
        return str(path), stat.st_size, stat.st_mtime_ns

    return list(map(stats, paths))


def cache_key(*parts):
    """A short hexadecimal key that changes when the `repr` of any part does; bytes are taken as they are."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:20]


def model_key(module):
    """The cache key of a torch module: of its parts' `architecture`, and of its weights' names, shapes and values.

    The architecture is needed because models with the same weights may differ in activation or number of attention heads.
    """
    return cache_key([getattr(part, "architecture", None) for part in module.modules()], tensors_key(module.state_dict()))


def tensors_key(tensors):
    """The cache key of {name: tensor}: of names, shapes, dtypes and all values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:20]


def write_array(path, array):
    """Writes a NumPy array as a .npy file, atomically."""

    def write(temporary):
        with open(temporary, "wb") as file:  # else NumPy adds an ending to the name
            np.save(file, array)

    atomic_write(path, write)


def cached_tensor(path, shape, dtype, compute, remedy="delete what is in it"):
    """The tensor in the .npy file `path`, memory-mapped: rows that are not used take no memory.

    If there is no such file of this shape and dtype, compute() yields the tensor in blocks of rows, which are written first.
    Raises UserError, with the remedy, where the disk has too little space, or where the folder is not writable.
    """
    import torch  # only here: this import takes seconds, and a search does without

    bits = torch.int16 if dtype == torch.bfloat16 else dtype  # NumPy has no bf16
    kind = torch.empty(0, dtype=bits).numpy().dtype

    def read():
        array = np.load(path, mmap_mode="c")  # copy-on-write; for "r" torch would warn
        if array.shape != tuple(shape) or array.dtype != kind:
            raise ValueError(f"{path}: another shape")
        return torch.from_numpy(array).view(dtype)

    def write(temporary):
        with open(temporary, "wb") as file:  # not a memory map, which kills the process where the disk is full
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in compute():
                file.write(block.contiguous().view(bits).numpy().data)

    try:
        return read()
    except (OSError, ValueError, EOFError):
        require_space(Path(path).parent, int(np.prod(shape)) * kind.itemsize, remedy)
        atomic_write(path, write)
        return read()


USES_FILE = "cache.txt"  # in a run folder
KEPT = "relevance-"  # in front of the names of what cannot be computed again without more than the run


def note_use(run_dir, path):
    """Adds a file or folder of the cache to those that a run uses; does nothing if the run folder is not writable."""
    uses = Path(run_dir) / USES_FILE
    try:
        if path.stem not in (uses.read_text(encoding="utf-8").split() if uses.exists() else []):
            with open(uses, "a", encoding="utf-8") as file:
                file.write(f"{path.stem}\n")
    except OSError:
        return


def bytes_in(path):
    """The size of a file, or of all files in a folder and those below it."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def is_cached(path):
    """Whether an entry of the cache folder is from here: by its key, or as a folder of decoded pictures by what is in it."""
    if CACHED.fullmatch(path.name):
        return True
    decoded = path.name.startswith("images-") and path.is_dir()
    return decoded and all(inner.suffix in (".bin", ".npy") for inner in path.iterdir())


def cache_line(cache_dir):
    """A message with the size of the cache folder."""
    size = bytes_in(Path(cache_dir)) / 1e9
    return f"{cache_dir} holds {size:.1f} GB for later runs; python -m utils.cache shows what no run uses"


def cache(options):
    """What `python -m utils.cache` does. options: a `Cache`."""
    folder = Path(options.cache_dir)
    if not folder.is_dir():
        raise UserError(f"--cache-dir {options.cache_dir}: no such folder")
    remove_leftovers(folder)
    users = defaultdict(list)
    for uses in sorted(path for name in options.runs for path in Path(name).rglob(USES_FILE)):
        for stem in uses.read_text(encoding="utf-8").split():
            users[stem].append(str(uses.parent))
    unused, foreign = 0, []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".tmp" or path.name.startswith(KEPT):  # being written, or learned from data of the user's
            continue
        if path.is_symlink() or not is_cached(path):
            foreign.append(path.name)
            continue
        size, used_by = bytes_in(path), users.get(path.stem)
        print(f"{size / 1e9:8.2f} GB  {path.name}  {', '.join(used_by) if used_by else 'used by no run'}")
        if not used_by:
            unused += size
            if options.delete and path.is_dir():
                shutil.rmtree(path)
            elif options.delete:
                path.unlink()
    if foreign:
        print(f"not of the cache, and left alone: {len(foreign):,} others, such as {foreign[0]}")
    places = ", ".join(options.runs)
    if options.delete:
        print(f"deleted {unused / 1e9:.2f} GB that no run in {places} used")
    else:
        print(f"{unused / 1e9:.2f} GB are used by no run in {places}; --delete deletes them")


if __name__ == "__main__":
    run_command(cache, OPTIONS)
