"""Generated pictures on the drawn sample: do they show what their captions say, and does training with them help?

    python benchmarks/generated.py
    python benchmarks/generated.py --images 200 --seeds 0

For each number of training images, a text encoder is trained on them (`main.py shapes`), then a generator on its embeddings
(`GAN.py`), then CLIP with and without generated pairs, for the same number of steps. All use the same validation and test
images. A classifier of the objects (colour and shape) in a picture, trained on real pictures of other scenes, measures how many
of the objects that a caption names are in the picture generated from it.
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
from Datasets import shapes
from generation.networks import IMAGE_SIZE, NOISE_DIM, draw_pictures
from modules import ImageEncoder
from utils.cli import run_cli
from utils.device import autocast, speed_up_cpu
from utils.errors import run_command
from utils.images import read_image

# By number of training images; other numbers use the last entry, or for BATCH_SIZE the preset's.
CLIP_STEPS = {200: 150, 500: 300, 6000: 500}
GAN_EPOCHS = {200: 200, 500: 100, 6000: 25}
BATCH_SIZE, PRESET_BATCH_SIZE = {200: 64, 500: 64}, 128
GENERATED_FRACTION = 0.25  # of each batch
GENERATED_PER_IMAGE, MAX_GENERATED = 5, 5000  # pictures to generate per training image, and in all
OBJECTS = [(color, shape) for color in shapes.COLORS for shape in shapes.SHAPES]
# The classifier detects almost nothing in its first 500 steps.
CLASSIFIER_SCENES, CLASSIFIER_STEPS, CLASSIFIER_BATCH = 12_000, 2500, 64


def named_objects(caption):
    """Indices in OBJECTS of the objects that a caption names by colour and shape."""
    colors = {word: color for color, (words, _) in shapes.COLORS.items() for word in words}
    nouns = {word: shape for shape, words in shapes.SHAPES.items() for word in words}
    pairs = re.findall(rf"\b({'|'.join(colors)}) ({'|'.join(nouns)})\b", caption)
    return [OBJECTS.index((colors[color], nouns[noun])) for color, noun in pairs]


def train_classifier():
    """A multi-label classifier, (n, 3, IMAGE_SIZE, IMAGE_SIZE) pixels to (n, 48) logits: is this object in the picture?"""
    torch.manual_seed(0)
    rng = random.Random(1_000)
    scenes = [shapes.random_scene(rng) for _ in range(CLASSIFIER_SCENES)]
    shape = (IMAGE_SIZE, IMAGE_SIZE)
    pictures = [cv2.resize(shapes.paint(scene, 96, rng), shape, interpolation=cv2.INTER_AREA) for scene in scenes]
    image = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    label = torch.zeros(len(scenes), len(OBJECTS))
    for row, scene in enumerate(scenes):
        label[row, [OBJECTS.index((thing.color, thing.shape)) for thing in scene.things]] = 1
    encoder = ImageEncoder("test_resnet", "random", IMAGE_SIZE)
    classifier = nn.Sequential(encoder, nn.Linear(encoder.width, len(OBJECTS)))
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, CLASSIFIER_STEPS)
    for _ in range(CLASSIFIER_STEPS):
        rows = torch.randint(len(scenes), (CLASSIFIER_BATCH,))
        with autocast(image.device, torch.bfloat16):
            logits = classifier(image[rows])
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval()


@torch.no_grad()
def detection_rate(classifier, pictures, captions):
    """The share, in percent, of the objects named in captions that the classifier detects in their pictures."""
    image = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    detected = torch.cat([classifier(rows) for rows in image.split(250)]) > 0  # (n, 48)
    hits = [detected[row, i].item() for row, caption in enumerate(captions) for i in named_objects(caption)]
    return 100 * float(np.mean(hits))


def detection_rates(classifier, gan_dir, split):
    """Detection rates for a split's captions that name one object, and for those that name two.

    Returns [rate in generated pictures, rate in the real ones, and the same for two], in percent.
    """
    source = GAN.read_captions_and_encoder(GAN.load_gan(gan_dir)["config"], "shapes")
    rates = []
    for count in (1, 2):
        num_named = source.table["caption"].map(named_objects).map(len)
        rows = source.table[(source.table["split"] == split) & (num_named == count)]
        embeddings = source.embed(rows["caption"])
        noise = torch.randn(len(rows), NOISE_DIM, generator=torch.Generator().manual_seed(0))
        generator = GAN.load_generator(gan_dir, embeddings.shape[1]).to(source.device)
        generated = draw_pictures(generator, noise.to(source.device), embeddings.to(source.device))
        real = [read_image(source.image_dir / name, IMAGE_SIZE) for name in rows["image"]]
        rates += [detection_rate(classifier, pictures, rows["caption"]) for pictures in (generated, real)]
    return rates


def run_script(arguments, script="main.py"):
    """Runs a script until it ends."""
    for _ in timed_lines(arguments, script):
        pass


class Experiment:
    """All runs with one number of training images, in one folder.

    folder: holds the drawn sample in sample/. count: number of training images.
    """

    def __init__(self, folder, count):
        self.folder, self.count = folder, count
        self.data, self.gan_dir = folder / f"data-{count}", folder / f"gan-{count}"
        self.extra_data = folder / f"pictures-{count}"
        self.cache = ["--cache-dir", folder / "cache"]
        self.batch_size = BATCH_SIZE.get(count, PRESET_BATCH_SIZE)
        self.steps = CLIP_STEPS.get(count, max(CLIP_STEPS.values()))
        shutil.copytree(folder / "sample", self.data)
        path = self.data / "shapes.trainImages.txt"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))

    def variants(self):
        """{name: (flags, real images per step)} of the ways to train CLIP."""
        num_real = self.batch_size - round(GENERATED_FRACTION * self.batch_size)
        fraction = ["--extra-fraction", GENERATED_FRACTION]
        return {
            "real only": ([], self.batch_size),
            "a quarter generated": (["--extra-data", self.extra_data, *fraction], num_real),
            "joint": (["--gan", "joint", *fraction], self.batch_size),
        }

    def train_clip(self, name, seed):
        """Trains CLIP with a variant. Returns its run folder and its scores on the test images."""
        flags, num_real = self.variants()[name]
        run = self.folder / f"run-{self.count}-{name}-{seed}"
        epochs = round(self.steps / (self.count // num_real))
        flags = [*flags, "--epochs", epochs, "--batch-size", self.batch_size, "--seed", seed, "--run-dir", run]
        run_script(["shapes", "--data-dir", self.data, *self.cache, *flags])
        scores = evaluate("retrieval", "--run", run, "--split", "test")
        rsum, recall = scores["rsum"], scores["text_to_image"]["R@1"]
        print(f"{self.count} images, seed {seed}, {name}: test rsum {rsum:.1f}, T2I R@1 {recall:.1f}", flush=True)
        return run, scores

    def generate(self, run):
        """Trains a generator on a run's text encoder, and generates pictures for the variant with extra data."""
        epochs = GAN_EPOCHS.get(self.count, min(GAN_EPOCHS.values()))
        run_script(["shapes", "--run", run, "--run-dir", self.gan_dir, *self.cache, "--epochs", epochs], "GAN.py")
        number = min(GENERATED_PER_IMAGE * self.count, MAX_GENERATED)
        run_script(["shapes", "--run-dir", self.gan_dir, "--generate", number, "--output", self.extra_data], "GAN.py")

    def detection_rows(self, classifier):
        """Rows of the table of detection rates."""
        rows = []
        for split, split_name in (("val", "validation"), ("test", "test")):
            rates = [f"{rate:.1f}" for rate in detection_rates(classifier, self.gan_dir, split)]
            rows.append([self.count, split_name, *rates])
            print(f"objects detected for {self.count} images, captions of {split}: {' '.join(rates)}", flush=True)
        return rows


def measure(images: tuple[int, ...] = (200, 500, 6000), seeds: tuple[int, ...] = (0, 1, 2), json: str = ""):
    """Measures how often generated pictures show the objects of their captions, and recall with and without them.

    Recall is that of CLIP on the test images; rsum is the sum of the six recalls, at most 600.

    Args:
        images: numbers of training images
        seeds: seeds of the CLIP runs; generators have seed 0
        json: file for the recalls
    """
    speed_up_cpu()
    classifier, detection_rows, recall_rows = train_classifier(), [], []
    with tempfile.TemporaryDirectory() as folder:
        shapes.draw(Path(folder) / "sample")
        for count in images:
            experiment = Experiment(Path(folder), count)
            scores = {name: [] for name in experiment.variants()}
            for seed in seeds:
                for name in scores:
                    run, run_scores = experiment.train_clip(name, seed)
                    scores[name].append(run_scores)
                    if name == "real only" and seed == seeds[0]:
                        experiment.generate(run)
                        detection_rows += experiment.detection_rows(classifier)
            for name, runs in scores.items():
                recalls = [[run[direction]["R@1"] for run in runs] for direction in ("text_to_image", "image_to_text")]
                rsums = [run["rsum"] for run in runs]
                recall_rows.append([count, experiment.steps, name, *map(spread, recalls), spread(rsums)])
    columns = ["training images", "captions", "one object: generated", "real", "two objects: generated", "real"]
    report("Objects named in captions that a classifier detects, percent", columns, detection_rows, "")
    columns = ["training images", "steps", "trained on", "test T2I R@1", "test I2T R@1", "test rsum"]
    report("Recall with and without generated pairs", columns, recall_rows, json, seeds)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/generated.py", sys.argv[1:]))
