"""Generates pictures from captions: python GAN.py [PRESET] trains a generator; with --generate N it writes new pairs.

Pictures are generated from training captions, and so come with captions. The captions are embedded by the frozen text encoder
of a run of main.py.
"""

import sys

from generation.options import FORMAT, PRESETS, fit_batch, load_gan, parse_config
from utils.errors import UserError, run_command

if __name__ == "__main__":  # first, as what is imported below takes seconds to load
    CONFIG, PRESET = run_command(parse_config, sys.argv[1:])

import dataclasses
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from tqdm import tqdm

from captions import image_positions
from config import load_run
from dataset import CLIPDataset, PairSampler
from Datasets import flickr8k
from embedding import open_model, project_and_normalize, text_features, token_ids
from generation.networks import (
    IMAGE_SIZE,
    NOISE_DIM,
    Discriminator,
    Generator,
    discriminator_loss,
    draw_pictures,
    generator_loss,
    gradient_penalty,
)
from training.checkpoint import (
    PREVIOUS,
    backup_run,
    has_checkpoint,
    load_latest,
    load_optimizer,
    lock_run_dir,
    write_checkpoint,
    write_history,
)
from training.data import batch_loader, read_table
from utils.cache import cache_key, cache_line, model_key, note_use
from utils.device import autocast, pick_dtype
from utils.files import atomic_dir, atomic_write, remove_leftovers, require_own_folder, write_json
from utils.images import center_crop, decode_images, read_images
from utils.plots import draw_generated

CHECK_EVERY = 20  # steps between checks of the losses
NUM_SAMPLES = 8  # validation captions in each grid of samples/
PAIR_FILES = r"Images/generated-\d{6,}\.png|captions\.txt"  # below the folder of generated pairs
GENERATE_BATCH = 256  # pictures per forward pass


# ---- captions and their embeddings -------------------------------------------------------------------------------


@dataclass
class CaptionSource:
    """The data set of a run of main.py, and the run's frozen text encoder."""

    table: pd.DataFrame  # as `captions.load_captions` returns it
    image_dir: Path
    skip_bad: bool  # whether the run skips pictures that cannot be decoded
    embed: Callable  # m captions -> (m, d_e) L2-normalised embeddings
    key: str  # of the weights that embed uses
    device: torch.device
    dtype: torch.dtype


def read_captions_and_encoder(config, preset):
    """The CaptionSource of config.run; for the shapes preset that run is trained first if it does not exist."""
    if preset == "shapes" and config.run == PRESETS["shapes"].run and not Path(config.run, "config.json").exists():
        print(f"{config.run}: no run is there; python main.py shapes trains it first", flush=True)
        script = Path(__file__).with_name("main.py")
        data = ["--data-dir", config.data_dir] if config.data_dir else []
        code = subprocess.run([sys.executable, script, "shapes", "--run-dir", config.run, *data]).returncode
        if code:
            sys.exit(code)  # main.py has printed the reason
    run_config = load_run(config.run)["config"]
    other_data = config.data_dir or config.captions_path
    paths = config if other_data else run_config
    data_dir = config.data_dir or ("" if other_data else run_config.data_dir or flickr8k.find() or "")
    places = {"data_dir": data_dir, "image_path": paths.image_path, "captions_path": paths.captions_path}
    table, image_dir, _ = read_table(replace(run_config, **places, **({"train_images": 0} if other_data else {})))
    model, device, text_dtype = open_model(config.run, config.device, config.precision)
    dtype = pick_dtype(config.precision, device)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # fp16 would need a scaler for each of the two networks
    key = model_key(torch.nn.ModuleList([model.text_encoder, model.text_projection]))

    def embed(captions):
        T_f = text_features(model, token_ids(model.tokenizer, captions), device, text_dtype)
        return project_and_normalize(model.text_projection, T_f, device)

    return CaptionSource(table, image_dir, run_config.skip_bad, embed, key, device, dtype)


# ---- training ----------------------------------------------------------------------------------------------------


def train(config, preset):
    """Trains a generator as a GANConfig says, and writes it to run_dir, with a grid of samples per epoch."""
    source = read_captions_and_encoder(config, preset)
    run_dir, device = Path(config.run_dir), source.device
    remove_leftovers(config.cache_dir)
    pictures, rows = load_training_pairs(config, source)
    config, (_, image_of_text) = fit_batch(config, len(pictures), source.image_dir), image_positions(rows)
    captions, data_key = rows["caption"], cache_key(list(rows["image"]), list(rows["caption"]), list(rows["content"]))
    embeddings = source.embed(captions)  # (m, d_e)
    sample_captions, sample_pictures = pick_validation_pairs(source)
    sample_embeddings = source.embed(sample_captions).to(device)

    torch.manual_seed(config.seed)
    parts = create_parts(config, embeddings.shape[1], device)
    sample_noise = torch.randn(len(sample_embeddings), NOISE_DIM).to(device)
    history = start_or_resume(config, parts, source.key, data_key)
    note_use(run_dir, pictures.dataset.folder)
    loader = create_loader(config, pictures, embeddings, image_of_text)
    sampler = loader.batch_sampler
    print(f"{len(pictures):,} training images ({len(captions):,} captions) from {source.image_dir}; ", end="")
    print(f"{device}, {str(source.dtype)[6:]}")
    for epoch in range(len(history), config.epochs):
        started = time.perf_counter()
        sampler.epoch = epoch
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))  # so the random state need not be saved
        loss_d, loss_g = train_epoch(parts, loader, device, source.dtype, f"epoch {epoch + 1}")
        row = {"epoch": epoch + 1, "discriminator_loss": loss_d, "generator_loss": loss_g}
        history.append(row | {"seconds": time.perf_counter() - started})
        save_state(run_dir, parts, history, data_key)
        samples = draw_pictures(parts["average"].module, sample_noise, sample_embeddings)
        path = run_dir / "samples" / f"epoch-{epoch + 1:03}.png"
        draw_generated(f"validation captions, epoch {epoch + 1}", sample_captions, sample_pictures, samples, path)
        print(
            f"epoch {epoch + 1:{len(str(config.epochs))}}/{config.epochs}  discriminator {loss_d:.3f}  "
            f"generator {loss_g:.3f}  {history[-1]['seconds']:.1f} s",
            flush=True,
        )
    (run_dir / PREVIOUS).unlink(missing_ok=True)  # needed only while training goes on
    print(f"generator in {run_dir}, samples in {run_dir / 'samples'}")
    print(cache_line(config.cache_dir))


def load_training_pairs(config, source):
    """(pictures, rows): n decoded training pictures, and the rows of the table with their m captions."""
    rows = source.table[source.table["split"] == "train"]
    names, _ = image_positions(rows)
    paths = [source.image_dir / name for name in names]
    pictures, bad = decode_images(paths, IMAGE_SIZE, config.cache_dir, config.num_workers, source.skip_bad)
    rows = rows[~rows["image"].isin([names[i] for i in bad])]
    pictures = Subset(pictures, [i for i in range(len(names)) if i not in bad])
    return pictures, rows


def pick_validation_pairs(source):
    """At most NUM_SAMPLES validation captions, evenly spaced, and their pictures, for the grids of samples."""
    rows = source.table[source.table["split"] == "val"]
    rows = rows[:: max(1, len(rows) // NUM_SAMPLES)][:NUM_SAMPLES]
    pictures = read_images([source.image_dir / name for name in rows["image"]], IMAGE_SIZE)
    pairs = [(text, center_crop(image, IMAGE_SIZE)) for text, (image, _) in zip(rows["caption"], pictures) if image is not None]
    return [text for text, _ in pairs], [image for _, image in pairs]


def create_parts(config, width, device):
    """What training changes: both networks, the generator's moving average and the optimizers, by name. width: d_e."""
    generator = Generator(width).to(device, memory_format=torch.channels_last)
    discriminator = Discriminator(width).to(device, memory_format=torch.channels_last)
    adam = partial(torch.optim.Adam, betas=(0.0, 0.9))  # with momentum the two networks' losses oscillate
    return {
        "generator": generator,
        "discriminator": discriminator,
        "average": AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True),
        "generator_optimizer": adam(generator.parameters(), lr=config.generator_lr),
        "discriminator_optimizer": adam(discriminator.parameters(), lr=config.discriminator_lr),
    }


def start_or_resume(config, parts, key, data_key):
    """Restores `parts` if the run is resumed, else renames an earlier run; writes gan.json. Returns the history so far.

    key: of the text encoder. data_key: of the training captions and of what the image files hold.
    """
    run_dir, history = Path(config.run_dir), []
    if config.resume:
        check_encoder(config, key)
        history = load_state(run_dir, parts, data_key)
        print(f"resuming after epoch {len(history)}")
    else:
        backup_run(run_dir, "gan.json")
    settings = dataclasses.asdict(replace(config, resume=False))
    write_json(run_dir / "gan.json", {"format": FORMAT, "config": settings, "text_tower": key})
    return history


def create_loader(config, pictures, embeddings, image_of_text):
    """A DataLoader of batches of pictures, each with the embedding of one of its captions."""
    captions_of = np.split(np.argsort(image_of_text, kind="stable"), np.bincount(image_of_text).cumsum()[:-1])
    sampler = PairSampler(captions_of, config.batch_size, config.seed)
    dataset = CLIPDataset(pictures, embeddings, IMAGE_SIZE, config.crop, text_key="text_features")
    return batch_loader(dataset, sampler, 0, config.num_workers)


def train_epoch(parts, loader, device, dtype, desc):
    """One pass over the training images; returns the mean losses of the discriminator and the generator.

    parts: of `create_parts`. Raises UserError at a loss that is not finite.
    """
    generator, discriminator = parts["generator"], parts["discriminator"]
    generator.train()
    progress = tqdm(loader, desc=desc, leave=False, disable=None)
    losses = []
    for step, batch in enumerate(progress):
        real, embedding = batch["image"].to(device).float(), batch["text_features"].to(device)
        n = len(real)
        # A point between two captions' embeddings stands for a further caption (GAN-INT; Reed et al. 2016).
        between = F.normalize(embedding + embedding.roll(1, dims=0), dim=1)[: n // 2]
        condition = torch.cat([embedding, between])
        with autocast(device, dtype):
            fake = generator(torch.randn(len(condition), NOISE_DIM).to(device), condition)
            loss_d = discriminator_loss(discriminator, real, fake[:n].detach(), embedding)
        take_step(parts["discriminator_optimizer"], loss_d + gradient_penalty(discriminator, real, embedding))
        discriminator.requires_grad_(False)  # the generator's loss is backpropagated through it, but does not update it
        with autocast(device, dtype):
            loss_g = generator_loss(discriminator, fake, condition)
        take_step(parts["generator_optimizer"], loss_g)
        discriminator.requires_grad_(True)
        parts["average"].update_parameters(generator)
        losses.append(torch.stack([loss_d, loss_g]).detach())
        if step % CHECK_EVERY == 0 or step == len(loader) - 1:
            recent = torch.stack(losses[-CHECK_EVERY:])
            if not recent.isfinite().all():
                raise UserError(
                    f"{desc}, step {step + 1}: a loss is not finite; the last good epoch is kept; continue from it with "
                    "--resume and lower --generator-lr and --discriminator-lr"
                )
            progress.set_postfix(discriminator=f"{recent[:, 0].mean():.2f}", generator=f"{recent[:, 1].mean():.2f}")
    return torch.stack(losses).mean(dim=0).tolist()


def take_step(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def save_state(run_dir, parts, history, data_key):
    """Writes the generator's averaged weights, the history, and a checkpoint to resume from."""
    state = {name: part.state_dict() for name, part in parts.items()} | {"history": history, "data": data_key}
    weights = {name: tensor.contiguous() for name, tensor in parts["average"].module.state_dict().items()}
    atomic_write(run_dir / "generator.safetensors", lambda path: path.write_bytes(safetensors.torch.save(weights)))
    write_history(run_dir / "history.csv", history)
    write_checkpoint(run_dir, state)


def load_state(run_dir, parts, data_key):
    """The inverse of `save_state`; returns the history. Raises UserError where the checkpoint is damaged or of another run."""

    def restore(saved):
        if saved.get("data", data_key) != data_key:  # an earlier version kept none
            raise UserError(f"{run_dir}: its pictures or captions have changed; restore them, or start a new run")
        for name, part in parts.items():
            load = partial(load_optimizer, part) if isinstance(part, torch.optim.Optimizer) else part.load_state_dict
            load(saved[name])
        return saved["history"]

    return load_latest(run_dir, restore) if has_checkpoint(run_dir) else []  # stopped in the first epoch


def check_encoder(config, key):
    """Raises UserError where the generator in run_dir was trained with another text encoder than that of config.run."""
    if load_gan(config.run_dir)["text_tower"] != key:
        raise UserError(
            f"{config.run_dir}: its generator was trained with another text encoder than that of {config.run}; "
            "name its run with --run, or train it again"
        )


# ---- generated pairs ---------------------------------------------------------------------------------------------


def load_generator(run_dir, width):
    """The generator that `train` wrote to run_dir. Raises UserError where there is none, or one of another width (d_e)."""
    path, generator = Path(run_dir) / "generator.safetensors", Generator(width)
    try:
        generator.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; training has not finished its first epoch") from None
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path}: damaged, or of another generator ({reason}); train it again") from None
    return generator


def write_pairs(config, preset):
    """Generates `generate` pictures from training captions, and writes both in the layout of Kaggle's Flickr8k.

    Raises UserError where the folder for them holds anything but what an earlier call wrote there.
    """
    output = Path(config.output or Path(config.run_dir) / "pictures")
    require_own_folder(output, PAIR_FILES)  # before what takes a while
    source = read_captions_and_encoder(config, preset)
    check_encoder(config, source.key)
    captions = source.table.loc[source.table["split"] == "train", "caption"].unique()
    rng = np.random.default_rng(config.seed)
    passes = -(-config.generate // len(captions))
    chosen = np.concatenate([rng.permutation(captions) for _ in range(passes)])[: config.generate]
    embeddings = source.embed(chosen)
    generator = load_generator(config.run_dir, embeddings.shape[1]).to(source.device)
    noise = torch.randn(len(chosen), NOISE_DIM, generator=torch.Generator().manual_seed(config.seed))
    names = [f"generated-{number:06}.png" for number in range(len(chosen))]
    with (
        atomic_dir(output, PAIR_FILES) as temporary_path,
        tqdm(total=len(chosen), desc="generating", disable=None, leave=False) as progress,
    ):
        (temporary_path / "Images").mkdir()
        for start in range(0, len(chosen), GENERATE_BATCH):
            rows = slice(start, start + GENERATE_BATCH)
            pictures = draw_pictures(generator, noise[rows].to(source.device), embeddings[rows].to(source.device))
            for name, picture in zip(names[rows], pictures):
                if not cv2.imwrite(str(temporary_path / "Images" / name), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)):
                    raise UserError(f"{output}: its pictures cannot be written (is the disk full?); name another --output")
                progress.update()
        pairs = pd.DataFrame({"image": names, "caption": chosen})
        pairs.to_csv(temporary_path / "captions.txt", index=False)
    print(f"{len(chosen):,} pictures of training captions in {output}")


def main(config, preset):
    """What `python GAN.py` does; the arguments are what `generation.options.parse_config` returns."""
    try:
        if config.generate:
            write_pairs(config, preset)
        else:
            with lock_run_dir(config.run_dir, "" if config.resume else "gan.json"):
                train(config, preset)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"continue after the last finished epoch with --resume --run-dir {config.run_dir}") from None


if __name__ == "__main__":
    run_command(main, CONFIG, PRESET)
