"""What of the towers is held still: it is computed once, kept on disk, and takes the place of the towers' inputs."""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import is_openai
from dataset import VIEW, CLIPDataset, as_batch, center_crop
from device import autocast
from embedding import IMAGE_BATCH, text_features
from storage import cached_tensor, file_facts, key_of, key_of_weights


def freeze_towers(config, model, splits, image_dir, device, dtype):
    """Freezes what the Config names, and replaces images and texts of {"train": Pairs, "val": Pairs} by what it gives."""
    image_encoder, folder = model.image_encoder, Path(config.cache_dir)
    freeze_image, freeze_text = (config.freeze in (tower, "both") for tower in ("image", "text"))
    for split, pairs in splits.items():
        views = config.cached_views if split == "train" else 1
        if freeze_image or config.train_image_from:
            pairs.images = kept_views(config, image_encoder, pairs, image_dir, views, device, dtype)
        if freeze_text:
            pairs.texts = kept_text_features(model, pairs.texts, folder, device, dtype)
    new_heads = not is_openai(config) or config.image_weights == "random"  # trained ones expect features as they are
    if freeze_image:
        image_encoder.requires_grad_(False)
        if new_heads:
            model.image_projection.standardise(splits["train"].images.flatten(0, 1))
    if freeze_text:
        model.text_encoder.requires_grad_(False)
        if new_heads:
            model.text_projection.standardise(splits["train"].texts)


def kept_views(config, encoder, pairs, image_dir, views, device, dtype):
    """What the tower, or its trunk if it has one, makes of `views` random crops of each image; one is the middle square.

    With --mirror every second crop is a mirror image.

    Returns (n, views, d_i) features in fp32, or (n, views, ...) activations in dtype.
    """
    n, names, folder = len(pairs.names), [image_dir / name for name in pairs.names], Path(config.cache_dir)
    if encoder.stage:
        run, kind, shape, kept = encoder.trunk, "activations", tuple(encoder.activation_shape), dtype
    else:
        run, kind, shape, kept = encoder, "image-features", (encoder.width,), torch.float32
    cut = (views, config.crop, config.mirror, config.seed) if views > 1 else None
    ends = encoder.stage or encoder.feature_stages
    key = key_of(key_of_weights(encoder), ends, VIEW, cut, encoder.size, dtype, file_facts(names))
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
                yield outputs.to(kept).cpu()
                progress.update(len(batch))

    return cached_tensor(folder / f"{kind}-{key}.npy", (n * views, *shape), kept, compute).unflatten(0, (n, views))


def kept_text_features(model, texts, folder, device, dtype):
    """The features of m lists of token ids, (m, d_t), in fp32."""
    encoder = model.text_encoder
    key = key_of(key_of_weights(encoder), encoder.pooling, encoder.layers, dtype, texts)
    path, shape = folder / f"text-features-{key}.npy", (len(texts), encoder.width)
    return cached_tensor(path, shape, torch.float32, lambda: [text_features(model, texts, device, dtype)])
