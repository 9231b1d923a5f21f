"""The picture files of a folder, or in tar files."""

import os
import tarfile
from pathlib import Path

from utils.errors import UserError
from utils.files import expand, tar_members
from utils.folders import HIDDEN, NOT_UTF8, LeftOut, is_hidden, is_unicode, picture_kind, walk_pictures
from utils.formats import HEAD, PICTURE_ENDINGS, missing_package


class NoPictures(UserError):
    """A folder that can be listed and has no pictures."""


def find_pictures(folder, verbose=False):
    """Yields (path, bytes, modification time in ns) of the pictures in a folder and its subfolders, or in tar files.

    folder: 'DIR/*.tar' and 'DIR/{000..099}.tar' stand for tar files, whose pictures have paths such as DIR/000.tar/NAME.
    What is left out is printed at the end: hidden files, folders that cannot be listed, names that are not UTF-8, formats whose
    package is not installed. verbose: every name.
    Raises NoPictures if there are none, UserError if the folder cannot be listed.
    """
    left_out, num_found = LeftOut(), 0
    found = find_in_tars(str(folder), left_out) if str(folder).endswith(".tar") else find_in_folder(folder, left_out)
    for entry in found:
        num_found += 1
        yield entry
    for line in left_out.lines(verbose):
        print(line)
    if not num_found:
        endings = ", ".join(sorted(PICTURE_ENDINGS))
        raise NoPictures(f"--images {folder}: no pictures there ({endings}, or other names with such contents)")


def find_in_folder(folder, left_out):
    """The pictures of a folder, as for `find_pictures`."""
    if os.path.isfile(folder):
        picture = f"is a file; name the folder that it is in ({Path(folder).absolute().parent}), or search with it:"
        raise UserError(f"--images {folder}: {picture} --image {folder}")
    try:
        yield from walk_pictures(os.path.abspath(folder), left_out)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--images {folder}: no such folder") from None
    except OSError as error:
        raise UserError(f"--images {folder}: cannot be listed ({error.strerror}); fix that, or name another folder") from None


def find_in_tars(pattern, left_out):
    """The same for the pictures in tar files. A file that is damaged is left out, with a line."""
    for archive in expand(pattern):
        try:
            changed = os.stat(archive).st_mtime_ns
            members = tar_members(archive, changed)
        except FileNotFoundError:
            raise UserError(f"--images {pattern}: no such file as {archive}; check the pattern") from None
        except (OSError, tarfile.TarError) as error:
            print(f"left out {archive}: damaged ({error})")
            continue
        for name, (offset, size) in members.items():
            path = f"{os.path.abspath(archive)}/{name}"
            kind = picture_kind(name, lambda archive=archive, offset=offset, size=size: member_head(archive, offset, size))
            if any(is_hidden(part) for part in name.split("/") if part != "."):
                left_out[HIDDEN] += [path] * bool(kind)
                continue
            if kind and (package := missing_package(kind)):
                left_out[f"that need {package} (pip install {package})"].append(path)
            elif kind and not is_unicode(name):
                left_out[NOT_UTF8].append(path)
            elif kind:
                yield path, size, changed


def member_head(archive, offset, size):
    """The first bytes of a file in a tar file."""
    with open(archive, "rb") as file:
        file.seek(offset)
        return file.read(min(HEAD, size))
