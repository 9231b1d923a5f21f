"""Cache the outputs of frozen encoders on disk; training reads them instead of pictures and captions."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import CROPS, CLIPDataset
from embedding import IMAGE_BATCH, image_features, text_features, token_ids
from encoders.stages import run_trunk
from training.cca import start_from_cca
from training.stream import Stream, StreamLoader
from utils.cache import cache_key, cached_tensor, file_stats, model_key, note_use
from utils.device import autocast
from utils.images import VIEW, as_batch, center_crop

SPACE_HINT = "lower --cached-crops or --size"  # where the disk is too small
NUM_SAMPLED = 1000  # pictures of a stream whose features stand for those of all
FP16_MAX = torch.finfo(torch.float16).max


def freeze_encoders(config, model, splits, image_dir, device, dtype):
    """Freezes what the Config names, and replaces images and texts of {"train": Split, "val": Split} by cached outputs."""
    image_encoder, train = model.image_encoder, splits["train"]
    freeze_image, freeze_text = config.freezes("image"), config.freezes("text")
    for name, split in splits.items():
        if isinstance(split, Stream):  # is encoded again in each epoch
            continue
        if freeze_image or config.image_unfreeze_from:
            split.images = cache_image_features(config, image_encoder, split, image_dir, name == "train", device, dtype)
            split.image_key = "image_features" if freeze_image else "image_activations"
        if freeze_text:
            split.texts, split.text_key = cache_text_features(config, model, split.texts, device, dtype), "text_features"
    for encoder, frozen in ((image_encoder, freeze_image), (model.text_encoder, freeze_text)):
        if frozen:
            encoder.requires_grad_(False)
    if config.model or not (freeze_image or freeze_text):  # pretrained heads expect unscaled features
        return
    if isinstance(train, Stream):
        I_f, T_f = sample_features(config, model, train, device, dtype)
    else:
        I_f, T_f = train.images, train.texts
    if freeze_image:
        model.image_projection.standardize(I_f.flatten(0, -2))
    if freeze_text:
        model.text_projection.standardize(T_f)
    if freeze_image and freeze_text and config.head_init == "cca":
        start_from_cca(model, I_f.mean(dim=1), T_f, torch.as_tensor(train.image_of_text))  # an image: the mean of its crops


def sample_features(config, model, stream, device, dtype):
    """The features of the first pictures and captions of a `Stream`, (n, d_i) and (n, d_t), on which heads are standardised."""
    pictures, captions, _ = zip(*StreamLoader(stream, config, model).some(NUM_SAMPLED))
    I_f = image_features(model, pictures, device, dtype, len(pictures))
    return I_f, text_features(model, token_ids(model.tokenizer, [drawn[0] for drawn in captions]), device, dtype)


def activation_dtype(config, dtype):
    """The dtype of cached training activations: that of the matrix products, but fp16 where --precision auto chose fp32.

    They then take as little disk space without native bf16 as with it. Those of validation pictures are in fp32: no bit of a
    figure depends on the cache.
    """
    return torch.float16 if dtype == torch.float32 and config.precision == "auto" else dtype


def activation_bytes(config, encoder, table, dtype):
    """Bytes on disk for the activations of a table's images; 0 if the image encoder is trained fully or not at all."""
    if not encoder.stage:
        return 0
    train, val = (table["image"][table["split"] == split].nunique() for split in ("train", "val"))
    bytes_per_value = train * config.cached_crops * activation_dtype(config, dtype).itemsize + val * torch.float32.itemsize
    return bytes_per_value * encoder.activation_shape.numel()


def cache_image_features(config, encoder, split, image_dir, training, device, dtype):
    """The outputs of the image encoder, or of its frozen trunk, for k crops of each image.

    training: of training images there are --cached-crops random crops; with --hflip every second is flipped horizontally. Of
    others, and where it is 1, there is the centre crop.
    Returns (n, k, d_i) features in fp32, or (n, k, ...) activations, in `activation_dtype` or fp32.
    """
    n, names, folder = len(split.names), [image_dir / name for name in split.names], Path(config.cache_dir)
    num_crops, cache_dtype = config.cached_crops if training else 1, torch.float32
    if encoder.stage:
        run, shape = partial(run_trunk, encoder), tuple(encoder.activation_shape)
        kind, cache_dtype = ("activations", activation_dtype(config, dtype)) if training else ("exact-activations", cache_dtype)
    else:
        run, kind, shape = encoder, "image-features", (encoder.width,)
    crop_settings = (CROPS, num_crops, config.crop, config.hflip, config.seed) if num_crops > 1 else None
    key = cache_key(model_key(encoder), encoder.stage, VIEW, crop_settings, dtype, cache_dtype, file_stats(names))
    gigabytes = n * num_crops * np.prod(shape) * cache_dtype.itemsize / 1e9
    cropper = CLIPDataset(split.pictures, split.texts, encoder.size, config.crop)
    seeds = np.random.default_rng(config.seed).integers(2**31, size=(n, num_crops)).tolist()

    def crops():
        for i, picture in enumerate(split.pictures):
            if num_crops == 1:
                yield center_crop(picture, encoder.size)
            else:
                yield from (cropper.random_crop(picture, seed, config.hflip and k % 2) for k, seed in enumerate(seeds[i]))

    @torch.no_grad()
    def compute():
        part = f"the image encoder up to {encoder.stage}" if encoder.stage else "the image encoder"
        print(f"running {part} on {n * num_crops:,} crops, cached in {folder} ({gigabytes:.2f} GB)")
        encoder.eval()
        remaining = crops()
        with tqdm(total=n * num_crops, desc="crops", leave=False, disable=None, unit="img") as progress:
            while batch := list(islice(remaining, IMAGE_BATCH)):
                with autocast(device, dtype):
                    outputs = run(as_batch(batch).to(device))
                if cache_dtype == torch.float16:  # larger values would become infinite
                    outputs = outputs.clamp(-FP16_MAX, FP16_MAX)
                yield outputs.to(cache_dtype).cpu()
                progress.update(len(batch))

    path = folder / f"{kind}-{key}.npy"
    note_use(config.run_dir, path)
    return cached_tensor(path, (n * num_crops, *shape), cache_dtype, compute, SPACE_HINT).unflatten(0, (n, num_crops))


def cache_text_features(config, model, texts, device, dtype):
    """The text encoder's features of m lists of token ids, (m, d_t), in fp32."""
    path = Path(config.cache_dir) / f"text-features-{cache_key(model_key(model.text_encoder), dtype, texts)}.npy"
    note_use(config.run_dir, path)
    shape = len(texts), model.text_encoder.width
    return cached_tensor(path, shape, torch.float32, lambda: [text_features(model, texts, device, dtype)], SPACE_HINT)
