"""Read shards: tar files of pictures and captions (WebDataset), parquet files, or a data set of the Hugging Face hub.

The library `datasets` reads one shard after another. `Shards` gives the records of any shard from any position on, and an
`Index` says how many there are.
"""

import contextlib
import json
import re
import tarfile
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import huggingface_hub

from config import HUB_PREFIX
from encoders.hub import hub_answers
from loading.columns import CAPTION_COLUMNS
from utils.cache import cache_key, file_stats
from utils.errors import UserError
from utils.files import expand, write_json
from utils.formats import PICTURE_ENDINGS, RAW_ENDINGS

MAX_CAPTIONS = 100_000  # from which a vocabulary is made
PICTURES = [ending[1:] for ending in sorted(PICTURE_ENDINGS - RAW_ENDINGS)] + ["JPG", "JPEG", "PNG"]  # endings in a tar file


@dataclass
class Record:
    """A picture of a shard. key: says where it is. picture: the bytes of its file. Either of the last two may be empty."""

    key: str
    picture: bytes
    captions: list

    @property
    def problem(self):
        """What is missing; empty where nothing is."""
        return "" if self.picture and self.captions else f"{self.key}: no {'caption' if self.picture else 'picture'}"


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
        import datasets  # takes more than a second, and only shards need it

        self.pattern, self.flag, self.files, self.columns = pattern, flag, [], columns
        self.tars = pattern.endswith(".tar")
        datasets.disable_progress_bars()
        if not pattern.startswith(HUB_PREFIX):
            self.files = expand(pattern)
            missing = [path for path in self.files if not Path(path).is_file()]
            self.contents = file_stats(self.files)
            if missing or not self.files:
                raise UserError(f"{flag} {pattern}: no such file{f' as {missing[0]}' if missing else 's'}; check the pattern")
        try:
            self.dataset = self.open_tars(datasets) if self.tars else self.open_tables(datasets, columns)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(f"{flag} {pattern}: cannot be read ({type(error).__name__}: {reason})") from None
        count = self.dataset.num_shards
        self.names = self.files if len(self.files) == count else [f"{pattern}, part {number}" for number in range(count)]

    @property
    def key(self):
        """A cache key of what they hold."""
        return cache_key(self.pattern, self.columns, self.contents)

    def open_tars(self, datasets):
        pictures = {ending: datasets.Image(decode=False) for ending in PICTURES}
        texts = {"txt": datasets.Value("string"), "json": datasets.Json(), "__key__": datasets.Value("string")}
        features = datasets.Features(pictures | texts)
        return datasets.load_dataset("webdataset", data_files=self.files, split="train", streaming=True, features=features)

    def open_tables(self, datasets, columns):
        """A table's row groups are its shards."""
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
            for number, row in enumerate(self.dataset.shard(self.dataset.num_shards, shard).skip(start), start=start):
                yield tar_record(row, self.names[shard]) if self.tars else self.table_record(row, shard, number)

    def table_record(self, row, shard, number):
        picture = row[self.picture]
        if isinstance(picture, dict):
            picture = picture["bytes"] or (Path(picture["path"]).read_bytes() if picture["path"] else b"")
        captions = [caption for column in self.captions for caption in as_captions(row[column])]
        return Record(f"{self.names[shard]}, row {number}", picture or b"", captions)


def find_columns(features, columns, where):
    """(picture column, [caption columns]) of a table. columns: as of `Shards`. Raises UserError where there are none."""
    import datasets

    picture, caption = columns
    pictures = [picture] if picture else [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    pictures = pictures or [name for name in ("image", "jpg", "png", "picture") if name in features]
    captions = [caption] if caption else [name for name in (*CAPTION_COLUMNS, "captions", "sentences") if name in features][:1]
    captions = captions or sorted(name for name in features if re.fullmatch(r"captions?_?\d+", name))
    for flag, names in (("--image-column", pictures), ("--caption-column", captions)):
        if not names or names[0] not in features:
            raise UserError(f"{where}: no such column; name it with {flag}: there are {', '.join(features) or 'none'}")
    kind = features[pictures[0]]
    if not isinstance(kind, datasets.Image) and getattr(kind, "dtype", "") not in ("binary", "large_binary"):
        raise UserError(f"{where}: the column {pictures[0]} holds no pictures ({kind}); name another with --image-column")
    for name in captions:
        kind = getattr(features[name], "feature", features[name])  # of a list
        if getattr(kind, "dtype", "") not in ("string", "large_string"):
            raise UserError(f"{where}: the column {name} holds no captions ({kind}); name another with --caption-column")
    return pictures[0], captions


def tar_record(row, shard):
    """The Record of one key of a tar file: KEY.jpg with KEY.txt, a caption in each line, or KEY.json with "caption"."""
    picture = next((row[ending]["bytes"] for ending in PICTURES if row[ending]), b"")
    captions = (row["txt"] or "").splitlines()
    if row["json"]:
        values = json.loads(row["json"]) if isinstance(row["json"], str) else row["json"]
        named = (
            [values[name] for name in (*CAPTION_COLUMNS, "captions") if name in values]
            if isinstance(values, dict)
            else [values]
        )
        captions += [caption for value in named for caption in as_captions(value)]
    return Record(f"{shard}: {row['__key__']}", picture, list(filter(None, map(str.strip, captions))))


def as_captions(value):
    """A caption, or a list of them, as a list without empty ones."""
    values = value if isinstance(value, list) else [value]
    return [caption.strip() for caption in values if isinstance(caption, str) and caption.strip()]


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
            with tarfile.open(path) as archive:
                records = list(tar_records(archive, path))
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


def tar_records(archive, path):
    """Yields a Record for each run of files with one key, as `datasets` reads them; a picture's bytes stand for all of them."""
    for key, members in groupby(filter(None, map(tar_member, archive)), key=itemgetter(0)):
        picture, captions = b"", []
        for _, ending, member in members:
            if ending in PICTURES:
                picture = b"a picture"
            elif ending in ("txt", "json"):
                row = dict.fromkeys([*PICTURES, "txt", "json"]) | {"__key__": key}
                captions += tar_record(row | {ending: archive.extractfile(member).read().decode()}, path).captions
        yield Record(f"{path}: {key}", picture, captions)


def tar_member(member):
    """(key, ending, member) of a file KEY.ENDING in a tar file; None for what `datasets` does not read."""
    name = re.match(r"((?:.*/)?[^./]+)\.([^/]*)$", member.name) if member.isfile() else None
    hidden = member.name.rpartition("/")[2].startswith(("__", "."))
    return (*name.groups(), member) if name and not hidden else None


def count_tables(shards):
    """The Index of a table's parts. Pictures are not read where the format allows that."""
    index, rows = Index([]), shards.dataset.select_columns(shards.captions)
    for shard in range(len(shards.names)):
        count = 0
        with damage_named(shards.names[shard]):
            for row in rows.shard(len(shards.names), shard):
                captions = [caption for column in shards.captions for caption in as_captions(row[column])]
                index.problems += [] if captions else [f"{shards.names[shard]}, row {count}: no caption"]
                count += 1
                index.num_captions += len(captions)
                index.captions += captions[: MAX_CAPTIONS - len(index.captions)]
        index.counts.append(count)
    return index
