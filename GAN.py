"""Makes pictures from captions: python GAN.py [PRESET] trains a generator, and with --generate N it writes new pairs.

    python GAN.py shapes
    python GAN.py shapes --generate 5000
    python main.py shapes --extra-data runs/shapes-gan/pictures

Each picture is made from a training caption, and so has one. The captions are read by the text tower of a run of main.py,
which is held still.
"""

import dataclasses
import json
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as F
import tyro
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from tqdm import tqdm

from captions import load_captions
from checkpoint import (
    PREVIOUS,
    has_checkpoint,
    load_newest,
    load_optimizer,
    move_aside,
    only_run_in,
    write_checkpoint,
    write_history,
)
from config import check_run_dir, load_run
from dataset import CLIPDataset, PairSampler, decode_images, train_loader
from Datasets import flickr8k
from device import autocast
from embedding import open_model, project, text_features, token_ids
from evaluate import positions_of_images
from generator import (
    NOISE,
    SIDE,
    Discriminator,
    Generator,
    discriminator_loss,
    draw_pictures,
    generator_loss,
    gradient_penalty,
)  # fmt: skip
from plots import draw_grid
from storage import UserError, key_of_model, remove_unfinished, run_command, whole_folder, write_json, write_whole
from utils.cache import cache_line, note_use

FORMAT = 1  # of gan.json; a folder of another format is refused
CHECK_EVERY = 20  # steps between looks at the losses
SHOWN = 16  # captions of the validation split in samples/
AT_A_TIME = 256  # pictures generated together


@dataclass
class GANConfig:
    run: str = ""  # run of main.py whose text tower reads the captions, and whose data set it is
    data_dir: str = ""  # the data set, where it is not where the run found it
    image_path: str = ""  # folder of its images, where it is not in data_dir
    captions_path: str = ""  # its captions file, where it is not in data_dir
    generate: int = 0  # write this many pictures and their captions instead of training
    output: str = ""  # folder for them; empty: RUN_DIR/pictures

    epochs: int = 25  # passes over the training images
    batch_size: int = 16  # pictures a step; small ones learn more in the same time
    generator_lr: float = 1e-3  # Adam's rate
    discriminator_lr: float = 1e-3  # Adam's rate
    ema: float = 0.998  # share that a step leaves of the averaged weights, which make the pictures
    crop: float = 0.95  # side of the smallest random crop, as a share of the image's shorter side

    seed: int = 0  # of initial weights, shuffling, captions drawn, crops and noise
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of matrix products; auto: bf16 where native, else fp32
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    num_workers: int = 0  # processes that cut crops while the networks compute
    cache_dir: str = ".cache"  # folder for decoded pictures
    run_dir: str = ""  # folder that is written: the generator, sample grids, history.csv; empty: runs/PRESET-gan
    resume: bool = False  # go on from the last epoch in run_dir, with its settings unless flags say otherwise


PRESETS = {
    "shapes": GANConfig(run="runs/shapes", run_dir="runs/shapes-gan"),
    "flickr8k": GANConfig(run="runs/flickr8k", run_dir="runs/flickr8k-gan", num_workers=4),
}


def parse_config(arguments):
    """(GANConfig, preset) of a command line. Exits for unknown flags; raises UserError for values that make no sense."""
    named = bool(arguments) and not arguments[0].startswith("-")
    preset, flags = (arguments[0], arguments[1:]) if named else ("shapes", arguments)
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown; there are {', '.join(PRESETS)}")
    parse = partial(tyro.cli, GANConfig, args=flags, prog="GAN.py [PRESET]", description=__doc__)
    config = parse(default=PRESETS[preset])
    if config.resume or config.generate:
        config = parse(default=replace(load_gan(config.run_dir)["config"], run_dir=config.run_dir))
    check_run_dir(config.run_dir)
    for name in ["epochs", "generator_lr", "discriminator_lr"]:
        if getattr(config, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be more than 0")
    if config.batch_size < 2:
        raise UserError(f"--batch-size {config.batch_size}: must be 2 or more, or there are no wrong captions")
    if config.generate < 0:
        raise UserError(f"--generate {config.generate}: must not be negative")
    if not 0 <= config.ema < 1:
        raise UserError(f"--ema {config.ema}: must be at least 0 and below 1")
    if not 0 < config.crop <= 1:
        raise UserError(f"--crop {config.crop}: must be above 0 and at most 1")
    return config, preset


def load_gan(run_dir):
    """{"config": GANConfig, "text_tower": its key} of a folder. Raises UserError where it is missing, damaged or foreign."""
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


# ---- captions and their embeddings -------------------------------------------------------------------------------


def read_captions_and_tower(config, preset):
    """The run's data set, and its text tower, held still.

    Returns (table, image_dir, skip_bad, embed, key, device, dtype): what `load_captions` gives, and whether the run skips bad
    pictures; a function from m captions to (m, d_e) embeddings of length 1, and the key of the weights in it.
    """
    if preset == "shapes" and config.run == PRESETS["shapes"].run and not Path(config.run, "config.json").exists():
        print(f"no run in {config.run} to read captions: python main.py shapes trains it first", flush=True)
        script = Path(__file__).with_name("main.py")
        data = ["--data-dir", config.data_dir] if config.data_dir else []
        code = subprocess.run([sys.executable, script, "shapes", "--run-dir", config.run, *data]).returncode
        if code:
            sys.exit(code)  # it has said why
    of_run = load_run(config.run)["config"]
    own = config.data_dir or config.captions_path
    data_dir = config.data_dir or ("" if own else of_run.data_dir or flickr8k.find() or "")
    image_path, captions_path = (config.image_path, config.captions_path) if own else (of_run.image_path, of_run.captions_path)
    table, image_dir, _ = load_captions(data_dir, image_path, captions_path, of_run.skip_bad)
    model, device, dtype = open_model(config.run, config.device, config.precision)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16 would need a scaler for each of the two networks
    key = key_of_model(torch.nn.ModuleList([model.text_encoder, model.text_projection]))

    def embed(captions):
        return project(model.text_projection, text_features(model, token_ids(model.tokenizer, captions), device, dtype), device)

    return table, image_dir, of_run.skip_bad, embed, key, device, dtype


# ---- training ----------------------------------------------------------------------------------------------------


def train(config, preset):
    """Trains a generator from a GANConfig, and leaves it in run_dir with a grid of samples an epoch."""
    table, image_dir, skip_bad, embed, key, device, dtype = read_captions_and_tower(config, preset)
    run_dir = Path(config.run_dir)
    remove_unfinished(config.cache_dir)
    rows = table[table["split"] == "train"]
    names, _ = positions_of_images(rows)
    paths = [image_dir / name for name in names]
    pictures, bad = decode_images(paths, SIDE, config.cache_dir, config.num_workers, skip_bad)
    rows = rows[~rows["image"].isin([names[i] for i in bad])]
    pictures = Subset(pictures, [i for i in range(len(names)) if i not in bad])
    names, image_of_text = positions_of_images(rows)
    if len(names) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: there are only {len(names)} training images; lower it")
    embeddings = embed(rows["caption"])  # (m, d_e)
    held_out = list(table.loc[table["split"] == "val", "caption"])
    held_out = held_out[:: max(1, len(held_out) // SHOWN)][:SHOWN]
    shown = embed(held_out).to(device)

    torch.manual_seed(config.seed)
    generator = Generator(embeddings.shape[1]).to(device, memory_format=torch.channels_last)
    discriminator = Discriminator(embeddings.shape[1]).to(device, memory_format=torch.channels_last)
    average = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    noise_shown = torch.randn(len(shown), NOISE).to(device)
    adam = partial(torch.optim.Adam, betas=(0.0, 0.9))  # momentum makes the two networks swing about each other
    optimizers = [
        adam(generator.parameters(), lr=config.generator_lr),
        adam(discriminator.parameters(), lr=config.discriminator_lr),
    ]
    parts = {"generator": generator, "discriminator": discriminator, "average": average}
    parts |= {"generator_optimizer": optimizers[0], "discriminator_optimizer": optimizers[1]}
    history = []
    if config.resume:
        check_tower(config, key)
        history = load_state(run_dir, parts)
        print(f"going on after epoch {len(history)}")
    else:
        move_aside(run_dir, "gan.json")
    kept = dataclasses.asdict(replace(config, resume=False))
    write_json(run_dir / "gan.json", {"format": FORMAT, "config": kept, "text_tower": key})
    note_use(run_dir, pictures.dataset.folder)

    captions_of = np.split(np.argsort(image_of_text, kind="stable"), np.bincount(image_of_text).cumsum()[:-1])
    sampler = PairSampler(captions_of, config.batch_size, config.seed)
    loader = train_loader(CLIPDataset(pictures, embeddings, SIDE, config.crop), sampler, 0, config.num_workers)
    print(f"{len(names):,} training images ({len(rows):,} captions) from {image_dir}; {device}, {str(dtype)[6:]}")
    for epoch in range(len(history), config.epochs):
        started = time.perf_counter()
        sampler.epoch = epoch
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))  # the noise's state then needs no saving
        losses = train_epoch(generator, discriminator, average, optimizers, loader, device, dtype, f"epoch {epoch + 1}")
        row = {"epoch": epoch + 1, "discriminator_loss": losses[0], "generator_loss": losses[1]}
        history.append(row | {"seconds": time.perf_counter() - started})
        save_state(run_dir, parts, history)
        samples = draw_pictures(average.module, noise_shown, shown)
        titles = [textwrap.fill(caption, 34) for caption in held_out]
        draw_grid(f"validation captions, epoch {epoch + 1}", samples, titles, run_dir / "samples" / f"epoch-{epoch + 1:03}.png")
        print(
            f"epoch {epoch + 1:{len(str(config.epochs))}}/{config.epochs}  discriminator {losses[0]:.3f}  "
            f"generator {losses[1]:.3f}  {history[-1]['seconds']:.1f} s",
            flush=True,
        )
    (run_dir / PREVIOUS).unlink(missing_ok=True)  # for a run that ended well the last checkpoint is enough
    print(f"generator in {run_dir}, samples in {run_dir / 'samples'}")
    print(cache_line(config.cache_dir))


def train_epoch(generator, discriminator, average, optimizers, loader, device, dtype, desc):
    """One pass over the training images; returns the discriminator's and the generator's mean loss.

    Raises UserError at a loss that is not finite.
    """
    generator.train()
    progress = tqdm(loader, desc=desc, leave=False, disable=None)
    losses = []
    for step, batch in enumerate(progress):
        real, embedding = batch["image"].to(device).float(), batch["text"].to(device)
        n = len(real)
        # Points between two captions are captions too, of which nobody wrote down the words (GAN-INT; Reed et al. 2016).
        between = F.normalize(embedding + embedding.roll(1, dims=0), dim=1)[: n // 2]
        asked = torch.cat([embedding, between])
        with autocast(device, dtype):
            fake = generator(torch.randn(len(asked), NOISE).to(device), asked)
            loss_d = discriminator_loss(discriminator, real, fake[:n].detach(), embedding)
        take_step(optimizers[1], loss_d + gradient_penalty(discriminator, real, embedding))
        discriminator.requires_grad_(False)  # the generator's loss passes it, but leaves it as it is
        with autocast(device, dtype):
            loss_g = generator_loss(discriminator, fake, asked)
        take_step(optimizers[0], loss_g)
        discriminator.requires_grad_(True)
        average.update_parameters(generator)
        losses.append(torch.stack([loss_d, loss_g]).detach())
        if step % CHECK_EVERY == 0 or step == len(loader) - 1:
            recent = torch.stack(losses[-CHECK_EVERY:])
            if not recent.isfinite().all():
                raise UserError(
                    f"{desc}, step {step + 1}: a loss is not finite; the last good epoch is kept, go on from it with --resume "
                    "and lower --generator-lr and --discriminator-lr"
                )
            progress.set_postfix(discriminator=f"{recent[:, 0].mean():.2f}", generator=f"{recent[:, 1].mean():.2f}")
    return torch.stack(losses).mean(dim=0).tolist()


def take_step(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def save_state(run_dir, parts, history):
    """Writes an epoch's end: what resuming needs, the generator's averaged weights, and the history."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"history": history}
    weights = {name: tensor.contiguous() for name, tensor in parts["average"].module.state_dict().items()}
    write_whole(run_dir / "generator.safetensors", lambda path: path.write_bytes(safetensors.torch.save(weights)))
    write_history(run_dir / "history.csv", history)
    write_checkpoint(run_dir, state)


def load_state(run_dir, parts):
    """Undoes `save_state` and returns the history. Raises UserError where the checkpoint is damaged or another's."""

    def take(saved):
        for name, part in parts.items():
            load = partial(load_optimizer, part) if isinstance(part, torch.optim.Optimizer) else part.load_state_dict
            load(saved[name])
        return saved["history"]

    return load_newest(run_dir, take) if has_checkpoint(run_dir) else []  # the first epoch had not ended


def check_tower(config, key):
    """Raises UserError where the generator in run_dir learnt from another text tower than that of config.run."""
    if load_gan(config.run_dir)["text_tower"] != key:
        raise UserError(
            f"{config.run_dir}: its generator was trained with another text tower than that of {config.run}, whose embeddings "
            "mean nothing to it; name its run with --run, or train it again"
        )


# ---- new pairs ---------------------------------------------------------------------------------------------------


def load_generator(run_dir, width):
    """The generator that `train` left in run_dir. Raises UserError where there is none, or one of another width."""
    path, generator = Path(run_dir) / "generator.safetensors", Generator(width)
    try:
        generator.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; the training has not ended its first epoch") from None
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path}: damaged, or another generator's ({reason}); train it again") from None
    return generator


def write_pairs(config, preset):
    """Writes `generate` pictures and their captions, from the training split only, in Kaggle's layout."""
    table, _, _, embed, key, device, _ = read_captions_and_tower(config, preset)
    check_tower(config, key)
    captions = table.loc[table["split"] == "train", "caption"].unique()
    rng = np.random.default_rng(config.seed)
    passes = -(-config.generate // len(captions))
    chosen = np.concatenate([rng.permutation(captions) for _ in range(passes)])[: config.generate]
    embeddings = embed(chosen)
    generator = load_generator(config.run_dir, embeddings.shape[1]).to(device)
    noise = torch.randn(len(chosen), NOISE, generator=torch.Generator().manual_seed(config.seed))
    output = Path(config.output or Path(config.run_dir) / "pictures")
    names = [f"generated-{number:06}.png" for number in range(len(chosen))]
    with whole_folder(output) as unfinished, tqdm(total=len(chosen), desc="generating", disable=None, leave=False) as progress:
        (unfinished / "Images").mkdir()
        for start in range(0, len(chosen), AT_A_TIME):
            rows = slice(start, start + AT_A_TIME)
            pictures = draw_pictures(generator, noise[rows].to(device), embeddings[rows].to(device))
            for name, picture in zip(names[rows], pictures):
                if not cv2.imwrite(str(unfinished / "Images" / name), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
                    raise UserError(f"{output}: its pictures cannot be written (is the disk full?); name another --output")
                progress.update()
        pairs = pd.DataFrame({"image": names, "caption": chosen})
        pairs.to_csv(unfinished / "captions.txt", index=False)
    print(f"{len(chosen):,} pictures of training captions in {output}")


def main():
    config, preset = parse_config(sys.argv[1:])
    try:
        if config.generate:
            write_pairs(config, preset)
        else:
            with only_run_in(config.run_dir):
                train(config, preset)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"--resume --run-dir {config.run_dir} goes on after the last whole epoch") from None


if __name__ == "__main__":
    run_command(main)
