"""Read pictures and captions of tar files: KEY.jpg beside KEY.txt, a caption in each line, or KEY.json, or both."""

import json
import re
import tarfile
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter

from loading.columns import CAPTION_COLUMNS
from utils.formats import PICTURE_ENDINGS, RAW_ENDINGS

PICTURES = {ending[1:] for ending in PICTURE_ENDINGS - RAW_ENDINGS}
TEXTS = {"txt", "json"}


@dataclass
class Record:
    """A picture of a shard. key: says where it is. picture: the bytes of its file. Either of the next two may be empty.

    fault: what cannot be read of its captions.
    """

    key: str
    picture: bytes
    captions: list
    fault: str = ""

    @property
    def problem(self):
        """What is missing or wrong; empty where nothing is."""
        if self.fault:
            return f"{self.key}: {self.fault}"
        return "" if self.picture and self.captions else f"{self.key}: no {'caption' if self.picture else 'picture'}"


def as_captions(value):
    """A caption, or a list of them, as a list without empty ones. Line breaks in a caption become spaces."""
    values = value if isinstance(value, list) else [value]
    return [" ".join(caption.split()) for caption in values if isinstance(caption, str) and caption.strip()]


def read_tar(path, columns=("", ""), start=0, pictures=True):
    """Yields the `Record`s of a tar file from a position on: one for each run of files with one key.

    columns: (picture, caption): endings of the files to take, such as input.jpg, or a caption's name in KEY.json; empty: those
    that are found. pictures: False leaves the pictures' bytes out, for counting. Raises tarfile.TarError or OSError for a
    damaged file.
    """
    with tarfile.open(path) as archive:
        files = [found for member in archive if (found := known_file(member))]
        for key, group in islice(groupby(with_keys(files), key=itemgetter(0)), start, None):
            members = [(field, kind, member) for _, field, kind, member in group]
            picture = next((m for field, kind, m in members if kind in PICTURES and columns[0] in ("", field)), None)
            contents = archive.extractfile(picture).read() if picture and pictures else b"a picture" if picture else b""
            texts = {field: archive.extractfile(m).read() for field, kind, m in members if kind in TEXTS}
            try:
                yield Record(f"{path}: {key}", contents, captions_of(texts, columns[1]))
            except ValueError as error:
                yield Record(f"{path}: {key}", contents, [], str(error))


def known_file(member):
    """(folder, name, ending in lower case, member) of a picture or text in a tar file; None for other and for hidden files."""
    folder, slash, name = member.name.rpartition("/")
    ending = name.rpartition(".")[2].lower()
    is_known = member.isfile() and not name.startswith(("__", ".")) and "." in name and ending in PICTURES | TEXTS
    return (folder + slash, name, ending, member) if is_known else None


def with_keys(files):
    """Yields (key, field, ending, member) of each of the files of `known_file`.

    WebDataset's key ends at the first dot of a name, so that KEY.input.jpg belongs to KEY.outputs.txt. Other writers have dots
    in their keys, as in IMG.0001.jpg. The key is the one with which more pictures find a text.
    """

    def pairs(separate):
        keys = [
            {folder + separate(name)[0] for folder, name, ending, _ in files if ending in kinds} for kinds in (PICTURES, TEXTS)
        ]
        return len(keys[0] & keys[1])

    at_first, at_last = (lambda name: name.partition(".")[::2]), (lambda name: name.rpartition(".")[::2])
    separate = at_last if pairs(at_last) > pairs(at_first) else at_first
    for folder, name, ending, member in files:
        key, field = separate(name)
        yield folder + key, field.lower(), ending, member


def captions_of(texts, column):
    """The captions of one key, none twice. texts: {ending: bytes}. Raises ValueError where a text cannot be read.

    Each line of a text is a caption, as in a folder of 1.jpg and 1.txt, but not where KEY.json has the same words as one:
    img2dataset writes each caption into both files, with its line breaks.
    """
    lines, named = [], []
    for field, contents in texts.items():
        text = decode_text(contents, field)
        if field.endswith("json"):
            named += json_captions(text, field, column)
        elif column in ("", field) or column not in texts:
            lines.append(text)
    if column and column not in texts and any(field.endswith("json") for field in texts):
        return list(dict.fromkeys(named))  # a name in KEY.json was asked for
    words = {" ".join(caption.split()).lower() for caption in named}
    found = [line for text in lines if " ".join(text.split()).lower() not in words for line in re.split(r"\r\n|\r|\n", text)]
    return list(dict.fromkeys([*filter(None, map(str.strip, found)), *named]))


def json_captions(text, field, column):
    """The captions of KEY.json: under the column, else under the first usual name; or the JSON is a caption or list of them."""
    try:
        values = json.loads(text)
    except ValueError:
        raise ValueError(f"its {field} file is not JSON") from None
    if not isinstance(values, dict):
        return as_captions(values)
    names = [column] if column else [*CAPTION_COLUMNS, "captions", "sentences"]
    found = next(filter(None, (as_captions(values.get(name)) for name in names)), [])
    if found or column:
        return found
    numbered = sorted(name for name in values if re.fullmatch(r"captions?_?\d+", name))
    return [caption for name in numbered for caption in as_captions(values[name])]


def decode_text(contents, field):
    """A text in UTF-8, or else in cp1252, as older Windows programs write. Raises ValueError where it is neither."""
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return contents.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ValueError(f"its {field} file is not UTF-8; save it as UTF-8")
