"""What a lesson needs besides the drawn sample. It is made when a lesson first needs it, and kept in the lesson's folder.

A variant names it beside its settings:
    seen_pairs: n        a sample whose training pictures show only n of the 48 pairs of colour and shape
    pretrained: True     encoders that were trained on another sample, each in a run of its own
    generated: n         so many pictures of a generator that was trained on the variant's training images
"""

import shutil
from dataclasses import replace
from pathlib import Path

import safetensors.torch

import GAN
import main
from config import SHAPES
from Datasets import shapes
from generation.options import GANConfig
from training.data import read_table

PRETRAINING_SEEDS = {"image": 100, "text": 101}  # of the two runs, and of the sample that they see
GENERATOR_STEPS, MAX_GENERATOR_EPOCHS = 2250, 60


def material_settings(materials, config, output, quick):
    """The settings of a Config that name a variant's materials. materials: {name: value}; output: the lesson's folder."""
    settings, suffix = {}, "-quick" if quick else ""
    if "seen_pairs" in materials:
        settings["data_dir"] = str(output / f"seen-{materials['seen_pairs']}")
    if "pretrained" in materials:
        folder = output / f"pretrained{suffix}"
        settings["image_weights"] = str(folder / "image.safetensors")
        settings |= {"text_encoder": str(folder / "text"), "text_weights": "pretrained"}
    if "generated" in materials:
        images = f"{config.train_images}-seed-{config.seed}" if config.train_images else "all"  # which ones: the seed's choice
        settings["extra_data"] = str(output / f"{materials['generated']}-generated-from-{images}{suffix}" / "pictures")
    return settings


def make_materials(job, output, quick):
    """Makes what a Job's materials name and is not there yet."""
    if "seen_pairs" in job.materials and not Path(job.config.data_dir).exists():
        shapes.draw(job.config.data_dir, seen=job.materials["seen_pairs"])
    if "pretrained" in job.materials and not Path(job.config.text_encoder).exists():
        pretrain(Path(job.config.text_encoder).parent, job.config.device, quick)
    if "generated" in job.materials and not Path(job.config.extra_data).exists():
        generate(job.config, job.materials["generated"], quick)
    if any("pairs, " in name for name in job.measures) and not job.classes_dir.exists():
        shapes.draw_classes(job.classes_dir)


def pretrain(folder, device, quick):
    """Trains two runs on another sample, and writes image.safetensors of one and text/ of the other into folder."""
    data = folder / "sample"
    shapes.draw(data, seed=PRETRAINING_SEEDS["image"])
    settings = {"data_dir": str(data), "cache_dir": str(folder / "cache"), "epochs": 1 if quick else 6, "device": device}
    for part, seed in PRETRAINING_SEEDS.items():
        run_dir = folder / f"run-{part}"
        model = main.train(replace(SHAPES, **settings, seed=seed, run_dir=str(run_dir)))
        if part == "image":
            weights = {name: value.contiguous() for name, value in model.image_encoder.backbone.state_dict().items()}
            safetensors.torch.save_file(weights, folder / "image.safetensors")
        else:
            model.text_encoder.backbone.save_pretrained(folder / "text-unfinished")
            shutil.copy(run_dir / "tokenizer.json", folder / "text-unfinished")
            (folder / "text-unfinished").rename(folder / "text")  # last: it says that all is there
    shutil.rmtree(folder / "cache")


def generate(config, count, quick):
    """Trains an encoder and a generator on a Config's training images, and writes `count` pictures into its extra_data."""
    pictures = Path(config.extra_data)
    run_dir = str(pictures.parent / "encoder")
    seed = config.seed if config.train_images else 0  # one generator of all images serves all seeds
    main.train(replace(config, extra_data="", run_dir=run_dir, seed=seed))
    table, *_ = read_table(config)
    steps_per_epoch = table["image"][table["split"] == "train"].nunique() // GANConfig.batch_size
    epochs = 1 if quick else min(MAX_GENERATOR_EPOCHS, GENERATOR_STEPS // steps_per_epoch)
    places = {"run_dir": str(pictures.parent / "generator"), "cache_dir": config.cache_dir, "output": str(pictures)}
    generator = GANConfig(run=run_dir, epochs=epochs, device=config.device, generate=count, **places)
    GAN.train(generator, "")
    GAN.write_pairs(generator, "")
