"""Images a second of an image tower in bf16, as timm has it and with this project's convolutions, statistics held still.

python benchmarks/image_tower.py [--image-encoder tf_efficientnet_lite0]
"""

import copy
import sys

from measure import alternate, report, spread

from config import parse_flags
from device import autocast, keep_freed_memory, pick_device, pick_dtype
from modules import ImageEncoder
from storage import run_command

import torch  # isort: skip


def measure(
    image_encoder: str = "tf_efficientnet_lite0", batch_size: int = 64, rounds: int = 5, device: str = "auto", json: str = ""
):
    """Times forward passes, and forward and backward passes, in turns.

    Args:
        image_encoder: timm name
        batch_size: images a pass
        rounds: rounds that are timed
        device: auto, cpu, cuda
        json: file for the figures
    """
    keep_freed_memory()
    device = pick_device(device)
    dtype = pick_dtype("auto", device)
    ours = ImageEncoder(image_encoder).eval().to(device, memory_format=torch.channels_last)
    timms = copy.deepcopy(ours)
    for module in timms.tower.modules():
        module.__dict__.pop("forward", None)  # what convolution.speed_up put there
    image = torch.randint(256, (batch_size, 3, ours.size, ours.size), dtype=torch.uint8, device=device)
    image = image.to(memory_format=torch.channels_last)

    def forward(encoder):
        with torch.no_grad(), autocast(device, dtype):
            encoder(image).sum().item()

    def forward_and_backward(encoder):
        with autocast(device, dtype):
            loss = encoder(image).float().square().mean()
        encoder.zero_grad()
        loss.backward()
        loss.item()

    rows = []
    for passes in (forward, forward_and_backward):
        sides = {"timm's own": lambda: passes(timms), "ours": lambda: passes(ours)}  # noqa: B023 (called in this round)
        for side, seconds in alternate(sides, rounds).items():
            rows.append([passes.__name__.replace("_", " "), side, spread([batch_size / s for s in seconds])])
    report(f"{image_encoder}, batch {batch_size}, {dtype}", ["passes", "tower", "images a second"], rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "image_tower.py", None, sys.argv[1:]))
