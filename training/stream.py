"""Training on shards, without unpacking them and without a list of their pictures.

    python main.py --data-dir 'DIR/train-{000..099}.tar' --val-data DIR/val-000.tar
    python main.py --data-dir hf:NAME:train --val-data hf:NAME:validation

Only how many pictures each shard holds is kept (`shard_reader.Index`). So an epoch can be started anywhere, and a run that goes
on in the middle of one opens only the shards that it has not finished.

Each process has shards of its own. Each epoch has another order of them, and blocks of BLOCK pictures are shuffled.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from captions import load_captions, may_be_sided, mentions_left_or_right
from config import is_stream
from dataset import CLIPDataset, pad
from embedding import token_ids
from loading.splits import SPLIT_LISTS, hashed_split
from training import distributed
from training.shard_reader import Index, Shards, index_path, load_index
from utils.cache import cache_key
from utils.errors import UserError
from utils.files import atomic_dir, digest
from utils.images import as_batch, decode_image

BLOCK = 1024  # pictures that are shuffled together; they are kept in memory as files
HEAD = 2**20  # bytes of a shard that are compared when a run is resumed
NUM_SHOWN = 3  # problems listed in an error


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

    @property
    def num_real(self):
        """How many pictures a batch can have: each process takes its share of a batch from shards of its own."""
        shards = shards_of_ranks(self.index.counts, distributed.size())
        return distributed.size() * min(sum(self.index.counts[shard] for shard in own) for own in shards)

    @property
    def num_captions(self):
        return self.index.num_captions

    @property
    def captions(self):
        """The first captions, at most MAX_CAPTIONS."""
        return self.index.captions

    @property
    def contents(self):
        """What tells these shards from others of the same names: all of them cannot be read only for that."""
        if isinstance(self.shards.contents, str):
            return self.shards.contents  # a hub's revision
        heads = []
        for path, *_ in self.shards.contents:
            with open(path, "rb") as file:
                heads.append((os.path.getsize(path), digest(file.read(HEAD))))
        return heads

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


class StreamSampler:
    """The batches of one epoch from shards, for this process: what `dataset.PairSampler` is for pictures in a folder.

    A batch, or micro-batch, is a list of (id, record, seed). A picture is in an epoch once at most; those that do not fill the
    last batch are left out. It passes three generators: `rows` reads it, `drawn` shuffles, and `__iter__` makes batches.

    Attributes as of a PairSampler, and sizes: the pictures of each of this process's micro-batches.
    """

    def __init__(self, stream, config):
        self.stream, self.seed, self.epoch, self.start = stream, config.seed, 0, 0
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

    def __iter__(self):
        drawn = self.drawn(self.start * sum(self.sizes))
        for _ in range(self.start, self.steps):
            for size in self.sizes:
                yield list(islice(drawn, size))

    def drawn(self, start):
        """Yields (id, record, seed) of this process's epoch from position `start` on.

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


class RecordCrops(Dataset):
    """The random crops of records' pictures, with some of their captions. size, resize: as for `utils.images.resize_image`."""

    def __init__(self, config, size, resize):
        self.config, self.size, self.resize = config, size, resize
        self.cropper = CLIPDataset([], [], size, config.crop)

    def __getitem__(self, drawn):
        """What a `StreamSampler` draws -> ((crop, captions, id), None), or (None, what is wrong)."""
        number, record, seed = drawn
        if record.problem:
            return None, record.problem
        try:
            picture = decode_image(record.picture, self.size, self.resize)
        except ValueError as error:
            return None, f"{record.key}: {error}"
        choices, count = record.captions, self.config.captions_per_image
        captions = np.random.default_rng(seed).choice(choices, count, replace=len(choices) < count).tolist()
        keeps = not self.config.flip_left_right and any(map(mentions_left_or_right, captions))
        flips = self.config.hflip and not keeps and seed % 2
        return (self.cropper.random_crop(picture, seed, flips), captions, number), None


def collate_crops(results):
    """Results of `RecordCrops` -> (images of `as_batch`, a list of captions, ids, a list of what is wrong with the others)."""
    pairs, problems = [pair for pair, _ in results if pair], [problem for _, problem in results if problem]
    pictures, captions, ids = zip(*pairs) if pairs else ((), (), ())
    return as_batch(pictures) if pairs else None, [caption for drawn in captions for caption in drawn], list(ids), problems


class StreamLoader:
    """Training batches from shards, as `dataset.collate` makes them; the batch_sampler is a `StreamSampler`.

    A picture that cannot be read, with --skip-bad, leaves its batch one smaller, and costs a line.
    """

    def __init__(self, stream, config, model):
        self.config, self.tokenizer, self.reported = config, model.tokenizer, set(stream.index.problems)
        self.batch_sampler = StreamSampler(stream, config)
        if config.hflip and not config.flip_left_right and may_be_sided(stream.captions):
            config = replace(config, hflip=False)
        self.crops = RecordCrops(config, model.image_encoder.size, model.image_encoder.resize)
        workers = min(config.num_workers, os.cpu_count() or 1)
        options = {"num_workers": workers, "persistent_workers": workers > 0, "collate_fn": collate_crops}
        self.loader = DataLoader(self.crops, batch_sampler=self.batch_sampler, **options)

    def __iter__(self):
        batches, count = map(self.batch, self.loader), len(self.batch_sampler.sizes)
        while parts := list(islice(batches, count)):
            yield from parts if count == 1 else parts + parts

    def batch(self, crops):
        """What `collate_crops` gives, as a batch. Raises UserError without --skip-bad where something is wrong."""
        image, captions, ids, problems = crops
        for problem in problems:
            if not self.config.skip_bad:
                raise UserError(f"{problem}; fix or remove it, or pass --skip-bad")
            if problem not in self.reported:
                self.reported.add(problem)
                print(f"left out: {problem}", flush=True)
        if image is None:
            raise UserError(
                f"--data-dir {self.config.data_dir}: no picture of a batch, or of a micro-batch, can be read; fix the "
                "shards, or take larger batches"
            )
        text, attention_mask = pad(token_ids(self.tokenizer, captions), self.tokenizer.padding["pad_id"])
        return {"image": image, "image_id": torch.tensor(ids), "text": text, "attention_mask": attention_mask}

    def some(self, count):
        """Up to `count` (crop, captions, id) of the first epoch, for statistics."""
        results = map(self.crops.__getitem__, islice(self.batch_sampler.drawn(0), count))
        return [pair for pair, _ in results if pair]


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
        alike = folder.endswith(".tar") == config.data_dir.endswith(".tar")  # else the columns are those of the other kind
        columns = (config.image_column, config.caption_column) if alike else ("", "")
        folder = unpack(Shards(folder, columns, "--val-data"), config)
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
        if folder.is_dir():  # another process has just written the same pictures
            return folder
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
