"""What of the towers is held still: it is computed once, kept on disk, and takes the place of the towers' inputs."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import is_openai
from dataset import VIEW, CLIPDataset, as_batch, center_crop
from device import autocast
from embedding import IMAGE_BATCH, image_features, text_features
from storage import cached_tensor, file_facts, key_of, key_of_weights


def freeze_towers(config, model, splits, image_dir, device, dtype):
    """Freezes what the Config names, and replaces images and texts of {"train": Pairs, "val": Pairs} by what it gives."""
    image_encoder, folder = model.image_encoder, Path(config.cache_dir)
    for split, pairs in splits.items():
        if config.freeze in ("image", "both"):
            pairs.images = kept_image_features(model, pairs, image_dir, folder, device, dtype)
        elif config.train_image_from:
            views = config.cached_views if split == "train" else 1
            pairs.images = kept_activations(
                image_encoder, pairs, image_dir, folder, views, config.crop, config.seed, device, dtype
            )
        if config.freeze in ("text", "both"):
            pairs.texts = kept_text_features(model, pairs.texts, folder, device, dtype)
    new_heads = not is_openai(config) or config.image_weights == "random"  # trained ones expect features as they are
    if config.freeze in ("image", "both"):
        image_encoder.requires_grad_(False)
        if new_heads:
            model.image_projection.standardise(splits["train"].images)
    if config.freeze in ("text", "both"):
        model.text_encoder.requires_grad_(False)
        if new_heads:
            model.text_projection.standardise(splits["train"].texts)


def kept_image_features(model, pairs, image_dir, folder, device, dtype):
    """The features of a split's images, (n, d_i), in fp32."""
    encoder, n = model.image_encoder, len(pairs.names)
    key = key_of(key_of_weights(encoder), VIEW, encoder.size, dtype, file_facts([image_dir / name for name in pairs.names]))
    compute = partial(image_features, model, pairs.pictures, device, dtype, n)
    return cached_tensor(folder / f"image-features-{key}.npy", (n, encoder.width), torch.float32, lambda: [compute()])


def kept_text_features(model, texts, folder, device, dtype):
    """The features of m lists of token ids, (m, d_t), in fp32."""
    encoder = model.text_encoder
    key = key_of(key_of_weights(encoder), encoder.pooling, dtype, texts)
    compute = partial(text_features, model, texts, device, dtype)
    return cached_tensor(folder / f"text-features-{key}.npy", (len(texts), encoder.width), torch.float32, lambda: [compute()])


def kept_activations(encoder, pairs, image_dir, folder, views, crop, seed, device, dtype):
    """What the trunk makes of `views` random crops of each image, (n, views, ...) in dtype; one view is the middle square."""
    n, shape = len(pairs.names), tuple(encoder.activation_shape)
    files = file_facts([image_dir / name for name in pairs.names])
    cut = (views, crop, seed) if views > 1 else None
    key = key_of(key_of_weights(encoder), encoder.stage, VIEW, cut, encoder.size, dtype, files)
    path = folder / f"activations-{key}.npy"
    gigabytes = n * views * np.prod(shape) * dtype.itemsize / 1e9
    cutter = CLIPDataset(pairs.pictures, pairs.texts, encoder.size, crop)
    seeds = np.random.default_rng(seed).integers(2**31, size=(n, views))

    def crops():
        for i, picture in enumerate(pairs.pictures):
            if views == 1:
                yield center_crop(picture, encoder.size)
            else:
                yield from (cutter.random_crop(picture, int(s)) for s in seeds[i])

    @torch.no_grad()
    def compute():
        print(f"running {n * views:,} crops as far as {encoder.stage}, kept in {folder} ({gigabytes:.2f} GB)")
        encoder.eval()
        left = crops()
        with tqdm(total=n * views, desc="trunk", leave=False, disable=None, unit="img") as progress:
            while batch := list(islice(left, IMAGE_BATCH)):
                with autocast(device, dtype):
                    activations = encoder.trunk(as_batch(batch).to(device))
                yield activations.to(dtype).cpu()
                progress.update(len(batch))

    return cached_tensor(path, (n * views, *shape), dtype, compute).unflatten(0, (n, views))
