"""Files that appear whole or not at all, the keys of cached results, and errors that a user can mend."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class UserError(Exception):
    """Something the user can mend: one line that names the value, the place and the remedy."""

    def __str__(self):
        return "".join(c if c.isprintable() else " " for c in super().__str__())  # names in files can hold anything


def run_command(main):
    """Calls main(); a `UserError` or a failing file ends the program with one line and exit status 2, Ctrl-C with 130.

    Where nobody reads the output any more, as after `| head`, it ends with 1 and without a word.
    """
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # now, for an error while Python ends could not be caught
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest of the output goes
        sys.exit(1)
    except OSError as error:
        if not error.filename:
            raise
        print(f"error: {error.filename}: {error.strerror}; mend that, and start again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\nstopped; {interrupt}" if interrupt.args else "\nstopped", file=sys.stderr)
        sys.exit(130)


def write_whole(path, write, keep=None):
    """Calls write(temporary_path) and moves the result to `path` once it is on disk.

    A reader finds the old file or the new one, whatever happens in between; with `keep`, a path, the old one goes there
    first, and for a moment there is none at `path`.
    Raises UserError where the disk is full or the folder may not be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space, or name another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Writes plain values as JSON, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def file_facts(paths):
    """[(path, bytes, time of change in ns)] of files: what a cache key needs to notice that one of them changed or went."""

    def facts(path):
        try:
            stat = os.stat(path)
        except FileNotFoundError:
            return str(path), None, None
        return str(path), stat.st_size, stat.st_mtime_ns

    return list(map(facts, paths))


def key_of(*parts):
    """A short hexadecimal key that changes when the `repr` of any part does; bytes are taken as they are."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:20]


def key_of_weights(module):
    """The key of a torch module's state: names, shapes and every value."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:20]


def cached_tensor(path, shape, dtype, compute):
    """The tensor in the .npy file `path`, mapped into memory: what is not used takes no memory.

    Where no whole file of this shape and dtype is there, compute() yields the tensor in blocks of rows, and it is kept.
    Raises UserError where the disk is full or the folder may not be written.
    """
    bits = torch.int16 if dtype == torch.bfloat16 else dtype  # NumPy has no bf16
    kind = torch.empty(0, dtype=bits).numpy().dtype

    def read():
        array = np.load(path, mmap_mode="c")  # changes would stay in memory, and torch does not warn as it does for "r"
        if array.shape != tuple(shape) or array.dtype != kind:
            raise ValueError(f"{path}: another shape")
        return torch.from_numpy(array).view(dtype)

    def write(temporary):
        with open(temporary, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(file, header)
            for block in compute():
                file.write(block.contiguous().view(bits).numpy().data)

    try:
        return read()
    except (OSError, ValueError, EOFError):
        write_whole(path, write)
        return read()
