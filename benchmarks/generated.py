"""Generated pictures on the drawn sample: do they show what their captions say, and does training with them help?

    python benchmarks/generated.py
    python benchmarks/generated.py --images 200 --seeds 0

For each number of training images, a text tower is trained on them (`main.py shapes`), a generator on its embeddings
(`GAN.py`), and then CLIP with and without generated pairs, for the same number of steps. All see the same validation and test
images. A classifier of colour and shape, trained on real pictures of other scenes, says how many of the looks that captions
name it finds in the pictures made from them.
"""

import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from measure import evaluate, report, spread, timed_lines
from torch import nn

import GAN
from config import parse_flags
from dataset import read_image
from Datasets import shapes
from device import autocast, speed_up_cpu
from generator import NOISE, SIDE, draw_pictures
from modules import ImageEncoder
from storage import run_command

STEPS = {200: 150, 500: 300, 6000: 500}  # of CLIP with so many training images; other numbers take the largest
GAN_EPOCHS = {200: 200, 500: 100, 6000: 25}  # of the generator; other numbers take the least
BATCH, FRACTION = {200: 64, 500: 64}, 0.25  # BATCH: of other numbers, the preset's
GENERATED = 5  # pictures a training image, at most MOST_GENERATED
MOST_GENERATED = 5000
LOOKS = [(color, shape) for color in shapes.COLORS for shape in shapes.SHAPES]
JUDGE_SCENES, JUDGE_STEPS, JUDGE_BATCH = 12_000, 2500, 64  # the judge finds next to nothing in its first 500 steps


def take_images(sample, folder, count):
    """A copy of the sample whose training list has `count` images."""
    shutil.copytree(sample, folder)
    path = folder / "shapes.trainImages.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


# ---- a judge of colours and shapes -------------------------------------------------------------------------------


def named_looks(caption):
    """Positions in LOOKS of the pairs of colour and shape that a caption names."""
    colors = {word: color for color, (words, _) in shapes.COLORS.items() for word in words}
    nouns = {word: shape for shape, words in shapes.SHAPES.items() for word in words}
    found = re.findall(rf"\b({'|'.join(colors)}) ({'|'.join(nouns)})\b", caption)
    return [LOOKS.index((colors[color], nouns[noun])) for color, noun in found]


def train_judge():
    """A classifier of (n, 3, SIDE, SIDE) pixels into (n, 48) logits: is a thing of this colour and shape in the picture?"""
    torch.manual_seed(0)
    rng = random.Random(1_000)
    scenes = [shapes.random_scene(rng) for _ in range(JUDGE_SCENES)]
    pictures = [cv2.resize(shapes.paint(scene, 96, rng), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for scene in scenes]
    image = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    label = torch.zeros(len(scenes), len(LOOKS))
    for row, scene in enumerate(scenes):
        label[row, [LOOKS.index((thing.color, thing.shape)) for thing in scene.things]] = 1
    tower = ImageEncoder("test_resnet", "random", SIDE)
    judge = nn.Sequential(tower, nn.Linear(tower.width, len(LOOKS)))
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, JUDGE_STEPS)
    for _ in range(JUDGE_STEPS):
        rows = torch.randint(len(scenes), (JUDGE_BATCH,))
        with autocast(image.device, torch.bfloat16):
            logits = judge(image[rows])
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def confirmed(judge, pictures, captions):
    """The share, in percent, of the looks named in captions that the judge finds in their pictures, (n, SIDE, SIDE, 3)."""
    image = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    found = torch.cat([judge(rows) for rows in image.split(250)]) > 0
    return 100 * float(
        np.mean([found[row, look].item() for row, caption in enumerate(captions) for look in named_looks(caption)])
    )


def judge_split(judge, gan_dir, split):
    """Shares of looks found for the captions of a split that name one of them, and for those that name two.

    Returns [share in generated pictures, in the real ones, and the same for two], in percent.
    """
    saved = GAN.load_gan(gan_dir)["config"]
    table, image_dir, _, embed, _, device, _ = GAN.read_captions_and_tower(saved, "shapes")
    shares = []
    for count in (1, 2):
        rows = table[(table["split"] == split) & (table["caption"].map(named_looks).map(len) == count)]
        embeddings = embed(rows["caption"])
        noise = torch.randn(len(rows), NOISE, generator=torch.Generator().manual_seed(0))
        generator = GAN.load_generator(gan_dir, embeddings.shape[1]).to(device)
        made = draw_pictures(generator, noise.to(device), embeddings.to(device))
        real = [read_image(image_dir / name, SIDE) for name in rows["image"]]
        shares += [confirmed(judge, made, rows["caption"]), confirmed(judge, real, rows["caption"])]
    return shares


# ---- recall with and without -------------------------------------------------------------------------------------


def measure(images: tuple[int, ...] = (200, 500, 6000), seeds: tuple[int, ...] = (0, 1, 2), json: str = ""):
    """Measures how often generated pictures show what was asked for, and recall with and without them.

    Args:
        images: numbers of training images
        seeds: of the runs of CLIP; generators have seed 0
        json: file for the recalls
    """
    speed_up_cpu()
    judge, judged, rows = train_judge(), [], []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        shapes.draw(folder / "sample")
        for count in images:
            data, gan_dir, extra = folder / f"data-{count}", folder / f"gan-{count}", folder / f"pictures-{count}"
            take_images(folder / "sample", data, count)
            batch, steps = BATCH.get(count, 128), STEPS.get(count, max(STEPS.values()))
            real = batch - round(FRACTION * batch)
            common = ["shapes", "--data-dir", data, "--cache-dir", folder / "cache"]
            generated = ["--extra-data", extra, "--extra-fraction", FRACTION]
            joint = ["--gan", "joint", "--extra-fraction", FRACTION]
            ways = {"real only": ([], batch), "a quarter generated": (generated, real), "joint": (joint, batch)}
            scores = {way: [] for way in ways}
            for seed in seeds:
                for way, (flags, fresh) in ways.items():
                    run = folder / f"run-{count}-{way}-{seed}"
                    flags = [*flags, "--epochs", round(steps / (count // fresh)), "--batch-size", batch, "--seed", seed]
                    for _ in timed_lines([*common, *flags, "--run-dir", run]):
                        pass
                    scores[way].append(evaluate("retrieval", "--run", run, "--split", "test"))
                    rsum, recall = scores[way][-1]["rsum"], scores[way][-1]["text_to_image"]["R@1"]
                    print(f"{count} images, seed {seed}, {way}: test rsum {rsum:.1f}, T2I R@1 {recall:.1f}", flush=True)
                    if way == "real only" and seed == seeds[0]:
                        gan = ["shapes", "--run", run, "--run-dir", gan_dir, "--cache-dir", folder / "cache"]
                        epochs = GAN_EPOCHS.get(count, min(GAN_EPOCHS.values()))
                        for _ in timed_lines([*gan, "--epochs", epochs], "GAN.py"):
                            pass
                        number = min(GENERATED * count, MOST_GENERATED)
                        for _ in timed_lines(
                            ["shapes", "--run-dir", gan_dir, "--generate", number, "--output", extra], "GAN.py"
                        ):
                            pass
                        for split in ("val", "test"):
                            shares = [f"{share:.1f}" for share in judge_split(judge, gan_dir, split)]
                            judged.append([count, {"val": "validation", "test": "test"}[split], *shares])
                            print(f"looks found for {count} images, captions of {split}: {' '.join(shares)}", flush=True)
            for way, runs in scores.items():
                recalls = [[run[side]["R@1"] for run in runs] for side in ("text_to_image", "image_to_text")]
                rows.append([count, steps, way, *map(spread, recalls), spread([run["rsum"] for run in runs])])
    columns = ["training images", "captions", "one look: generated", "real", "two looks: generated", "real"]
    report("Looks that captions name, found by a classifier, percent", columns, judged, "")
    columns = ["training images", "steps", "trained on", "test T2I R@1", "test I2T R@1", "test rsum"]
    report(f"Recall with and without generated pairs, seeds {', '.join(map(str, seeds))}", columns, rows, json)


if __name__ == "__main__":
    run_command(lambda: parse_flags(measure, "generated.py", None, sys.argv[1:]))
