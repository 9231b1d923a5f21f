"""Atomic writes: files and folders appear complete or not at all."""

import codecs
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
CACHED = re.compile(r"[a-z-]+-[0-9a-f]{20}([.-].*)?")  # names in a cache folder: what it is, and a `utils.cache.cache_key`
IN_A_RUN = re.compile(  # names of what is written into a run folder by way of `temporary_path`
    r"(model|hubness|generator)\.safetensors|(last|previous)\.pt|(config|gan|relevance|tokenizer)\.json|reference(s|-words)\.npy|"
    r"(history|splits|tradeoff)\.csv|\w+\.png|README\.md|pictures(-before)?"
)
HOST = re.sub(r"[^\w-]", "_", platform.node())
DIGEST_SIZE = 16  # bytes
FILE_MANAGERS = (".DS_Store", "Thumbs.db", "desktop.ini")  # what these write into any folder that is looked at
PNG_MARK = "Source", "CLIP on captioned pictures"  # a text in each PNG
RESULTS = ("average", "files", "groups", "image", "images", "pairs", "points", "queries", "query", "runs")  # of --json
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def temporary_path(path):
    """Where a file or folder is written before it is renamed to `path`; the name says which process writes it."""
    return path.with_name(f"{path.name}.{HOST}-{os.getpid()}.tmp")


def remove_leftovers(folder):
    """Removes unfinished files of processes that have ended, in a folder and those below it.

    They are recognised by what `temporary_path` puts into a name. Whether a process of another machine has ended cannot be
    seen; of its files those go that are old, and only where the rest of the name is one of ours, too.
    """
    for path in Path(folder).rglob("*.tmp"):
        parts = re.fullmatch(r"(.+)\.([\w-]+)-(\d+)\.tmp", path.name)
        if not parts:
            continue
        target, host, pid = parts.groups()
        try:
            if host == HOST and os.name != "nt":  # on Windows os.kill(pid, 0) would end it
                abandoned = not is_running(int(pid))
            else:
                is_ours = CACHED.fullmatch(target) or IN_A_RUN.fullmatch(target)
                abandoned = is_ours and time.time() - path.stat().st_mtime > LEFTOVER_AGE
            if abandoned and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif abandoned:
                path.unlink()
        except (OSError, OverflowError):  # already removed, or another user's; a number that is no process's
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
def atomic_dir(folder, own=None):
    """A temporary folder to write into, which becomes `folder` at the end; after an error `folder` is unchanged.

    own: as for `require_own_folder`; a folder that an earlier call wrote is then replaced.
    Raises UserError as that does, before anything is written, and again at the end.
    """
    require_own_folder(folder, own)
    named, folder = folder, Path(folder).resolve()
    temporary, backup = temporary_path(folder), temporary_path(folder.with_name(f"{folder.name}-before"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if own:
            now = time.time_ns()
            for path in filter(Path.is_file, temporary.rglob("*")):
                os.utime(path, ns=(now, now))
            require_own_folder(named, own)  # something may have been put there meanwhile
            if folder.exists():
                replace(folder, backup)
        elif folder.exists():
            folder.rmdir()  # it is empty, else this raises; Windows replaces no folder
        try:
            replace(temporary, folder)
        except OSError:
            if backup.exists():
                replace(backup, folder)
            raise
        shutil.rmtree(backup, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_own_folder(folder, own=None):
    """Raises UserError unless a command may write a folder again, and so delete all that is in it.

    That is where there is none, or where it is empty. own: a pattern of the names below `folder` that the command writes, with
    / in them; a folder that holds nothing else is the command's, too, if all files have one time, as `atomic_dir` gives them: a
    file of the user's, or one that was edited, has another.
    """
    path = Path(folder).resolve()
    if not path.exists():
        return
    if not own and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")
    if not path.is_dir():
        raise UserError(f"{folder}: is a file; name a folder")
    if Path.cwd().is_relative_to(path):
        raise UserError(f"{folder}: is the current folder, or holds it; name a new folder")
    problem = own and foreign_part(path, own)
    if problem:
        raise UserError(f"{folder}: {problem}, and would be deleted; name a new folder, or move it")


def foreign_part(folder, own):
    """What in a folder is not as `atomic_dir` wrote it, in words; "" where all is. own: as for `require_own_folder`."""
    times = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.name in FILE_MANAGERS or path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            continue
        if not re.fullmatch(own, name) or not path.is_file():
            return f"holds {name}, which this command did not write"
        times.append((path.stat().st_mtime_ns, name))
    if len(times) == 1:  # a captions file alone; each command writes pictures, too
        return f"holds {times[0][1]} alone, which this command did not write"
    changed = len({time for time, _ in times}) > 1
    return f"holds {max(times)[1]}, which was changed after this command wrote it" if changed else ""


def require_own_file(path, is_own, flag):
    """Raises UserError where a file may not be replaced, because is_own(path) is not true of it.

    An empty file is anyone's. flag: the one that names the path, for the error.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{flag} {path}: is a folder or a device; name a file")
    if path.stat().st_size and not is_own(path):
        raise UserError(f"{flag} {path}: is there, and this command did not write it; name another file, or move it")


def is_own_png(path):
    """Whether a file is a PNG that was written here, recognised by its text PNG_MARK."""
    with open(path, "rb") as file:
        return b"\0".join(part.encode() for part in PNG_MARK) in file.read(1024)


def is_own_json(path):
    """Whether a file is of `write_json`, recognised by its layout, and holds results, recognised by its first name."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        return text == as_json(value) and next(iter(value)) in RESULTS
    except (ValueError, TypeError, StopIteration, RecursionError):
        return False


def require_own_results(json="", output=""):
    """Raises UserError where a command's --json or --output may not be replaced. "": that one is not written."""
    if json:
        require_own_file(json, is_own_json, "--json")
    if output:
        require_own_file(output, is_own_png, "--output")


def as_json(value):
    return json.dumps(value, indent=2) + "\n"


def write_json(path, value):
    """Writes plain values as a JSON file, atomically."""
    atomic_write(path, lambda temporary: temporary.write_text(as_json(value), encoding="utf-8"))


def digest(contents):
    """A hash of a file's bytes, by which it is recognised under another name."""
    return hashlib.blake2b(contents, digest_size=DIGEST_SIZE).digest()


def read_text(path, flag="--data-dir"):
    """A text file, in UTF-8, or as spreadsheets write it. flag: the one for its path. Raises UserError where it is no text."""
    try:
        return decode_text(Path(path).read_bytes(), path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; check {flag}") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None


def decode_text(contents, path):
    """The bytes of a text file -> text with line breaks of one character. Says so where it is not UTF-8.

    UTF-16 is known by its byte order mark. cp1252 (Western Europe) is taken only where that is certain: every other line is
    plain, and what is not ASCII are single letters and marks within words of ASCII letters. Raises UserError otherwise.
    """
    encoding = "utf-16" if contents[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    try:
        text = contents.decode(encoding)
    except UnicodeDecodeError as error:
        text, place = as_cp1252(contents), contents.count(b"\n", 0, error.start) + 1
        if text is None:
            name = "UTF-16" if encoding == "utf-16" else "UTF-8"
            raise UserError(f"{path}, row {place}: not {name} at byte {error.start}; save the file as UTF-8") from None
        word = next(word for word in text.split() if not word.isascii())[:30]
        print(f"{path}: read in cp1252, as it is not UTF-8 ({word}); if that is wrong, save it as UTF-8", flush=True)
    if encoding == "utf-16":
        print(f"{path}: read in UTF-16, as its byte order mark says", flush=True)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def as_cp1252(contents):
    """Bytes that are no UTF-8 as cp1252, or None where they may as well be something else."""
    if contents[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or b"\0" in contents:
        return None
    for line in contents.split(b"\n"):
        with contextlib.suppress(UnicodeDecodeError):
            if not line.decode().isascii():
                return None  # a line in UTF-8 beside one that is not
    try:
        text = contents.decode("cp1252")
    except UnicodeDecodeError:
        return None
    others = set(re.findall(r"[^\x00-\x7f]", text))
    if not all(other.isalpha() or other in "‘’“”‚„–—…•€£§©®°«»¿¡½¼¾×\xa0´·" for other in others):
        return None
    # Cyrillic, Greek and East Asian texts become runs of accented letters, those of old Macintoshes capitals within words.
    return None if re.search(r"[À-ÿŒœŠšŽžŸ]{3}|[a-z][À-ÞŒŠŽŸ]", text) else text


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
