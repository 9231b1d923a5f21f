"""Training data in shards: tar files (WebDataset), parquet files, or a data set of the Hugging Face hub.

    python main.py --data-dir 'DIR/train-{000..099}.tar' --val-data DIR/val-000.tar
    python main.py --data-dir hf:NAME:train --val-data hf:NAME:validation

The library `datasets` reads one shard after another. Nothing is unpacked, and no list of pictures is kept: only how many each
shard holds (`Index`), which is counted once. So an epoch can be started anywhere, and a run that goes on in the middle of one
opens only the shards that it has not finished.

Each process has shards of its own. Each epoch has another order of them, and blocks of BLOCK pictures are shuffled.
"""

import contextlib
import json
import re
import tarfile
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import huggingface_hub
import numpy as np

from captions import CAPTION_COLUMNS, SPLIT_LISTS, hashed_split, load_captions, mentions_left_or_right
from config import HUB_PREFIX, is_stream
from dataset import CLIPDataset, collate
from embedding import token_ids
from encoders.hub import hub_answers
from training import distributed
from utils.cache import cache_key, file_stats
from utils.errors import UserError
from utils.files import atomic_dir, expand, write_json
from utils.images import PICTURE_ENDINGS, decode_image

BLOCK = 1024  # pictures that are shuffled together; they are kept in memory as files
AHEAD = 256  # pictures that are decoded ahead
MAX_CAPTIONS = 100_000  # from which a vocabulary is made
NUM_SHOWN = 3  # problems listed in an error
PICTURES = [ending[1:] for ending in sorted(PICTURE_ENDINGS)] + ["JPG", "JPEG", "PNG"]  # endings in a tar file


# ---- shards ------------------------------------------------------------------------------------------------------


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


# ---- as a training split -----------------------------------------------------------------------------------------


@dataclass
class Stream:
    """The training split of `training.data.Split`, where it lies in shards."""

    shards: Shards
    index: Index
    sources: tuple = ()  # none is generated
    texts: tuple = ()  # captions become token ids when they are drawn

    @property
    def num_images(self):
        return sum(self.index.counts)

    num_real = num_images

    @property
    def num_captions(self):
        return self.index.num_captions

    @property
    def captions(self):
        """The first captions, at most MAX_CAPTIONS."""
        return self.index.captions

    @property
    def identity(self):
        """What has to be the same when a run is resumed."""
        return [Path(name).name for name in self.shards.names], self.index.counts, self.index.captions


def open_stream(config):
    """The `Stream` of a Config whose --data-dir names shards, else None.

    Raises UserError where there are none, fewer than processes, or, without --skip-bad, problems.
    """
    if not is_stream(config.data_dir):
        return None
    shards = Shards(config.data_dir, (config.image_column, config.caption_column))
    stream = Stream(shards, load_index(shards, config.cache_dir))
    problems, count, size = stream.index.problems, len(shards.names), distributed.size()
    if not stream.num_captions:
        beside = "a KEY.txt or KEY.json beside each KEY.jpg" if shards.tars else "text in the caption column"
        example = f" ({problems[0]})" if problems else ""
        raise UserError(f"--data-dir {config.data_dir}: no captions{example}; there has to be {beside}")
    if problems and not config.skip_bad:
        more = f" and {len(problems) - NUM_SHOWN} more" if len(problems) > NUM_SHOWN else ""
        raise UserError(f"{'; '.join(problems[:NUM_SHOWN])}{more}; fix or remove it, or pass --skip-bad")
    if count < size:
        raise UserError(f"--data-dir {config.data_dir}: {count} shards for {size} processes; write at least {size}")
    return stream


def shards_of_ranks(counts, size):
    """The shards of each of `size` processes, as lists of positions: the largest first, to the process that has the fewest."""
    shards, totals = [[] for _ in range(size)], [0] * size
    for shard in sorted(range(len(counts)), key=lambda shard: -counts[shard]):
        rank = totals.index(min(totals))
        shards[rank].append(shard)
        totals[rank] += counts[shard]
    return [sorted(own) for own in shards]


class StreamLoader:
    """Training batches from shards: what a DataLoader with a `dataset.PairSampler` is for pictures in a folder.

    It has the sampler's attributes, and is its own batch_sampler. A picture is in an epoch once at most; those that do not fill
    the last batch are left out. A picture that cannot be read, with --skip-bad, leaves its batch one smaller.

    A picture passes four generators: `rows` reads it, `drawn` shuffles and draws captions, `pairs` crops, and `__iter__` makes
    batches.
    """

    def __init__(self, stream, config, model):
        self.stream, self.config, self.tokenizer = stream, config, model.tokenizer
        self.size, self.resize = model.image_encoder.size, model.image_encoder.resize
        self.batch_sampler, self.seed, self.epoch, self.start = self, config.seed, 0, 0
        self.rank, size, batch_size = distributed.rank(), distributed.size(), config.batch_size
        self.parts = max(size, batch_size // (config.micro_batch_size or batch_size))
        parts_of = np.array_split(range(self.parts), size)
        bounds = np.linspace(0, batch_size, self.parts + 1).round().astype(int)
        self.local_parts = parts_of[self.rank]
        self.sizes = np.diff(bounds)[self.local_parts].tolist()
        shards = shards_of_ranks(stream.index.counts, size)
        self.own = shards[self.rank]
        totals = [sum(stream.index.counts[shard] for shard in own) for own in shards]
        self.steps = min(total // int(np.diff(bounds)[parts].sum()) for total, parts in zip(totals, parts_of))
        if not self.steps:
            raise UserError(
                f"--batch-size {batch_size}: the shards of one process hold only {min(totals)} pictures; lower it, or write "
                "more shards of equal size"
            )
        self.reported, self.local = set(stream.index.problems), threading.local()

    def __iter__(self):
        share = sum(self.sizes)
        pairs = self.pairs(self.start * share, self.steps * share)
        for _ in range(self.start, self.steps):
            parts = [self.collate(list(islice(pairs, size))) for size in self.sizes]
            yield from parts if len(parts) == 1 else parts + parts

    def collate(self, pairs):
        """Pairs of `pairs`, or None for one that cannot be read -> a batch of `dataset.collate`."""
        pairs = [pair for pair in pairs if pair]
        if not pairs:
            raise UserError(
                f"--data-dir {self.config.data_dir}: no picture of a batch, or of a micro-batch, can be read; fix the "
                "shards, or take larger batches"
            )
        pictures, captions, ids = zip(*pairs)
        count = self.config.captions_per_image
        texts = token_ids(self.tokenizer, [caption for drawn in captions for caption in drawn])
        texts = [texts[start : start + count] for start in range(0, len(texts), count)]
        return collate(list(zip(pictures, texts, ids)), self.tokenizer.padding["pad_id"])

    def pairs(self, start, end):
        """Yields (crop, captions, id) from position `start` of this process's epoch to `end`; threads decode AHEAD pictures."""
        with ThreadPoolExecutor(max(1, self.config.num_workers)) as pool:
            pending = deque()
            for drawn in islice(self.drawn(start), end - start):
                pending.append(pool.submit(self.read, *drawn))
                if len(pending) == AHEAD:
                    yield self.checked(pending.popleft().result())
            while pending:
                yield self.checked(pending.popleft().result())

    def drawn(self, start):
        """Yields (id, record, captions, seed) of this process's epoch from position `start` on.

        All is drawn block by block, from the seed, the epoch, the process and the block. A thread reads the next block while
        this one is used.
        """
        order = np.random.default_rng([self.seed, self.epoch, self.rank]).permutation(self.own)
        total = sum(self.stream.index.counts[shard] for shard in order)
        first, skipped = divmod(start, BLOCK)
        rows = self.rows(order, first * BLOCK)

        def read():
            return list(islice(rows, BLOCK))

        with ThreadPoolExecutor(1) as reader:
            following = reader.submit(read)
            for block in range(first, -(-total // BLOCK)):
                records, following = following.result(), reader.submit(read)
                rng = np.random.default_rng([self.seed, self.epoch, self.rank, block])
                shuffled = rng.permutation(len(records))
                seeds = rng.integers(2**31, size=len(records)).tolist()
                for place, seed in list(zip(shuffled, seeds))[skipped:]:
                    yield *records[place], seed
                skipped = 0

    def rows(self, order, start):
        """Yields (id, record) from position `start` of the shards in this order. id: the position among all shards' records."""
        counts = self.stream.index.counts
        first_ids = np.cumsum([0, *counts])
        for shard in order:
            if start < counts[shard]:
                for position, record in enumerate(islice(self.stream.shards.read(shard, start), counts[shard] - start), start):
                    yield int(first_ids[shard]) + position, record
            start = max(0, start - counts[shard])

    def read(self, number, record, seed):
        """(pair, problem), one of which is None: the random crop of a record's picture, some of its captions, and its id."""
        if record.problem:
            return None, record.problem
        if not hasattr(self.local, "cropper"):  # one a thread, as it has a state
            self.local.cropper = CLIPDataset([], [], self.size, self.config.crop)
        try:
            picture = decode_image(record.picture, self.size, self.resize)
        except ValueError as error:
            return None, f"{record.key}: {error}"
        choices, count = record.captions, self.config.captions_per_image
        captions = np.random.default_rng(seed).choice(choices, count, replace=len(choices) < count).tolist()
        keeps = not self.config.flip_left_right and any(map(mentions_left_or_right, captions))
        flips = self.config.hflip and not keeps and seed % 2
        return (self.local.cropper.random_crop(picture, seed, flips), captions, number), None

    def checked(self, result):
        """The pair of a `read`; None where there is none, with a line the first time. Raises UserError without --skip-bad."""
        pair, problem = result
        if problem and not self.config.skip_bad:
            raise UserError(f"{problem}; fix or remove it, or pass --skip-bad")
        if problem and problem not in self.reported:
            self.reported.add(problem)
            print(f"left out: {problem}", flush=True)
        return pair

    def some(self, count):
        """Up to `count` pairs of the first epoch, for statistics."""
        return [pair for pair in self.pairs(0, min(count, self.steps * sum(self.sizes))) if pair]


def stream_files(config, stream, image_dir):
    """What a run on shards uses in the cache: the counts, and the folder of unpacked validation pictures."""
    counts = [index_path(stream.shards, config.cache_dir)] if stream else []
    return counts + ([image_dir.parent] if is_stream(config.val_data) else [])


# ---- validation --------------------------------------------------------------------------------------------------


def validation_table(config):
    """(table, image_dir, skipped), as of `captions.load_captions`, of the validation pictures of a run on shards.

    They are those of --val-data: all that its shards hold, which are unpacked into the cache, or of a folder those that a list
    names as validation images, else all.
    """
    folder = config.val_data
    if is_stream(folder):
        folder = unpack(Shards(folder, (config.image_column, config.caption_column), "--val-data"), config)
    table, image_dir, skipped = load_captions(folder, skip_bad=config.skip_bad)
    unlisted = (table["split"] == table["image"].map(hashed_split)).all()
    table = table if unlisted else table[table["split"] == "val"].reset_index(drop=True)
    if table.empty:
        raise UserError(f"--val-data {folder}: none of its images is a validation image; name them in a *devImages.txt there")
    return table.assign(split="val"), image_dir, skipped


def unpack(shards, config):
    """Writes the pictures and captions of shards into a folder of the cache, unless they are there, and returns it."""
    folder = Path(config.cache_dir) / f"unpacked-{cache_key(shards.key, config.skip_bad)}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_unpacked(folder, shards, config.skip_bad)
    except OSError as error:
        raise UserError(f"--cache-dir {config.cache_dir}: cannot be written ({error.strerror}); name another folder") from None
    return folder


def write_unpacked(folder, shards, skip_bad):
    """Writes the pictures and captions of shards into a folder; on failure it leaves nothing behind."""
    number, problems = 0, []
    with atomic_dir(folder) as temporary:
        (temporary / "Images").mkdir()
        with open(temporary / "captions.txt", "w", encoding="utf-8") as captions:
            captions.write("image\tcaption\n")
            for shard in range(len(shards.names)):
                for record in shards.read(shard):
                    if record.problem:
                        problems.append(record.problem)
                        continue
                    name = f"{number:08d}.jpg"  # decoders look at the bytes, not at the ending
                    (temporary / "Images" / name).write_bytes(record.picture)
                    captions.writelines(f"{name}\t{' '.join(caption.split())}\n" for caption in record.captions)
                    number += 1
        (temporary / f"shards.{SPLIT_LISTS['val']}").write_text("".join(f"{i:08d}.jpg\n" for i in range(number)))
        if problems and not skip_bad or not number:
            raise UserError(f"--val-data {shards.pattern}: {(problems or ['no pictures'])[0]}; fix it, or pass --skip-bad")
