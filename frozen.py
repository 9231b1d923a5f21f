"""What of the towers is held still: it is computed once, kept on disk, and takes the place of the towers' inputs."""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import is_openai
from dataset import CROPS, VIEW, CLIPDataset, as_batch, center_crop
from device import autocast
from embedding import IMAGE_BATCH, text_features
from storage import cached_tensor, file_facts, key_of, key_of_model
from utils.cache import note_use

FEWER = "lower --cached-views or --size"  # where the disk is too small
FP16_MAX = torch.finfo(torch.float16).max


def freeze_towers(config, model, splits, image_dir, device, dtype):
    """Freezes what the Config names, and replaces images and texts of {"train": Pairs, "val": Pairs} by what it gives."""
    image_encoder = model.image_encoder
    freeze_image, freeze_text = (config.freeze in (tower, "both") for tower in ("image", "text"))
    for split, pairs in splits.items():
        views = config.cached_views if split == "train" else 1
        if freeze_image or config.train_image_from:
            pairs.images = kept_views(config, image_encoder, pairs, image_dir, views, device, dtype)
        if freeze_text:
            pairs.texts = kept_text_features(config, model, pairs.texts, device, dtype)
    new_heads = not is_openai(config) or config.image_weights == "random"  # trained ones expect features as they are
    if freeze_image:
        image_encoder.requires_grad_(False)
        if new_heads:
            model.image_projection.standardise(splits["train"].images.flatten(0, 1))
    if freeze_text:
        model.text_encoder.requires_grad_(False)
        if new_heads:
            model.text_projection.standardise(splits["train"].texts)


def activation_dtype(config, dtype):
    """The dtype that activations are kept in: that of the matrix products, but fp16 where --precision auto chose fp32.

    So they take as little disk where bf16 is not native as elsewhere.
    """
    return torch.float16 if dtype == torch.float32 and config.precision == "auto" else dtype


def bytes_of_activations(config, encoder, train, val, dtype):
    """How much disk the activations of train and val images take: 0 where the whole image tower trains, or none of it."""
    if not encoder.stage:
        return 0
    return (train * config.cached_views + val) * encoder.activation_shape.numel() * activation_dtype(config, dtype).itemsize


def kept_views(config, encoder, pairs, image_dir, views, device, dtype):
    """What the tower, or its trunk if it has one, makes of `views` random crops of each image; one is the middle square.

    With --mirror every second crop is a mirror image.

    Returns (n, views, d_i) features in fp32, or (n, views, ...) activations in `activation_dtype`.
    """
    n, names, folder = len(pairs.names), [image_dir / name for name in pairs.names], Path(config.cache_dir)
    if encoder.stage:
        run, kind, shape, kept = encoder.trunk, "activations", tuple(encoder.activation_shape), activation_dtype(config, dtype)
    else:
        run, kind, shape, kept = encoder, "image-features", (encoder.width,), torch.float32
    cut = (CROPS, views, config.crop, config.mirror, config.seed) if views > 1 else None
    key = key_of(key_of_model(encoder), encoder.stage, VIEW, cut, dtype, kept, file_facts(names))
    gigabytes = n * views * np.prod(shape) * kept.itemsize / 1e9
    cutter = CLIPDataset(pairs.pictures, pairs.texts, encoder.size, config.crop)
    seeds = np.random.default_rng(config.seed).integers(2**31, size=(n, views)).tolist()

    def crops():
        for i, picture in enumerate(pairs.pictures):
            if views == 1:
                yield center_crop(picture, encoder.size)
            else:
                yield from (cutter.random_crop(picture, seed, config.mirror and k % 2) for k, seed in enumerate(seeds[i]))

    @torch.no_grad()
    def compute():
        depth = f"as far as {encoder.stage}" if encoder.stage else "through the image tower"
        print(f"running {n * views:,} crops {depth}, kept in {folder} ({gigabytes:.2f} GB)")
        encoder.eval()
        left = crops()
        with tqdm(total=n * views, desc="crops", leave=False, disable=None, unit="img") as progress:
            while batch := list(islice(left, IMAGE_BATCH)):
                with autocast(device, dtype):
                    outputs = run(as_batch(batch).to(device))
                if kept == torch.float16:  # what is larger would become infinite
                    outputs = outputs.clamp(-FP16_MAX, FP16_MAX)
                yield outputs.to(kept).cpu()
                progress.update(len(batch))

    path = folder / f"{kind}-{key}.npy"
    note_use(config.run_dir, path)
    return cached_tensor(path, (n * views, *shape), kept, compute, FEWER).unflatten(0, (n, views))


def kept_text_features(config, model, texts, device, dtype):
    """The features of m lists of token ids, (m, d_t), in fp32."""
    path = Path(config.cache_dir) / f"text-features-{key_of(key_of_model(model.text_encoder), dtype, texts)}.npy"
    note_use(config.run_dir, path)
    shape = len(texts), model.text_encoder.width
    return cached_tensor(path, shape, torch.float32, lambda: [text_features(model, texts, device, dtype)], FEWER)
