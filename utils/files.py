"""Atomic writes: files and folders appear complete or not at all."""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tarfile
import time
from pathlib import Path

from utils.errors import UserError

REPLACE_TIMEOUT = 5  # seconds; on Windows a virus scanner or a spreadsheet may keep a file open
LEFTOVER_AGE = 24 * 3600  # seconds after which an unfinished file of another machine counts as abandoned
HOST = re.sub(r"[^\w-]", "_", platform.node())
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def temporary_path(path):
    """Where a file or folder is written before it is renamed to `path`; the name says which process writes it."""
    return path.with_name(f"{path.name}.{HOST}-{os.getpid()}.tmp")


def remove_leftovers(folder):
    """Removes unfinished files of processes that have ended, in a folder and those below it."""
    for path in Path(folder).rglob("*.tmp"):
        writer = re.search(r"\.([\w-]+)-(\d+)\.tmp$", path.name)
        try:
            if writer and writer[1] == HOST and os.name != "nt":  # on Windows os.kill(pid, 0) would end it
                abandoned = not is_running(int(writer[2]))
            else:
                abandoned = time.time() - path.stat().st_mtime > LEFTOVER_AGE
            if abandoned and path.is_dir():
                shutil.rmtree(path)
            elif abandoned:
                path.unlink()
        except OSError:  # already removed, or another user's
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
    """os.replace; on Windows it retries for REPLACE_TIMEOUT while another program keeps a file open."""
    deadline = time.monotonic() + REPLACE_TIMEOUT
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def atomic_write(path, write, backup=None):
    """Calls write(temporary_path) and renames the result to `path` once it is on disk.

    A reader finds the old file or the new one, even if the process is killed. backup: a path to which the old file is renamed
    first; for a moment there is then none at `path`.
    Raises UserError where the disk is full or the folder is not writable.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if backup and path.exists():
            replace(path, backup)
        replace(temporary, path)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space, or name another place") from None
    finally:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_dir(folder):
    """A temporary folder to write into, which replaces `folder` at the end; after an error `folder` is unchanged."""
    temporary, backup = temporary_path(folder), temporary_path(folder.with_name(f"{folder.name}-before"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            replace(folder, backup)
        try:
            replace(temporary, folder)
        except OSError:
            if backup.exists():
                replace(backup, folder)
            raise
        shutil.rmtree(backup, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, value):
    """Writes plain values as a JSON file, atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def digest(contents):
    """A hash of a file's bytes, by which it is recognised under another name."""
    return hashlib.blake2b(contents, digest_size=16).digest()


def read_text(path, flag="--data-dir"):
    """A UTF-8 text file. flag: the one for its path, for the error. Raises UserError where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; check {flag}") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


# ---- files within tar files ----------------------------------------------------------------------------------------


def expand(pattern):
    """The files that a pattern names, sorted; {000..099} in it stands for these numbers, * for anything."""
    if os.path.exists(pattern):  # whatever its name
        return [pattern]
    numbers = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not numbers:
        return sorted(glob.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern]
    first, last = numbers.groups()
    before, after = pattern[: numbers.start()], pattern[numbers.end() :]
    names = [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]
    return [path for name in names for path in expand(name)]


@functools.lru_cache(maxsize=8)
def tar_members(path, changed):
    """{name: (offset, bytes)} of the files in a tar file. changed: its modification time, so that a new one is read again."""
    with tarfile.open(path) as archive:
        return {member.name: (member.offset_data, member.size) for member in archive if member.isfile()}


def read_bytes(path):
    """The contents of a file, which may lie in a tar file: FOLDER/FILE.tar/NAME. Raises OSError where it cannot be read."""
    archive, tar, name = str(path).replace(os.sep, "/").rpartition(".tar/")
    if not tar or Path(path).exists():
        return Path(path).read_bytes()
    archive = f"{archive}.tar"
    try:
        offset, size = tar_members(archive, os.stat(archive).st_mtime_ns)[name]
    except (KeyError, tarfile.TarError):
        raise FileNotFoundError(f"{path}: no such file in {archive}") from None
    with open(archive, "rb") as file:
        file.seek(offset)
        return file.read(size)
