"""Recall after the same minutes: this project beside open_clip's trainer, sentence-transformers' trainer and a plain loop.

    pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --data-dir DIR --weights-dir DIR

All start from the same files (EfficientNet-Lite0 and MiniLM, pretrained) and train on the same images, at 224 px, for the same
time on the same machine, one after another. Time runs from the start of the program. A peer's checkpoints are scored
afterwards, which does not count; this project's validation counts. The score is the rsum of the validation images: the sum of
the six recalls (R@1, R@5, R@10 in both directions), at most 600.
"""

import os
import random
import re
import subprocess
import sys
import time
from importlib.metadata import version
from json import dumps, loads
from pathlib import Path

import peer_open_clip
import peer_plain
import peer_sentence_transformers
from measure import ROOT, report, timed_lines

from captions import image_positions, load_captions
from evaluation.retrieval import recall
from utils.cli import run_cli
from utils.errors import UserError, run_command

import torch  # isort: skip

NUM_SCORED = 4  # checkpoints of a peer
OURS = ["--image-encoder", "tf_efficientnet_lite0", "--size", 224]
SHORT = ["--cached-crops", 4, "--epochs", 4, "--captions-per-image", 2, "--image-drop-path", 0, "--no-hflip"]
CONTENDERS = {  # name: flags; the lengths are chosen such that the rates have fallen when the six minutes are over
    "this project, `linear`": ["linear", *OURS],
    "this project, `best`, shortened": ["best", *OURS, *SHORT],
    "open_clip, image encoder locked": ["--lock-image", "--batch-size", 128, "--lr", 5e-4, "--epochs", 7],
    "open_clip, image encoder locked, smaller rate": ["--lock-image", "--batch-size", 128, "--lr", 2e-4, "--epochs", 7],
    "open_clip": ["--batch-size", 64, "--lr", 5e-4, "--epochs", 3, "--train-num-samples", 1792],
    "sentence-transformers, image encoder frozen": ["--freeze-image", "--batch-size", 128, "--steps", 84],
    "sentence-transformers": ["--batch-size", 64, "--steps", 80],
    "plain loop": [],
    "open_clip, image encoder locked, larger rate": ["--lock-image", "--batch-size", 128, "--lr", 1e-3, "--epochs", 7],
}


def wait(command, minutes, log):
    """Runs a command, for so many minutes at most. Its output goes into the file log. Returns when it started."""
    started = time.time()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=output, stderr=output, env=environment)
        try:
            process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return started


class Contest:
    """The files that all contenders start from, and the images and captions that score them."""

    def __init__(self, data_dir, weights_dir, output, minutes):
        self.data_dir, self.output, self.minutes = data_dir, output, minutes
        self.image_weights, self.text_encoder = (
            weights_dir / "tf_efficientnet_lite0.safetensors",
            weights_dir / "distilbert-minilm-l6",
        )
        table, self.image_dir, _ = load_captions(str(data_dir))
        training, validation = (table[table["split"] == split] for split in ("train", "val"))
        pairs = list(zip(training["image"], training["caption"]))
        random.Random(0).shuffle(pairs)
        names, self.image_of_text = image_positions(validation)
        self.paths, self.captions = [self.image_dir / name for name in names], list(validation["caption"])
        self.pairs, self.model, self.shards = output / "pairs.json", output / "open_clip", output / "shards"
        if not self.pairs.exists():
            peer_open_clip.write_model(self.model, self.image_weights, self.text_encoder, 224)
            peer_open_clip.write_shards(self.shards, pairs, self.image_dir)
            self.pairs.write_text(dumps([[str(self.image_dir / name), text] for name, text in pairs]), encoding="utf-8")

    def score(self, I_e, T_e):
        return recall((T_e.float() @ I_e.float().T).numpy(), self.image_of_text)

    def ours(self, flags, folder):
        """The curve of this project: [(seconds, rsum)]."""
        files = ["--data-dir", self.data_dir, "--image-weights", self.image_weights, "--text-encoder", self.text_encoder]
        folders = ["--run-dir", folder / "run", "--cache-dir", folder / "cache"]
        curve = []
        for seconds, line in timed_lines([*flags, *files, *folders]):
            match = re.match(r"epoch .* rsum ([0-9.]+)", line)
            if match and seconds <= 60 * self.minutes:
                curve.append((seconds, float(match[1])))
        return curve

    def peer(self, name, flags, folder):
        """The curve of a peer: [(seconds, rsum)]."""
        files = ["--pairs", self.pairs, "--image-weights", self.image_weights, "--text-encoder", self.text_encoder]
        arguments = (self.image_weights, self.text_encoder)
        if name.startswith("open_clip"):
            command = peer_open_clip.command(self.model, self.shards, folder, flags)
            embed, arguments, pattern = peer_open_clip.embed, (self.model,), "run/checkpoints/epoch_*.pt"
        else:
            module = peer_plain if name.startswith("plain") else peer_sentence_transformers
            command = [sys.executable, module.__file__, *files, "--output", folder, *flags]
            embed, pattern = module.embed, "*.pt"
        started = wait(command, self.minutes, folder / "log.txt")
        kept = [path for path in folder.glob(pattern) if path.stat().st_mtime - started <= 60 * self.minutes]
        kept.sort(key=lambda path: path.stat().st_mtime)
        chosen = kept[:: -max(1, round(len(kept) / NUM_SCORED))][::-1]  # the last one, and some before it
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = [embed(*arguments, path, self.paths, self.captions) for path in chosen]
        return [(path.stat().st_mtime - started, self.score(*pair)["rsum"]) for path, pair in zip(chosen, embeddings)]


def measure(
    data_dir: Path,
    weights_dir: Path,
    output: Path = Path("runs/peers"),
    minutes: float = 6,
    json: str = "",
):
    """Trains each contender for so many minutes, and scores what it has kept. A contender whose curve is in output is not
    trained again.

    Args:
        data_dir: folder of Flickr8k
        weights_dir: folder of tf_efficientnet_lite0.safetensors and distilbert-minilm-l6
        output: folder for the runs
        minutes: for each contender
        json: file for the results
    """
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    contest, curves = Contest(data_dir.resolve(), weights_dir.resolve(), output, minutes), {}
    for number, (name, flags) in enumerate(CONTENDERS.items()):
        folder = output / str(number)
        if not (folder / "curve.json").exists():
            folder.mkdir(exist_ok=True)
            curve = contest.ours(flags, folder) if name.startswith("this") else contest.peer(name, flags, folder)
            if not curve:
                raise UserError(f"{name}: nothing was kept within {minutes:g} minutes; {folder} has what it printed")
            (folder / "curve.json").write_text(dumps(curve), encoding="utf-8")
        curves[name] = loads((folder / "curve.json").read_text(encoding="utf-8"))
        print(f"{name}: " + ", ".join(f"{seconds:.0f} s: {rsum:.1f}" for seconds, rsum in curves[name]), flush=True)
    thirds = [minutes * part / 3 for part in (1, 2, 3)]
    columns = ["trainer", "settings", *(f"rsum within {third:g} minutes" for third in thirds)]
    rows = [
        [name, " ".join(map(str, CONTENDERS[name])), *(best_within(curve, 60 * third) for third in thirds)]
        for name, curve in curves.items()
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("open_clip_torch", "sentence-transformers", "transformers"))
    report(f"Recall after the same minutes; {versions}", columns, rows, json, (0,), curves)


def best_within(curve, limit):
    """The best rsum of a curve within so many seconds, as a cell of the table."""
    return max((f"{rsum:.1f}" for seconds, rsum in curve if seconds <= limit), key=float, default="-")


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/peers.py", sys.argv[1:]))
