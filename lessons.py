"""Lessons: each open question of CLIP on small data, answered by one command. python lessons.py lists them.

A lesson trains variants of one run, which differ in a few settings, with several seeds, and compares them. It writes
results.json, table.md and plot.png. What is trained already, with the same settings, is not trained again. docs/lessons/ has a
page for each.
"""

import difflib
import sys
from itertools import product
from pathlib import Path

from config import PRESETS
from experiments.lesson import Learn, Lesson
from utils.cli import run_cli
from utils.errors import UserError, run_command

EXAMPLES = ("python lessons.py", "python lessons.py temperature --seeds 0", "python lessons.py order --quick")
SOURCE_MODEL = {"pooling": "first", "temperature": 1.0}  # of a public reimplementation whose validation loss never fell
CAUSES = {
    "first token, temperature 1": SOURCE_MODEL,
    "last token, temperature 1": {"temperature": 1.0},
    "first token, learned temperature": {"pooling": "first"},
    "last token, learned temperature": {},
}
WIDTH = 96  # features of the sample's image encoder
SHORT, LONG = {"epochs": 5}, {"epochs": 8}  # places and order take longer to learn than colours and shapes
BATCH_SIZES = (16, 64, 256, 1024, 4096)
RECALL = ("rsum", "R@1 text to image", "R@1 image to text")

LESSONS = {
    "temperature": Lesson(
        "Must the temperature be learned?",
        "A fixed one does as well if it is right, and far worse if it is not.",
        {"learned": {}} | {f"fixed at {value:g}": {"temperature": value} for value in (0.01, 0.07, 0.2, 1.0)},
        (*RECALL, "last temperature"),
        minutes=3,
        base=SHORT,
        photographs=True,
    ),
    "loss": Lesson(
        "Is CLIP's loss a binary cross-entropy? Is its symmetric part needed?",
        "It is not: each row is one choice among n captions. One side alone should do nearly as well.",
        {
            "softmax, both sides": {},
            "image side only": {"loss": "image"},
            "text side only": {"loss": "text"},
            "sigmoid, learned bias": {"loss": "sigmoid"},
            "mean binary cross-entropy": {"loss": "bce"},
        },
        RECALL,
        minutes=3,
        base=SHORT,
        photographs=True,
    ),
    "batch": Lesson(
        "Do more negatives help on 6,000 images?",
        "At equal epochs large batches take too few steps; at equal steps more negatives help.",
        {f"{n:,}, equal epochs": {"batch_size": n} for n in BATCH_SIZES}
        | {f"{n:,}, 25 steps": {"batch_size": n, "steps": 25} for n in BATCH_SIZES}
        | {"1,024, 25 steps, in micro-batches of 128": {"batch_size": 1024, "steps": 25, "micro_batch_size": 128}},
        ("rsum, BatchNorm recomputed", *RECALL, "seconds of the epochs"),
        minutes=6,
        base=SHORT,
        quick={"epochs": 1, "steps": 1},
        photographs=True,
    ),
    "negatives": Lesson(
        "Do captions of one picture, and near-duplicates, hurt as negatives?",
        "Repeated images make true pairs wrong, so recall falls, and targets that know the image repair it.",
        {
            "unique images": {},
            "repeated images": {"unique_images": False},
            "repeated images, all their captions right": {"unique_images": False, "targets": "image"},
            "label smoothing": {"targets": "smooth"},
            "soft targets from similarity": {"targets": "soft"},
        },
        (*RECALL, "alignment", "uniformity"),
        minutes=3,
        base={"batch_size": 512, "epochs": 6},
        photographs=True,
    ),
    "head": Lesson(
        "Linear or not, and how wide?",
        "Encoders that train can do what a second layer does, so a linear head is enough, and 256 features are.",
        {f"none, {WIDTH}": {"num_projection_layers": 0, "projection_dim": WIDTH, "text_width": WIDTH}}
        | {f"linear, {width:,}": {"projection_dim": width} for width in (64, 256, 1024)}
        | {f"two layers, {width:,}": {"projection_dim": width, "num_projection_layers": 2} for width in (64, 256, 1024)},
        RECALL,
        minutes=3,
        base=SHORT,
    ),
    "overfit": Lesson(
        "Why does validation loss rise while training loss falls?",
        "GPT-2's first token has seen no other word, so its feature says little; a temperature of 1 leaves the loss near "
        "chance; few images are overfit in any case.",
        {
            f"{images:,} images, {cause}": {"train_images": images} | changes
            for images, (cause, changes) in product((200, 1000, 6000), CAUSES.items())
        },
        ("lowest validation loss", "last validation loss", "last training loss", "rsum"),
        minutes=6,
        preset="gpt2",
        base={"batch_size": 64, "steps": 250},
        quick={"steps": 8},
        plot="losses",
    ),
    "order": Lesson(
        "Does the text encoder read sentences or bags of words?",
        "A bag of words cannot tell twins apart (50%); encoders that see the order can.",
        {
            "bag of words": {"text_encoder": "cbow"},
            "Transformer (DistilBERT)": {},
            "the paper's causal Transformer": {"text_encoder": "clip", "text_encoder_lr": 7e-4},
            "GPT-2": {"text_encoder": "gpt2", "text_encoder_lr": 7e-4},
            "Mixer": {"text_encoder": "mixer", "max_length": 40},
        },
        ("twins, percent", *RECALL),
        minutes=4,
        base=LONG,
    ),
    "flip": Lesson(
        "Why are pictures not mirrored beside captions of left and right?",
        "A mirrored picture makes such a caption false, so left and right are then not learned.",
        {"none": {}, "mirrored": {"hflip": True, "flip_left_right": True}, "mirrored, protected": {"hflip": True}},
        ("left and right, percent", "above and below, percent", *RECALL),
        minutes=3,
        base=LONG,
    ),
    "compose": Lesson(
        "Are combinations of colour and shape recognised that training never showed?",
        "The more combinations are seen, the more the unseen ones are recognised.",
        {f"{seen} of 48 pairs seen": {"seen_pairs": seen} for seen in (10, 20, 30, 42)},
        ("unseen pairs, 1 prompt", "unseen pairs, 5 prompts", "seen pairs, 1 prompt", "seen pairs, 5 prompts"),
        minutes=2,
        base=SHORT,
    ),
    "mixer": Lesson(
        "Is attention needed?",
        "On pictures and captions this small, mixing tokens with fixed weights should do nearly as well.",
        {
            "Mixer": {},
            "Transformer": {"image_encoder": "vit", "image_heads": 2, "image_encoder_lr": 7e-4, "text_encoder": "clip"}
            | {"text_heads": 8, "text_encoder_lr": 7e-4},
        },
        (*RECALL, "STS, Spearman", "seconds of the epochs", "million parameters"),
        minutes=3,
        preset="mixer",
        base={"epochs": 8},
        timed=True,
    ),
    "freeze": Lesson(
        "Which encoder should be frozen, where both are pretrained?",
        "Training both gives most and takes longest; a frozen image encoder (LiT) is nearly as good and much faster.",
        {
            f"frozen: {frozen}{', heads first' if first else ''}": {"pretrained": True, "freeze": frozen, "heads_first": first}
            for frozen, first in product(("none", "image", "text", "both"), (False, True))
            if not (frozen == "both" and first)
        },
        ("rsum", "seconds in all", "R@1 text to image", "R@1 image to text"),
        minutes=2,
        base={"train_images": 1000, "epochs": 8, "batch_size": 64, "image_encoder_lr": 1e-3, "text_encoder_lr": 3e-4},
        quick={"epochs": 1},
        timed=True,
        plot="points",
    ),
    "gan": Lesson(
        "Do generated pictures help?",
        "A generator has seen nothing but the same pictures, so it cannot; at best it does no harm.",
        {
            f"{images or 6000:,} images, {way}": {"train_images": images, "steps": steps, "batch_size": 64} | changes
            for images, steps in ((200, 60), (0, 150))
            for way, changes in {
                "real only": {},
                **{f"{share:.0%} generated": {"generated": 2000, "extra_fraction": share} for share in (0.1, 0.25, 0.5)},
                **{f"joint, lambda {weight:g}": {"gan": "joint", "gan_weight": weight} for weight in (0.0, 1.0, 3.0)},
            }.items()
        },
        RECALL,
        minutes=7,
        quick={"steps": 2},
    ),
}


def read_lesson(arguments):
    """The Learn of a command line; without a lesson it lists them and exits. Raises UserError for values that make no sense."""
    options = run_cli(Learn, "lessons.py", arguments, EXAMPLES)
    lesson, preset, seeds = options.lesson, options.preset, options.seeds
    if not lesson:
        print("python lessons.py NAME; minutes are those of one seed on two CPU cores:\n")
        for name, known in LESSONS.items():
            print(f"  {name:12}{known.minutes:3}  {known.question}")
        sys.exit(0)
    if lesson not in LESSONS:
        close = difflib.get_close_matches(lesson, LESSONS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"lesson {lesson!r} is unknown; {hint}there are {', '.join(LESSONS)}")
    if options.data_dir and not LESSONS[lesson].photographs:
        able = ", ".join(name for name, other in LESSONS.items() if other.photographs)
        raise UserError(f"--data-dir: the lesson {lesson} needs the drawn sample; photographs are for {able}")
    if (preset or options.weights_dir) and not options.data_dir:
        raise UserError("--preset, --weights-dir: are for photographs; name their folder with --data-dir")
    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown; there are {', '.join(PRESETS)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: name at least one, and each once")
    if options.data_dir and not Path(options.data_dir).is_dir():
        raise UserError(f"--data-dir {options.data_dir}: no such folder; name one with Images/ and a captions file")
    for name in ("image.safetensors", "text") if options.weights_dir else ():
        if not (Path(options.weights_dir) / name).exists():
            raise UserError(f"--weights-dir {options.weights_dir}: {name} is missing there")
    return options


if __name__ == "__main__":  # before the imports below, which take seconds to load
    OPTIONS = run_command(read_lesson, sys.argv[1:])

import os

from experiments.report import write_report
from experiments.runner import make_jobs, prepare, require_lesson_folder, train_all
from utils.device import pick_device


def learn(options):
    """What `python lessons.py LESSON` does. options: an `experiments.lesson.Learn`."""
    lesson, data_dir, quick, device = options.lesson, options.data_dir, options.quick, options.device
    chosen = LESSONS[lesson]
    pick_device(device)
    seeds = options.seeds[:1] if quick else options.seeds
    folder = Path(options.output or f"runs/lessons/{lesson}{'-photographs' if data_dir else ''}{'-quick' if quick else ''}")
    given = {"device": device} | (photographs(data_dir, options.weights_dir) if data_dir else {})
    require_lesson_folder(folder)
    jobs = make_jobs(chosen, (options.preset or "linear") if data_dir else chosen.preset, given, seeds, folder, quick)
    to_do = [job for job in jobs if options.force or not job.result()]
    if to_do:
        minutes = "under 2" if quick else f"about {round(chosen.minutes * len(to_do) / len(chosen.variants))}"
        there = len(jobs) - len(to_do)
        print(f"{len(to_do)} trainings, {minutes} minutes on two CPU cores; {there} are there already", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(to_do, folder, quick)
        workers = 1 if chosen.timed or device != "auto" else min(2, os.cpu_count() or 1)
        if data_dir:  # one training computes the features of the frozen encoders, which the others then find
            train_all(to_do[:1], 1)
        train_all(to_do[bool(data_dir) :], workers)
    write_report(lesson, chosen, jobs, folder)


def photographs(data_dir, weights_dir):
    """The settings of the same names, for photographs."""
    folder = Path(weights_dir)
    weights = {"image_weights": str(folder / "image.safetensors"), "text_encoder": str(folder / "text")} if weights_dir else {}
    return {"data_dir": data_dir} | weights


if __name__ == "__main__":
    run_command(learn, OPTIONS)
