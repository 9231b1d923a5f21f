"""Files that appear whole or not at all, the keys of cached results, and errors that a user can fix."""

import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

REPLACE_TIMEOUT = 5  # seconds; on Windows a virus scanner or a spreadsheet may hold a file open for a moment
LEFTOVER_AGE = 24 * 3600  # seconds after which an unfinished file of another machine counts as abandoned
HOST = re.sub(r"[^\w-]", "_", platform.node())
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class UserError(Exception):
    """Something the user can fix: one line that names the value, the place and the remedy."""

    def __str__(self):
        return "".join(c if c.isprintable() else " " for c in super().__str__())  # names in files can hold anything


def run_command(main):
    """Calls main(); a `UserError` or a failing file ends the program with one line and exit status 2, Ctrl-C with 130.

    Where nobody reads the output any more, as after `| head`, it ends with 1 and without a word. Characters that the
    output's encoding does not have are replaced, as cp1252 on Windows has no Japanese.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
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
        print(f"error: {error.filename}: {error.strerror}; fix that, and start again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(f"\nstopped; {interrupt}" if interrupt.args else "\nstopped", file=sys.stderr)
        sys.exit(130)


def unfinished(path):
    """Where a file or folder is written before it moves to `path`; the name says which process writes it."""
    return path.with_name(f"{path.name}.{HOST}-{os.getpid()}.tmp")


def remove_unfinished(folder):
    """Removes what dead processes left half-written in a folder and those below it."""
    for path in Path(folder).rglob("*.tmp"):
        writer = re.search(r"\.([\w-]+)-(\d+)\.tmp$", path.name)
        try:
            if writer and writer[1] == HOST and os.name != "nt":  # there os.kill(pid, 0) would end the process
                abandoned = not is_running(int(writer[2]))
            else:
                abandoned = time.time() - path.stat().st_mtime > LEFTOVER_AGE
            if abandoned and path.is_dir():
                shutil.rmtree(path)
            elif abandoned:
                path.unlink()
        except OSError:  # gone already, or another user's
            continue


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def replace(source, target):
    """os.replace; on Windows it waits for some seconds while another program holds a file open."""
    deadline = time.monotonic() + REPLACE_TIMEOUT
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def require_space(folder, size, remedy):
    """Raises UserError where the disk of `folder` has fewer than `size` bytes free. remedy: what else the user can do."""
    folder = Path(folder)
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"{folder}: {size / 1e9:.1f} GB are to be written there, but only {free / 1e9:.1f} GB are free; free space, name a "
            f"folder on another disk with --cache-dir, or {remedy}"
        )


def write_whole(path, write, keep=None):
    """Calls write(temporary_path) and moves the result to `path` once it is on disk.

    A reader finds the old file or the new one, whatever happens in between; with `keep`, a path, the old one goes there
    first, and for a moment there is none at `path`.
    Raises UserError where the disk is full or the folder may not be written.
    """
    path = Path(path)
    temporary = unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            replace(path, keep)
        replace(temporary, path)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space, or name another place") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to write into, which then takes the place of `folder`; where something fails, that stays as it was."""
    temporary, before = unfinished(folder), unfinished(folder.with_name(f"{folder.name}-before"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            replace(folder, before)
        try:
            replace(temporary, folder)
        except OSError:
            if before.exists():
                replace(before, folder)
            raise
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def key_of_model(module):
    """The key of what a torch module computes: the `architecture` of its parts, and names, shapes and values of its weights.

    Weights alone do not tell two models apart that differ in an activation or in the number of attention heads.
    """
    return key_of([getattr(part, "architecture", None) for part in module.modules()], key_of_tensors(module.state_dict()))


def key_of_tensors(tensors):
    """The key of {name: tensor}: names, shapes and every value."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:20]


def cached_tensor(path, shape, dtype, compute, remedy="delete what is in it"):
    """The tensor in the .npy file `path`, mapped into memory: what is not used takes no memory.

    Where no whole file of this shape and dtype is there, compute() yields the tensor in blocks of rows, and it is kept.
    Raises UserError where the disk has too little space, with a remedy, or the folder may not be written.
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
        require_space(Path(path).parent, int(np.prod(shape)) * kind.itemsize, remedy)
        write_whole(path, write)
        return read()
