"""Seconds from the start of the program, with JPEGs on disk, to the end of epochs 1 and 2, with a cold and a warm cache.

    python benchmarks/epoch.py --data-dir DIR --image-weights FILE --text-encoder FOLDER [--trained heads|stages|all]

The image encoder is EfficientNet-Lite0. Cold: nothing is cached. Warm: the same run a second time.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Literal

from measure import report, spread, timed_lines

from utils.cli import run_cli
from utils.errors import run_command

TRAINED = {
    "heads": ["--freeze", "both"],
    "stages": ["--no-heads-first", "--image-unfreeze-from", "blocks.5", "--batch-size", "256"],
    "all": ["--no-heads-first", "--batch-size", "64"],
}


def measure(
    data_dir: str,
    image_weights: str,
    text_encoder: str,
    trained: Literal["heads", "stages", "all"] = "heads",
    rounds: int = 5,
    json: str = "",
):
    """Times the first two epochs of a run, with a cold and a warm cache in turns.

    Args:
        data_dir: folder of Flickr8k
        image_weights: file of EfficientNet-Lite0's weights
        text_encoder: folder of a text encoder
        trained: heads: only the projection heads; stages: also the image encoder's last two stages and the text encoder; all
        rounds: timed rounds, each a cold and a warm run
        json: file for the results
    """
    flags = ["flickr8k", "--data-dir", Path(data_dir).resolve(), "--image-encoder", "tf_efficientnet_lite0", "--epochs", 2]
    flags += ["--image-weights", Path(image_weights).resolve(), "--text-encoder", Path(text_encoder).resolve()]
    flags += TRAINED[trained]
    seconds = {(cache, epoch): [] for cache in ("cold", "warm") for epoch in (1, 2)}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("cold", "warm"):
                for elapsed, line in timed_lines([*flags, "--run-dir", f"{folder}/run", "--cache-dir", f"{folder}/cache"]):
                    if match := re.match(r"epoch +(\d)/2", line):
                        seconds[cache, int(match[1])].append(elapsed)
    rows = [[cache, epoch, spread(values)] for (cache, epoch), values in seconds.items()]
    report(f"From JPEGs to the end of an epoch, trained: {trained}", ["cache", "epoch", "seconds"], rows, json)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/epoch.py", sys.argv[1:]))
