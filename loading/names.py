"""Names in a captions file to files in a folder, as a person would match them."""

import difflib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from utils.folders import is_hidden_path
from utils.formats import PICTURE_ENDINGS

SAME_PATH = ("with other slashes", "by their paths")  # ways in which only the spelling of a path differs


def plain(name):
    """A name without case, and with its accents written in one way (macOS writes them in two characters)."""
    return unicodedata.normalize("NFC", name).casefold()


def without_ending(name):
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in PICTURE_ENDINGS else name


class Names:
    """The files of a folder, found by names as people write them.

    image_dir: the folder. base: the folder of the captions file, to which names may be relative.
    found: {name: file} and how: {name: words} of the names looked up so far that are not exactly those of files.
    """

    def __init__(self, image_dir, base):
        self.image_dir, self.base, self.found, self.how = Path(image_dir), Path(base), {}, {}
        self.all = {path.relative_to(image_dir).as_posix() for path in self.image_dir.rglob("*") if path.is_file()}
        self.files = {name for name in self.all if not is_hidden_path(name)}
        self.by_last, self.by_stem, self.by_number = defaultdict(list), defaultdict(list), defaultdict(list)
        for name in sorted(self.files):
            last = plain(name.rpartition("/")[2])
            self.by_last[last].append(name)
            if os.path.splitext(last)[1] in PICTURE_ENDINGS:
                stem = without_ending(last)
                self.by_stem[stem].append(name)
                if stem.isdecimal():
                    self.by_number[stem.lstrip("0")].append(name)

    def find(self, name):
        """The file of a name: a path relative to image_dir, or an absolute one outside; None where no file is plainly meant."""
        if name in self.all:  # also a hidden one: who writes its name out means it
            return name
        if name not in self.found:
            self.found[name], self.how[name] = self.search(name)
        return self.found[name]

    def search(self, name):
        """(file or None, how it was found)."""
        written = re.sub(r"#\d+$", "", name.replace("\\", "/"))
        written = re.sub(r"^(\./)+|(?<=/)(\./)+|(?<=[^:/]/)/+", "", written)
        if written in self.all:
            return written, "with other slashes"
        for path in [self.base / written, self.image_dir.parent / written]:  # an absolute path stays as it is
            try:
                is_file = path.is_file()
            except (OSError, ValueError):  # too long, or with a NUL
                return None, ""
            if is_file:
                path = Path(os.path.abspath(path))
                root = Path(os.path.abspath(self.image_dir))
                return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix(), "by their paths"
        last = plain(written.rpartition("/")[2])
        stem = without_ending(last)
        zeros = self.by_number.get(stem.lstrip("0"), ()) if stem.isdecimal() else ()
        for candidates, how in (
            (self.by_last.get(last, []), "without folders or capitals"),
            (self.by_stem.get(stem, []), "without endings"),
            (zeros, "without endings and leading zeros"),
        ):
            agreeing = [file for file in candidates if self.agree(written, file)]
            if agreeing:
                return (agreeing[0] if len(agreeing) == 1 else None), how
        return None, ""

    @staticmethod
    def agree(written, file):
        """Whether the folders of one are the last folders of the other."""
        a, b = plain(written).split("/")[-2::-1], plain(file).split("/")[-2::-1]
        return all(x == y for x, y in zip(a, b))

    def drop_ambiguous(self, names):
        """Forgets files that several different names stand for: not all can be right. One that is a file's own name stays."""
        meant = defaultdict(set)
        for name in names:
            if file := self.find(name):
                exact = name == file or self.how[name] in SAME_PATH
                meant[file].add(file if exact else plain(name))
        for name in names:
            loose = name not in self.all and self.found[name] and self.how[name] not in SAME_PATH
            if loose and len(meant[self.found[name]]) > 1:
                self.found[name] = None

    def lines(self, where, names):
        """A line on how some names were found, if not all are those of files."""
        how = Counter(self.how[name] for name in names if name not in self.all and self.found[name])
        if not how:
            return []
        example = next(name for name in names if name not in self.all and self.found[name])
        counts = ", ".join(f"{count:,} {words}" for words, count in how.items())
        return [f"{where}: names of images were matched to files: {counts} ({example} is {self.found[example]})"]

    def near(self, name):
        """(nearest: FILE), or nothing, for a message on a name that is not found."""
        last = plain(name.replace("\\", "/").rpartition("/")[2])
        close = difflib.get_close_matches(last, list(self.by_last)[:20_000], 1, 0.8)
        return f" (nearest: {self.by_last[close[0]][0]})" if close else ""
