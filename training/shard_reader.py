"""Read shards: tar files of pictures and captions (WebDataset), parquet files, or a data set of the Hugging Face hub.

`loading.tars` reads tar files, and the library `datasets` tables, one shard after another. `Shards` gives the records of any
shard from any position on, and an `Index` says how many there are.
"""

import contextlib
import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub

from config import HUB_PREFIX
from encoders.hub import hub_answers
from loading.columns import CAPTION_COLUMNS
from loading.tars import Record, as_captions, read_tar
from utils.cache import cache_key, file_stats
from utils.errors import UserError
from utils.files import expand, write_json

MAX_CAPTIONS = 100_000  # from which a vocabulary is made
RULES = 2  # of what counts as a record and a caption; another number counts again


@contextlib.contextmanager
def damage_named(shard):
    """A context in which what `datasets` raises for a damaged shard becomes a UserError with its name."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, tarfile.TarError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{shard}: damaged ({type(error).__name__}: {reason}); fix or remove it") from None


class Shards:
    """The shards that --data-dir or --val-data names: names, and read(shard, start) for the records of one from a position on.

    columns: (picture, caption), the names of a table's columns; empty: those that are found. flag: the one that names the
    shards, for errors. Raises UserError where there are none, or no such columns.
    """

    def __init__(self, pattern, columns=("", ""), flag="--data-dir"):
        self.pattern, self.flag, self.files, self.columns = pattern, flag, [], columns
        self.tars = pattern.endswith(".tar")
        if not pattern.startswith(HUB_PREFIX):
            self.files = expand(pattern)
            missing = [path for path in self.files if not Path(path).is_file()]
            self.contents = file_stats(self.files)
            if missing or not self.files:
                raise UserError(f"{flag} {pattern}: no such file{f' as {missing[0]}' if missing else 's'}; check the pattern")
        if self.tars:
            self.names = self.files
            return
        try:
            self.dataset = self.open_tables(columns)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(f"{flag} {pattern}: cannot be read ({type(error).__name__}: {reason})") from None
        count = self.dataset.num_shards
        self.names = self.files if len(self.files) == count else [f"{pattern}, part {number}" for number in range(count)]

    @property
    def key(self):
        """A cache key of what they hold."""
        return cache_key(RULES, self.pattern, self.columns, self.contents)

    def open_tables(self, columns):
        """A table's row groups are its shards."""
        import datasets  # takes more than a second, and only tables need it

        datasets.disable_progress_bars()
        if self.files:
            dataset = datasets.load_dataset("parquet", data_files=self.files, split="train", streaming=True)
        else:
            name, split = self.hub_name()
            if Path(name).is_dir():
                self.contents = file_stats(sorted(path for path in Path(name).rglob("*") if path.is_file()))
            else:
                self.contents = huggingface_hub.HfApi().dataset_info(name).sha
            revision = self.contents if isinstance(self.contents, str) else None
            dataset = datasets.load_dataset(name, split=split, revision=revision, streaming=True)
        self.picture, self.captions = find_columns(dataset.features or {}, columns, f"{self.flag} {self.pattern}")
        dataset = dataset.select_columns([self.picture, *self.captions]).reshard()
        is_image = isinstance(dataset.features[self.picture], datasets.Image)
        return dataset.cast_column(self.picture, datasets.Image(decode=False)) if is_image else dataset

    def hub_name(self):
        """(NAME, SPLIT) of hf:NAME[:SPLIT]; NAME is a local folder or a hub's. Raises UserError where no hub answers."""
        name, colon, split = self.pattern.removeprefix(HUB_PREFIX).rpartition(":")
        if not colon or re.search(r"[/\\.]", split):  # a colon of a Windows drive
            name, split = self.pattern.removeprefix(HUB_PREFIX), "train"
        if not Path(name).is_dir() and not hub_answers():
            raise UserError(f"{self.flag} {self.pattern}: no such folder, and the hub cannot be reached; check the network")
        return name, split

    def read(self, shard, start=0):
        """Yields the `Record`s of a shard. Raises UserError where it is damaged."""
        with damage_named(self.names[shard]):
            if self.tars:
                yield from read_tar(self.names[shard], self.columns, start)
                return
            for number, row in enumerate(self.dataset.shard(self.dataset.num_shards, shard).skip(start), start=start):
                yield self.table_record(row, shard, number)

    def table_record(self, row, shard, number):
        picture = row[self.picture]
        if isinstance(picture, dict):
            path = picture.get("path") or ""
            picture = picture["bytes"] or (Path(path).read_bytes() if path and Path(path).is_file() else b"")
        captions = [caption for column in self.captions for caption in as_captions(row[column])]
        return Record(f"{self.names[shard]}, row {number}", picture or b"", captions)


def find_columns(features, columns, where):
    """(picture column, [caption columns]) of a table. columns: as of `Shards`. Raises UserError where there are none.

    Capitals in names do not count, unless two columns differ in nothing else.
    """
    picture, caption = columns
    pictures = named(features, picture) if picture else [name for name, kind in features.items() if holds_files(kind)]
    pictures = pictures or named(features, *(() if picture else ("image", "jpg", "png", "picture")))
    captions = named(features, *([caption] if caption else (*CAPTION_COLUMNS, "captions", "sentences")))[:1]
    if not (captions or caption):
        captions = sorted(name for name in features if re.fullmatch(r"captions?_?\d+", name, re.IGNORECASE))
    for flag, names in (("--image-column", pictures), ("--caption-column", captions)):
        if not names:
            raise UserError(f"{where}: no such column; name it with {flag}: there are {', '.join(features) or 'none'}")
    kind = features[pictures[0]]
    if not holds_files(kind) and getattr(kind, "dtype", "") not in ("binary", "large_binary"):
        raise UserError(f"{where}: the column {pictures[0]} holds no pictures ({kind}); name another with --image-column")
    for name in captions:
        kind = getattr(features[name], "feature", features[name])  # of a list
        if getattr(kind, "dtype", "") not in ("string", "large_string"):
            raise UserError(f"{where}: the column {name} holds no captions ({kind}); name another with --caption-column")
    return pictures[0], captions


def named(features, *names):
    """The columns with these names, in this order: as they are, else with other capitals or spaces around them."""
    plain = {column.strip().lower(): column for column in reversed(features)}
    found = [name if name in features else plain.get(name.strip().lower()) for name in names]
    return list(filter(None, found))


def holds_files(kind):
    """Whether a column's type is that of pictures, {bytes, path}; pandas writes these two fields alone."""
    import datasets

    fields = kind if isinstance(kind, dict) else {}
    is_bytes = getattr(fields.get("bytes"), "dtype", "") in ("binary", "large_binary")
    return isinstance(kind, datasets.Image) or is_bytes


# ---- the index ---------------------------------------------------------------------------------------------------


@dataclass
class Index:
    """How many records each shard has, what is wrong with some, how many captions there are, and the first of them."""

    counts: list
    problems: list = field(default_factory=list)
    num_captions: int = 0
    captions: list = field(default_factory=list)


def index_path(shards, cache_dir):
    return Path(cache_dir) / f"shards-{shards.key}.json"


def load_index(shards, cache_dir):
    """The `Index` of shards, from the cache or counted. Raises UserError for a shard that cannot be read."""
    path = index_path(shards, cache_dir)
    if path.exists():
        return Index(**json.loads(path.read_text(encoding="utf-8")))
    print(f"counting the pictures of {len(shards.names):,} shards", flush=True)
    index = count_tars(shards) if shards.tars else count_tables(shards)
    write_json(path, index.__dict__)
    return index


def count_tars(shards):
    """The Index of tar files. Pictures are not read. A file that is damaged counts as empty, and is a problem."""
    index = Index([])
    for path in shards.files:
        try:
            records = list(read_tar(path, shards.columns, pictures=False))
        except (OSError, tarfile.TarError, ValueError, AttributeError) as error:
            index.problems.append(f"{path}: damaged, all its pictures are left out ({error})")
            index.counts.append(0)
            continue
        seen = set()
        for record in records:
            apart = f"{record.key}: its files do not lie side by side in the tar file" if record.key in seen else ""
            index.problems += filter(None, [apart or record.problem])
            seen.add(record.key)
            index.num_captions += len(record.captions)
            index.captions += record.captions[: MAX_CAPTIONS - len(index.captions)]
        index.counts.append(len(records))
    return index


def count_tables(shards):
    """The Index of a table's parts. Pictures are looked at, but not those that would have to be downloaded for it."""
    index, is_local = Index([]), not isinstance(shards.contents, str)
    rows = shards.dataset if is_local else shards.dataset.select_columns(shards.captions)
    for shard in range(len(shards.names)):
        count = 0
        with damage_named(shards.names[shard]):
            for row in rows.shard(len(shards.names), shard):
                record = shards.table_record(row if is_local else {shards.picture: b"a picture"} | row, shard, count)
                index.problems += filter(None, [record.problem])
                count += 1
                index.num_captions += len(record.captions)
                index.captions += record.captions[: MAX_CAPTIONS - len(index.captions)]
        index.counts.append(count)
    return index
