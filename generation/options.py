"""The flags of GAN.py. Nothing here takes long to load, so that help and mistakes are answered at once."""

import difflib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from config import AtMost, check_run_dir, is_passed, require_runs
from utils.cli import HELP, command_help, dataclass_flags, parse
from utils.errors import UserError

EXAMPLES = (
    "python GAN.py shapes",
    "python GAN.py shapes --generate 5000",
    "python main.py shapes --extra-data runs/shapes-gan/pictures",
)
FORMAT = 1  # of gan.json; a folder with another format is refused


@dataclass
class GANConfig:
    run: str = ""  # run of main.py whose data set and text encoder are used
    data_dir: str = ""  # folder of the data set; empty: the one the run used
    image_path: str = ""  # folder of the images, if not in data_dir
    captions_path: str = ""  # captions file, if not in data_dir
    generate: int = 0  # generate this many pictures with captions instead of training
    output: str = ""  # folder for them; empty: RUN_DIR/pictures

    epochs: int = 25  # passes over the training images
    batch_size: int = 16  # pictures per step, at most all; with small batches training is faster
    generator_lr: float = 1e-3  # Adam's learning rate
    discriminator_lr: float = 1e-3  # Adam's learning rate
    ema: float = 0.998  # decay per step of the moving average of the generator's weights, used for generating
    crop: float = 0.95  # side of the smallest random crop, as a fraction of the image's shorter side

    seed: int = 0  # of initial weights, shuffling, caption sampling, crops and noise
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; auto: bf16 where native, else fp32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: int = 0  # data loader processes
    cache_dir: str = ".cache"  # folder for decoded pictures
    run_dir: str = ""  # output folder: the generator, sample grids, history.csv; empty: runs/PRESET-gan
    resume: bool = False  # continue after the last epoch in run_dir, with its settings unless flags change them


PRESETS = {
    "shapes": GANConfig(run="runs/shapes", run_dir="runs/shapes-gan"),
    "flickr8k": GANConfig(run="runs/flickr8k", run_dir="runs/flickr8k-gan", num_workers=4),
}


def parse_config(arguments):
    """(GANConfig, preset) of a command line. Raises UserError for values that make no sense, and runs that are not there."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset, flags = (arguments[0], arguments[1:]) if named else ("shapes", arguments)
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, 1)
        suggestion = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"preset {preset!r} is unknown; {suggestion}there are {', '.join(PRESETS)}")
    if HELP & set(flags):
        usage = f"python GAN.py [{'|'.join(PRESETS)}] [--flags]"
        print(command_help(usage, "Generates pictures from captions.", EXAMPLES, dataclass_flags(PRESETS[preset])))
        sys.exit(0)
    config = parse(GANConfig, "GAN.py", flags, PRESETS[preset])
    if config.resume or config.generate:
        config = parse(GANConfig, "GAN.py", flags, replace(load_gan(config.run_dir)["config"], run_dir=config.run_dir))
    elif not named and config.run == PRESETS["shapes"].run and (config.data_dir or config.captions_path or config.image_path):
        raise UserError(
            "--data-dir, --captions-path, --image-path: without a preset the text encoder would be the drawn sample's; name a "
            "run on your data with --run, or the preset shapes"
        )
    if not (config.resume or is_passed("--batch-size", flags)):
        config = replace(config, batch_size=AtMost(config.batch_size))
    check_run_dir(config.run_dir)
    for name in ["epochs", "generator_lr", "discriminator_lr"]:
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be more than 0")
    if config.batch_size < 2:
        raise UserError(f"--batch-size {config.batch_size}: must be 2 or more, or there are no mismatched captions")
    if config.generate < 0:
        raise UserError(f"--generate {config.generate}: must not be negative")
    if not 0 <= config.ema < 1:
        raise UserError(f"--ema {config.ema}: must be at least 0 and below 1")
    if not 0 < config.crop <= 1:
        raise UserError(f"--crop {config.crop}: must be above 0 and at most 1")
    if config.run != PRESETS["shapes"].run:  # which is trained first where it is not there
        require_runs(config.run)
    return config, preset


def fit_batch(config, num_images, place):
    """The GANConfig with a batch that so many training images fill: one that nobody passed is lowered, which is printed.

    Raises UserError where one that was passed does not fit, and for a single picture.
    """
    if num_images < 2:
        raise UserError(f"{place}: {num_images} training images are too few for any batch; add pictures")
    if config.batch_size <= num_images:
        return replace(config, batch_size=int(config.batch_size))
    if not isinstance(config.batch_size, AtMost):
        raise UserError(f"--batch-size {config.batch_size}: there are only {num_images} training images in {place}; lower it")
    print(f"batch size {num_images} instead of {config.batch_size}: there are no more training images")
    return replace(config, batch_size=num_images)


def load_gan(run_dir):
    """{"config": GANConfig, "text_tower": key of the text encoder}. Raises UserError where gan.json is missing or invalid."""
    path = Path(run_dir) / "gan.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != FORMAT:
            raise UserError(f"{path}: format {saved['format']}, but this version reads {FORMAT}; train it again")
        return {"config": GANConfig(**saved["config"]), "text_tower": saved["text_tower"]}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run_dir}: no generator is there (no gan.json); train one with python GAN.py") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged or of another version ({type(error).__name__}: {error}); train it again") from None
