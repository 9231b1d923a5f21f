"""Images per second of the input pipeline alone: from cached decoded pictures to normalised batches of random crops.

    python benchmarks/input_pipeline.py [--data-dir DIR]

- ours: albumentations (OpenCV) crops and resizes each picture as it is read; the batch is normalised on the device.
- crops on the batch: the centre crops are stacked, and torch's grid_sample crops and resizes the whole batch.
"""

import sys
import tempfile
from pathlib import Path

import torch.nn.functional as F
from measure import alternate, report, spread

from captions import image_positions, load_captions
from config import PRESETS
from dataset import CLIPDataset
from Datasets import flickr8k, shapes
from training.data import batch_loader
from utils.cli import run_cli
from utils.device import keep_freed_memory, pick_device
from utils.errors import run_command
from utils.images import as_batch, center_crop, decode_images

import torch  # isort: skip

MEAN, STD = 127.5, 64.0  # of the pixels; the values do not change the time


def crop_batch(image, crop):
    """(n, 3, size, size) pixels -> a random square crop of each image, resized to (size, size)."""
    n = len(image)
    side = torch.empty(n, device=image.device).uniform_(crop, 1)
    theta = torch.zeros(n, 2, 3, device=image.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = (torch.rand(n, 2, device=image.device) * 2 - 1) * (1 - side)[:, None]
    grid = F.affine_grid(theta, image.shape, align_corners=False)
    return F.grid_sample(image.float(), grid, padding_mode="border", align_corners=False)


def measure(
    data_dir: str = "",
    images: int = 2048,
    batch_size: int = 64,
    size: int = 224,
    num_workers: int = 0,
    rounds: int = 5,
    device: str = "auto",
    json: str = "",
):
    """Times the input pipeline with crops of single pictures and of whole batches.

    Args:
        data_dir: pictures and captions; empty: Flickr8k if it is found, else the drawn sample
        images: pictures per round
        batch_size: pictures per batch
        size: height and width of the crops in pixels
        num_workers: the DataLoader's worker processes
        rounds: timed rounds
        device: auto, cpu, cuda
        json: file for the results
    """
    keep_freed_memory()
    device = pick_device(device)
    data_dir = data_dir or flickr8k.find() or PRESETS["shapes"].data_dir
    if not Path(data_dir).exists():
        shapes.draw(data_dir)
    table, image_dir, _ = load_captions(str(data_dir))
    names, _ = image_positions(table)
    names = names[:images]
    mean, std = (torch.full((1, 3, 1, 1), value, device=device) for value in (MEAN, STD))
    with tempfile.TemporaryDirectory() as cache_dir:
        pictures, _ = decode_images([image_dir / name for name in names], size, cache_dir)
        dataset = CLIPDataset(pictures, [[1]], size, crop=0.85)
        order = torch.randperm(len(names)).tolist()
        indices = [[(i, [0], i) for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
        loader = batch_loader(dataset, indices, 0, num_workers, device.type == "cuda")

        def ours():
            for batch in loader:
                image = (batch["image"].to(device, non_blocking=True) - mean) / std
            image.sum().item()

        def on_the_batch():
            for batch in indices:
                image = as_batch([center_crop(pictures[i], size) for i, _, _ in batch]).to(device)
                image = (crop_batch(image, 0.85) - mean) / std
            image.sum().item()

        seconds = alternate({"ours": ours, "crops on the batch": on_the_batch}, rounds)
    rows = [[name, spread([len(names) / s for s in values], 0)] for name, values in seconds.items()]
    report(
        f"Input pipeline, {size} px, batches of {batch_size}, {num_workers} workers", ["side", "images a second"], rows, json
    )


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/input_pipeline.py", sys.argv[1:]))
