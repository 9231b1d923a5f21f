"""Images per second of an image encoder in bf16, with timm's convolutions and with this project's. BatchNorm is in eval mode.

python benchmarks/image_encoder.py [--image-encoder tf_efficientnet_lite0]
"""

import copy
import sys

from measure import alternate, report, spread

from modules import ImageEncoder
from utils.cli import run_cli
from utils.device import autocast, keep_freed_memory, pick_device, pick_dtype
from utils.errors import run_command

import torch  # isort: skip


def measure(
    image_encoder: str = "tf_efficientnet_lite0", batch_size: int = 64, rounds: int = 5, device: str = "auto", json: str = ""
):
    """Times forward passes, and forward and backward passes, of both variants in turns.

    Args:
        image_encoder: timm name
        batch_size: images per pass
        rounds: timed rounds
        device: auto, cpu, cuda
        json: file for the results
    """
    keep_freed_memory()
    device = pick_device(device)
    dtype = pick_dtype("auto", device)
    ours = ImageEncoder(image_encoder).eval().to(device, memory_format=torch.channels_last)
    timms = copy.deepcopy(ours)
    for module in timms.backbone.modules():
        module.__dict__.pop("forward", None)  # removes what encoders.convolution.speed_up has set
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
        variants = {"timm's": lambda: passes(timms), "ours": lambda: passes(ours)}  # noqa: B023 (called in this iteration)
        for name, seconds in alternate(variants, rounds).items():
            rows.append([passes.__name__.replace("_", " "), name, spread([batch_size / s for s in seconds])])
    report(f"{image_encoder}, batch {batch_size}, {dtype}", ["passes", "convolutions", "images a second"], rows, json)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/image_encoder.py", sys.argv[1:]))
