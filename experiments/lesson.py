"""A lesson of lessons.py, and the flags. Nothing here takes long to load, so that help and mistakes are answered at once."""

from dataclasses import dataclass, field
from typing import Literal

from utils.cli import POSITIONAL

QUICK = {"train_images": 600, "batch_size": 128, "epochs": 1}


@dataclass(frozen=True)
class Lesson:
    """A question, what one may expect, and the trainings that answer it."""

    question: str
    hypothesis: str
    variants: dict  # name: changes of the preset's Config, and materials
    measures: tuple  # names of experiments.measures.MEASURES
    minutes: int  # for one seed, on two CPU cores
    preset: str = "shapes"
    base: dict = field(default_factory=dict)  # changes for all variants on the drawn sample
    quick: dict = field(default_factory=lambda: dict(QUICK))  # further changes with --quick
    photographs: bool = False  # whether --data-dir may name photographs
    timed: bool = False  # seconds are compared: one training at a time, each with a cache of its own
    plot: Literal["bars", "points", "losses"] = "bars"  # the first measure; it against the second; the losses of each epoch


@dataclass
class Learn:
    """Trains the variants of a lesson and compares them. Without a lesson it lists them."""

    lesson: str = field(default="", metadata=POSITIONAL)  # name of the lesson
    seeds: tuple[int, ...] = (0, 1, 2)  # each variant is trained once with each
    output: str = ""  # folder for the results; empty: runs/lessons/NAME, with -quick or -photographs behind it
    quick: bool = False  # a few steps of the first seed only, to see that it runs; the figures mean nothing
    force: bool = False  # train again what is trained already
    data_dir: str = ""  # folder of captioned photographs, for the lessons that can use them, instead of the drawn sample
    preset: str = ""  # preset of main.py for photographs; empty: linear
    weights_dir: str = ""  # folder with the preset's weights, for photographs without a network: image.safetensors and text/
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
