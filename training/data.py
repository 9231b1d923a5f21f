"""The pictures and captions of a training: find them, split them, and load training batches."""

import contextlib
import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Subset

from captions import image_positions, load_captions, load_generated, may_be_sided, mentions_left_or_right
from config import SHAPES, AtMost, generated_per_batch, is_stream
from dataset import CLIPDataset, PairSampler, RepeatingSampler, collate
from Datasets import flickr8k, shapes
from embedding import IMAGE_BATCH, TEXT_BATCH, activation_features, image_features, text_features, token_ids
from loading.splits import SplitNotes
from loading.trained import earlier_rows, with_contents, without_trained
from training import distributed
from training.stream import Stream, StreamLoader, validation_table
from utils.errors import UserError
from utils.images import decode_images


@dataclass
class Split:
    """n images and their m captions: the model's inputs or, for a frozen encoder, its cached outputs.

    image_key and text_key, those of `dataset.collate`, say what images and texts hold.
    """

    names: list  # n file names
    pictures: Subset  # n decoded pictures
    captions: list  # m strings
    image_of_text: np.ndarray  # (m,) position of each caption's image
    images: Subset | torch.Tensor  # n decoded pictures, or (n, crops, ...) activations or features of crops of them
    texts: list | torch.Tensor  # m lists of token ids, or (m, d_t) features
    image_key: str = "image"  # or image_activations or image_features
    text_key: str = "text"  # or text_features
    sources: list = field(
        default_factory=list
    )  # for each generated image, which come last: positions of real images with its caption
    contents: tuple = ()  # digests of the n image files
    notes: SplitNotes | None = None  # of the validation split: how the data was split

    @property
    def num_images(self):
        return len(self.names)

    @property
    def num_captions(self):
        return len(self.captions)

    @property
    def num_real(self):
        """How many images are not generated."""
        return len(self.names) - len(self.sources)

    @property
    def identity(self):
        """What has to be the same when a run is resumed."""
        return self.names, self.captions


def fetch_data(config, flickr8k_dir):
    """The Config with the folder of its data, which is first downloaded or drawn if needed."""
    if not (config.data_dir or config.captions_path):
        if not (flickr8k_dir or config.download):
            raise UserError(f"no Flickr8k in {' or '.join(flickr8k.PLACES)}; pass --download, or {flickr8k.BY_HAND}")
        config = replace(config, data_dir=str(flickr8k_dir or flickr8k.download()))
    if config.data_dir == SHAPES.data_dir and not Path(config.data_dir).exists():
        print(f"drawing the sample into {config.data_dir}", flush=True)
        try:
            shapes.draw(config.data_dir)
        except OSError as error:
            raise UserError(f"{config.data_dir}: the sample cannot be drawn there ({error.strerror})") from None
    return config


def read_table(config):
    """(table, image_dir, skipped) as `load_captions` gives them, with --train-images only so many of the training images.

    Validation and test images that the run, or the model that it starts from, is trained on are in no split; these, and images
    that no list names, are in `skipped`. The table has a column more, content, of `loading.trained.with_contents`.
    Where the training data lie in shards, the table has the validation images only.
    Raises UserError where train or val has no image, or train fewer than that.
    """
    if is_stream(config.data_dir):
        table, image_dir, skipped = validation_table(config)
        notes = SplitNotes(f"shards for training, all validation images of {config.val_data}")
    else:
        paths, columns = (
            (config.data_dir, config.image_path, config.captions_path),
            (config.image_column, config.caption_column),
        )
        table, image_dir, skipped = load_captions(*paths, config.skip_bad, columns)
        notes = table.attrs["split"]
        table = draw_training_images(config, table, image_dir)
    table = with_contents(table, image_dir, config.num_workers, config.cache_dir)
    earlier = earlier_rows(config.model, config.run_dir, config.resume != "no")
    table, lines = without_trained(table, earlier, config.model)
    table.attrs["split"] = replace(notes, notes=notes.notes + lines)
    unused = table["image"][table["split"] == ""].unique()
    return table, image_dir, skipped + [f"{image_dir / name}: in no split, or trained on as well" for name in unused]


def draw_training_images(config, table, image_dir):
    """A table with as many training images as --train-images asks for. Raises UserError as `read_table` does."""
    for split, ending in (("train", "train"), ("val", "dev")):
        if split not in set(table["split"]):
            raise UserError(
                f"{image_dir}: none of its images is in the {split} split; list their names in a file that ends in "
                f"{ending}Images.txt, or use more images (split: {table.attrs['split'].rule})"
            )
    names = table["image"][table["split"] == "train"].unique()
    if config.train_images > len(names):
        raise UserError(f"--train-images {config.train_images}: there are only {len(names)} training images in {image_dir}")
    if config.train_images:
        chosen = np.random.default_rng(config.seed).choice(names, config.train_images, replace=False)
        table = table[(table["split"] != "train") | table["image"].isin(chosen)].reset_index(drop=True)
    return table


def load_splits(config, table, image_dir, model, bytes_to_come, stream=None):
    """Decodes the training and validation pictures of a table once. bytes_to_come: as for `decode_images`.

    stream: the `stream.Stream` that is the training split, if that lies in shards.
    Returns ({"train": Split, "val": Split}, messages about skipped pictures). Generated pictures of --extra-data come last.
    """
    notes = table.attrs.get("split")
    table, generated = table[table["split"].isin(["train", "val"])], frozenset()
    if config.extra_data:
        pairs = load_generated(config.extra_data, table)
        table, generated = pd.concat([table, pairs], ignore_index=True), frozenset(pairs["image"])
    names, _ = image_positions(table)
    paths, size = [image_dir / name for name in names], model.image_encoder.size
    arguments = paths, size, config.cache_dir, config.num_workers, config.skip_bad, bytes_to_come
    pictures, bad = decode_images(*arguments, resize=model.image_encoder.resize)
    position = {name: i for i, name in enumerate(names) if i not in bad}
    splits = {"train": stream} if stream else {}
    for split in ("val",) if stream else ("train", "val"):
        rows = table[(table["split"] == split) & table["image"].isin(position)]
        names, image_of_text = image_positions(rows)
        chosen = Subset(pictures, [position[name] for name in names])
        texts = token_ids(model.tokenizer, rows["caption"]) if len(rows) else []
        contents = tuple(rows.drop_duplicates("image")["content"]) if "content" in rows else ()
        splits[split] = Split(names, chosen, list(rows["caption"]), image_of_text, chosen, texts, contents=contents)
    if not stream:
        splits["train"].sources = images_sharing_caption(splits["train"], generated)
    if not splits["val"].names:
        raise UserError(f"{image_dir}: none of its validation images can be decoded")
    splits["val"].notes = notes
    return splits, list(bad.values())


def count_cut(tokenizer, split):
    """How many captions of a split are longer than the text encoder takes, and were cut."""
    longest = tokenizer.truncation["max_length"]
    full = [caption for caption, ids in zip(split.captions, split.texts) if len(ids) >= longest]
    return sum(bool(encoding.overflowing) for encoding in tokenizer.encode_batch(full))


def real_per_batch(config):
    """How many images of a batch are drawn from real ones. With --gan joint some of them are then replaced."""
    return config.batch_size - (generated_per_batch(config) if config.extra_data else 0)


def fit_batch(config, num_real, place):
    """The Config with a batch that so many real training images fill.

    A batch size that nobody passed (`config.AtMost`) is lowered to the largest that fits, which is printed. place: of the
    images. Raises UserError where none fits, or the one that was passed does not.
    """
    if fits_batch(config, num_real):
        return replace(config, batch_size=int(config.batch_size))
    lower = [size for size in range(config.batch_size - 1, 1, -1) if fits_batch(replace(config, batch_size=size), num_real)]
    parts = f" in micro-batches of {config.micro_batch_size}" if config.micro_batch_size else ""
    if not lower:
        raise UserError(f"{place}: {num_real} training images are too few for any batch{parts}; add pictures")
    if not isinstance(config.batch_size, AtMost):
        raise UserError(f"--batch-size {config.batch_size}: there are only {num_real} training images in {place}; lower it")
    print(f"batch size {lower[0]} instead of {config.batch_size}: the largest that {num_real:,} training images fill{parts}")
    return replace(config, batch_size=lower[0])


def fits_batch(config, num_real):
    """Whether so many real training images fill a batch, which divides into micro-batches and has its generated pictures."""
    size, count = config.batch_size, generated_per_batch(config)
    generates = bool(config.extra_data) or config.gan == "joint"
    divides = size % (config.micro_batch_size or 1) == 0 and size >= distributed.size()
    return real_per_batch(config) <= num_real and divides and (not generates or 2 <= count < size)


def images_sharing_caption(split, generated):
    """For each generated image of a split, the set of positions of the real images that have its caption."""
    captions = [set() for _ in split.names]
    images = defaultdict(set)
    for caption, image in zip(split.captions, split.image_of_text):
        captions[image].add(caption)
        images[caption].add(image)
    real = sum(name not in generated for name in split.names)
    return [{i for caption in texts for i in images[caption] if i < real} for texts in captions[real:]]


def train_loader(config, model, split, device):
    """A DataLoader of training batches. Its batch_sampler is a `PairSampler`, whose `steps` are the batches per epoch."""
    if isinstance(split, Stream):
        return StreamLoader(split, config, model)
    image_of_text = split.image_of_text
    sampler_class = PairSampler if config.unique_images else RepeatingSampler
    sampler = sampler_class(
        captions_of=np.split(np.argsort(image_of_text, kind="stable"), np.bincount(image_of_text).cumsum()[:-1]),
        batch_size=config.batch_size,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        sources=split.sources,
        generated=generated_per_batch(config) if split.sources else 0,
        ranks=(distributed.rank(), distributed.size()),
        captions_per_image=config.captions_per_image,
    )
    no_flip = None
    if config.hflip:
        unknown = not config.flip_left_right and may_be_sided(split.captions)
        no_flip = [unknown or not config.flip_left_right and mentions_left_or_right(caption) for caption in split.captions]
    size, keys = model.image_encoder.size, (split.image_key, split.text_key)
    dataset = CLIPDataset(split.images, split.texts, size, config.crop, no_flip, *keys)
    return batch_loader(dataset, sampler, model.tokenizer.padding["pad_id"], config.num_workers, device.type == "cuda")


def batch_loader(dataset, sampler, pad_id, num_workers=0, pin_memory=False):
    """A DataLoader of the sampler's batches, as `collate` makes them."""
    # Reading cached features is faster than sending them between processes; more workers than cores bring nothing.
    workers = min(num_workers, os.cpu_count() or 1) if dataset.image_key == "image" else 0
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate, pad_id=pad_id, image_key=dataset.image_key, text_key=dataset.text_key),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def some_pairs(split, chosen):
    """A Split of some of a split's images, chosen: (n,) positions, each with its centre crop and its first caption."""
    _, first = np.unique(split.image_of_text, return_index=True)
    texts = first[chosen]
    cached = split.image_key == "image_features" and split.images.shape[1] == 1  # several are random crops
    return Split(
        names=[split.names[i] for i in chosen],
        pictures=Subset(split.pictures, chosen),
        captions=[split.captions[i] for i in texts],
        image_of_text=np.arange(len(chosen)),
        images=split.images[chosen] if cached else Subset(split.pictures, chosen),
        texts=split.texts[texts] if split.text_key == "text_features" else [split.texts[i] for i in texts],
        image_key="image_features" if cached else "image",
        text_key=split.text_key,
    )


def split_features(model, split, device, dtype):
    """(I_f, T_f) of a split's centre crops and captions, (n, d_i) and (m, d_t), to the bit those that `evaluate.py` computes.

    What is not cached is computed in whole batches, which the processes share: in 16 bits a feature depends on how many there
    are at once. Compiled code, which rounds differently, is not used.
    """
    I_f, T_f = split.images, split.texts
    compiled = getattr(model.image_encoder, "_compiled_call_impl", None) is not None
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        if split.image_key == "image_features":
            I_f = I_f[:, 0]
        else:
            rows = shard_of_batches(len(split.names), IMAGE_BATCH)
            if split.image_key == "image_activations":
                I_f = activation_features(model, I_f[rows.start : rows.stop, 0], device, dtype)
            else:
                I_f = image_features(model, Subset(I_f, rows), device, dtype, len(rows))
            I_f = distributed.all_gather(I_f)
        if split.text_key == "text":
            order = sorted(range(len(T_f)), key=lambda i: len(T_f[i]))  # as in `text_features`
            texts = [T_f[order[row]] for row in shard_of_batches(len(T_f), TEXT_BATCH)]
            T_f = distributed.all_gather(text_features(model, texts, device, dtype))[np.argsort(order)]
    if not (I_f.isfinite().all() and T_f.isfinite().all()):
        raise UserError("an encoder's features are not finite; the last good checkpoint is kept; --resume with lower rates")
    return I_f, T_f


def shard_of_batches(n, batch_size):
    """This rank's rows of n, a range of whole batches."""
    batches = distributed.shard(-(-n // batch_size))
    return range(batches.start * batch_size, min(n, batches.stop * batch_size))
