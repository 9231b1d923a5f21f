"""Which files of a folder are pictures, or data at all: one rule for searches, classes, duplicates and training data.

Left out are hidden names and those that other programs keep for themselves. Symbolic links are followed, and each folder and
file is taken once. What a file is, its first bytes say where its name does not.
"""

import os
import stat
from collections import defaultdict
from unicodedata import category

from utils.formats import HEAD, KIND_OF_ENDING, kind_of, missing_package

# Thumbnails, bins and indexes of storage devices, macOS and Windows; beside these, all names that begin with a dot.
FOREIGN = {"@eadir", "@tmp", "@__thumb", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "system volume information"}
FOREIGN |= {"__macosx", "__pycache__", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"}
OTHER_ENDINGS = (  # of files that are not opened to see whether they are pictures, as they never are
    ".txt .md .html .htm .xml .json .jsonl .csv .tsv .log .yaml .yml .toml .ini .cfg .rst .tex .srt .vtt .xmp .aae .thm "
    ".py .pyc .ipynb .js .css .c .h .cpp .java .rs .go .sh .so .o .a .dll .exe .class .jar "
    ".zip .gz .bz2 .xz .zst .7z .rar .tar .tgz .iso .dmg .parquet .arrow .npy .npz .pt .pth .bin .safetensors .sqlite .db "
    ".mp4 .mov .m4v .avi .mkv .webm .mpg .mpeg .mts .3gp .wmv .mp3 .wav .flac .ogg .m4a .aac "
    ".pdf .doc .docx .xls .xlsx .ppt .pptx .odt .ods .odp .ps .eps .svg .ai .psd .xcf"
)
OTHER_ENDINGS = set(OTHER_ENDINGS.split())
HIDDEN = "hidden, or kept there by another program"
NOT_UTF8 = "with names that are not UTF-8"
DANGLING = "that are links to nothing"
NUM_NAMED = 3  # files in a message; the others are counted


class LeftOut(defaultdict):
    """{reason: paths that a walk left out, or files that cannot be read}; a reason goes on with "left out N files "."""

    def __init__(self):
        super().__init__(list)

    def lines(self, verbose=False):
        """A line for each reason, with some of the names; verbose: and one for each file."""
        for reason, paths in self.items():
            named = [printable(path) for path in paths]
            what = "file" if len(named) == 1 else "files"
            if verbose:
                yield f"left out {len(named):,} {what} {reason}:"
                yield from (f"  {name}" for name in named)
            else:
                more = ", ..." if len(named) > NUM_NAMED else ""
                shown = ", ".join(os.path.basename(name) for name in named[:NUM_NAMED])
                yield f"left out {len(named):,} {what} {reason}: {shown}{more}"


def printable(path):
    """A path or text as one line, whatever is in it: what would break the line or move the cursor is escaped, as \\n."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(c if c.isprintable() or category(c) in ("Zs", "Cf") else repr(c)[1:-1] for c in text)


def is_hidden(name):
    """Whether a file or folder of this name is hidden, or kept by another program for itself."""
    return name.startswith(".") or name.lower() in FOREIGN


def is_hidden_path(path):
    """Whether a relative path, with slashes, leads to a file that is hidden, or into a folder that is."""
    return any(map(is_hidden, path.split("/")))


def may_be_picture(name):
    """Whether a file of this name can be a picture; it is opened to see, where the ending says nothing."""
    return not is_hidden(name) and os.path.splitext(name)[1].lower() not in OTHER_ENDINGS


def is_unicode(path):
    """False for a path with bytes that are not UTF-8: Python represents them as surrogates, which SQLite rejects."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def picture_kind(name, read_head):
    """The kind of picture that a file of this name is taken for; empty: none.

    read_head: a function that gives its first bytes, which is called where the ending does not say it, or where pictures of
    that ending cannot be read here: the file may be another one.
    """
    ending = os.path.splitext(name)[1].lower()
    kind = KIND_OF_ENDING.get(ending, "")
    if kind and not missing_package(kind) or not kind and ending in OTHER_ENDINGS:
        return kind
    return kind_of(read_head(), ending) or kind


def read_head(path):
    """The first bytes of a file; none where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""


def walk_pictures(folder, left_out):
    """Yields (path, bytes, modification time in ns) of the pictures in a folder and its subfolders. left_out: a `LeftOut`."""
    for path, found in walk(folder, left_out, pictures=True):
        kind = picture_kind(os.path.basename(path), lambda path=path: read_head(path))
        if not kind:
            continue
        if package := missing_package(kind):
            left_out[f"that need {package} (pip install {package})"].append(path)
        elif not is_unicode(path):
            left_out[NOT_UTF8].append(path)
        else:
            yield path, found.st_size, found.st_mtime_ns


def walk(folder, left_out, pictures=False):
    """Yields (path, os.stat_result) of the files in a folder and its subfolders, by the rules above.

    left_out: a `LeftOut`, which gets what is hidden, broken or cannot be listed. pictures: leave out, and do not mention,
    what cannot be a picture by its name. The order is that of the disk; what links lead to comes last.
    Raises OSError where the folder itself cannot be listed.
    """
    root, real_root = os.fspath(folder), os.path.realpath(folder)
    os.scandir(root).close()
    folders, links, seen = [root], [], set()
    while folders or links:
        path = folders.pop() if folders else links.pop(0)
        try:
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(path) as listing:
                entries = list(listing)
        except FileNotFoundError:  # deleted since it was listed
            continue
        except OSError as error:
            left_out[f"that cannot be listed ({error.strerror})"].append(path)
            continue
        for entry in entries:
            try:
                is_link, hidden = entry.is_symlink(), is_hidden(entry.name)
                wanted = not pictures or may_be_picture(entry.name)
                if hidden:
                    if not pictures or entry.is_dir() or os.path.splitext(entry.name)[1].lower() in KIND_OF_ENDING:
                        left_out[HIDDEN].append(entry.path)
                    continue
                found = entry.stat()
            except FileNotFoundError:  # a link to nothing, or deleted since it was listed
                if is_link and wanted:
                    left_out[DANGLING].append(entry.path)
            except OSError as error:
                left_out[f"that cannot be read ({error.strerror})"].append(entry.path)
            else:
                if stat.S_ISDIR(found.st_mode):
                    (links if is_link else folders).append(entry.path)
                elif stat.S_ISREG(found.st_mode) and wanted and not (is_link and is_inside(entry.path, real_root)):
                    yield entry.path, found


def is_inside(link, real_root):
    """Whether a link leads to a file that the walk through a real folder finds under the file's own name."""
    path = os.path.realpath(link)
    below = os.path.join(real_root, "")
    return path.startswith(below) and not is_hidden_path(path[len(below) :].replace(os.sep, "/"))
