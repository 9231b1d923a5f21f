"""The picture files of a folder, or in tar files."""

import contextlib
import os
import tarfile
from collections import Counter
from pathlib import Path

from utils.errors import UserError
from utils.files import expand, tar_members
from utils.formats import PICTURE_ENDINGS, missing_package


def find_pictures(folder):
    """Yields (path, bytes, modification time in ns) of the pictures in a folder and its subfolders, or in tar files.

    folder: 'DIR/*.tar' and 'DIR/{000..099}.tar' stand for tar files, whose pictures have paths such as DIR/000.tar/NAME.
    What cannot be read is left out, and how much is printed at the end: folders without read permission, names that are not
    UTF-8, formats whose package is not installed.
    Raises UserError if there are no pictures.
    """
    if str(folder).endswith(".tar"):
        yield from find_in_tars(str(folder))
        return
    num_found, num_unreadable, num_not_utf8, missing = 0, 0, 0, Counter()
    if not Path(folder).is_dir():
        raise UserError(f"--images {folder}: no such folder")
    folders = [os.path.abspath(folder)]
    while folders:
        try:
            entries = list(os.scandir(folders.pop()))
        except PermissionError:
            num_unreadable += 1
            continue
        except FileNotFoundError:  # deleted since it was listed
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif (ending := os.path.splitext(entry.name)[1].lower()) in PICTURE_ENDINGS and entry.is_file():
                if package := missing_package(ending):
                    missing[package] += 1
                elif not is_unicode(entry.path):
                    num_not_utf8 += 1
                else:
                    with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                        stat, num_found = entry.stat(), num_found + 1
                        yield entry.path, stat.st_size, stat.st_mtime_ns
    if num_unreadable or num_not_utf8:
        print(f"left out {num_unreadable:,} folders without read permission and {num_not_utf8:,} pictures with non-UTF-8 names")
    for package, count in missing.items():
        print(f"left out {count:,} pictures that need {package}: pip install {package}")
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
