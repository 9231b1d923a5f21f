"""Trains CLIP: python main.py [PRESET] [--flags]. What a run leaves in its folder is listed in the README."""

import contextlib
import math
import shlex
import sys
import textwrap
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Subset
from tqdm import tqdm

import distributed
import gradient_cache
from captions import is_sided, load_captions, load_generated
from card import write_card
from checkpoint import (
    PREVIOUS,
    best_rsum,
    has_checkpoint,
    load_last,
    only_run_in,
    save_last,
    save_settings,
    start_run,
    write_history,
)
from clip import MAX_LOGIT_SCALE, create_model, load_weights, loss_over_captions, save_weights
from config import SHAPES, fill_in, generated_a_batch, is_openai, load_run, parse_config, refuse_changes
from dataset import CLIPDataset, PairSampler, decode_images, train_loader
from Datasets import flickr8k, shapes
from device import autocast, be_deterministic, pick_device, pick_dtype, speed_up_cpu
from embedding import image_features, project, text_features, token_ids
from evaluate import positions_of_images, recall_table, score
from faults import at_sigterm, explain, leave_at_once
from frozen import bytes_of_activations, freeze_towers
from joint import Joint
from plots import draw_curves, draw_grid, draw_matches, draw_similarity
from storage import UserError, key_of, key_of_tensors, remove_unfinished, run_command
from utils.cache import cache_line, note_use

CHECK_EVERY = 20  # steps between looks at the loss, each of which waits for the device
MIN_LOSS_SCALE = 1.0  # the fp16 scaler begins at 65,536 and halves it at each step that it leaves out
SHOWN_QUERIES, SHOWN_MATCHES, SHOWN_PAIRS = 5, 6, 8  # in matches.png and similarity.png
SHOWN_GENERATED = 16  # in generated.png


# ---- learning rates: pure functions of the step and of past validation scores -------------------------------------


def plateau_factor(rsums, patience, factor):
    """What the rates are multiplied by after epochs with these rsums, as torch's ReduceLROnPlateau would have it."""
    best, waited, product = -math.inf, 0, 1.0
    for rsum in rsums:
        waited = 0 if rsum > best else waited + 1
        best = max(best, rsum)
        if waited > patience:
            product, waited = product * factor, 0
    return product


def rate_factor(step, steps, config, rsums):
    """The share of the peak rates at a step of `steps`: a linear rise, then half a cosine, or the plateau's factor."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "plateau":
        return plateau_factor(rsums, config.patience, config.factor)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parameter_groups(model, config):
    """AdamW's groups: a rate for each encoder and one for the heads; decay on weight matrices only.

    Which parameters stand together does not depend on the rates: a resumed run may change them.
    """
    rates = {"image_encoder": config.image_encoder_lr, "text_encoder": config.text_encoder_lr, "heads": config.head_lr}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = name.split(".")[0]
            groups.setdefault((part if part in rates else "heads", parameter.ndim > 1), []).append(parameter)
    return [
        {"params": params, "peak": rates[part], "lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0}
        for (part, decays), params in groups.items()
    ]


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """A split: n images and their m captions, as the towers take them or, for a frozen tower, as it leaves them."""

    names: list  # n file names
    pictures: Subset  # n decoded pictures
    captions: list  # m strings
    image_of_text: np.ndarray  # (m,) position of each caption's image
    images: Subset | torch.Tensor  # n decoded pictures, or (n, views, ...) activations or features of crops of them
    texts: list | torch.Tensor  # m lists of token ids, or (m, d_t) features
    sources: list = field(default_factory=list)  # for each generated image, which come last, the real ones of its caption


def sources_of(pairs, generated):
    """For each generated image of a split, the set of positions of the real images that have its caption."""
    captions = [set() for _ in pairs.names]
    images = defaultdict(set)
    for caption, image in zip(pairs.captions, pairs.image_of_text):
        captions[image].add(caption)
        images[caption].add(image)
    real = sum(name not in generated for name in pairs.names)
    return [{i for caption in own for i in images[caption] if i < real} for own in captions[real:]]


def read_pairs(config, table, image_dir, model, generated, dtype):
    """Decodes the pictures of a table once. Returns ({"train": Pairs, "val": Pairs}, lines on pictures left out).

    generated: the names of those, last in the table, that are generated.
    """
    names, _ = positions_of_images(table)
    paths = [image_dir / name for name in names]
    counts = [table["image"][table["split"] == split].nunique() for split in ("train", "val")]
    to_come = bytes_of_activations(config, model.image_encoder, *counts, dtype)
    size = model.image_encoder.size
    pictures, bad = decode_images(paths, size, config.cache_dir, config.num_workers, config.skip_bad, to_come)
    position = {name: i for i, name in enumerate(names) if i not in bad}
    splits = {}
    for split in ("train", "val"):
        rows = table[(table["split"] == split) & table["image"].isin(position)]
        names, image_of_text = positions_of_images(rows)
        chosen = Subset(pictures, [position[name] for name in names])
        texts = token_ids(model.tokenizer, rows["caption"]) if len(rows) else []
        splits[split] = Pairs(names, chosen, list(rows["caption"]), image_of_text, chosen, texts)
    splits["train"].sources = sources_of(splits["train"], generated)
    count = len(splits["train"].names) - len(splits["train"].sources)
    if count < config.batch_size - (generated_a_batch(config) if generated else 0):
        raise UserError(f"--batch-size {config.batch_size}: there are only {count} training images in {image_dir}; lower it")
    if not splits["val"].names:
        raise UserError(f"{image_dir}: none of its validation images can be decoded")
    return splits, list(bad.values())


# ---- the run -----------------------------------------------------------------------------------------------------------


def train_epoch(model, loader, sampler, optimizer, scaler, device, dtype, rates, desc, joint=None, losses=(), after_step=None):
    """One pass over the training images; returns the mean loss and how many steps were left out. rates: each step's factor.

    joint: a `joint.Joint` to be trained too. losses: of the steps that were taken before. after_step: is called with the
    losses of all steps after each.
    In fp16 a step whose gradients are not finite is left out, as the scaler means it, and its losses are NaN.
    Raises UserError at a loss that is not finite; in fp16 where one step after the other is left out.
    """
    model.train()
    for tower in (model.image_encoder, model.text_encoder):
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()  # BatchNorm statistics and dropout of a frozen tower stay still
    losses, sampler.start = [loss.to(device) for loss in losses], len(losses)
    batches = iter(loader)
    progress = tqdm(range(sampler.start, sampler.steps), desc=desc, leave=False, disable=None)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rates[step]
        optimizer.zero_grad(set_to_none=True)
        seeds = np.random.default_rng([sampler.seed, sampler.epoch, step]).integers(2**31, size=sampler.parts).tolist()
        if sampler.parts > 1:
            own = [seeds[part] for part in sampler.own]
            total = loss = gradient_cache.backward(model, batches, own, device, dtype, scaler)
            distributed.sum_gradients(model)
            distributed.average_statistics(model)
        else:
            torch.manual_seed(seeds[0])  # the state of dropout then needs no saving
            batch = next(batches).values()
            image, text, mask = (None if value is None else value.to(device, non_blocking=True) for value in batch)
            adversarial = 0.0
            if joint:
                image, adversarial = joint.replace(model, image, text, mask, scaler)
            with autocast(device, dtype):
                logits, _ = model(image, text, mask)
            loss = loss_over_captions(logits.float())
            total = loss + adversarial
            scaler.scale(total).backward()
        scale = scaler.get_scale()  # 1 unless in fp16
        scaler.step(optimizer)
        scaler.update()
        left_out = scaler.get_scale() < scale
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        losses.append(torch.stack([loss, total]).detach() * (math.nan if left_out else 1.0))
        if step % CHECK_EVERY == 0 or step == sampler.steps - 1 or left_out:
            recent = torch.stack(losses[-CHECK_EVERY:])
            broken = scaler.get_scale() < MIN_LOSS_SCALE if scaler.is_enabled() else not recent.isfinite().all()
            if broken:
                what = "in fp16 the gradient of one step after the other" if scaler.is_enabled() else "the loss"
                raise UserError(
                    f"{desc}, step {step + 1}: {what} is not finite; the last good checkpoint is kept, go on from it with "
                    "--resume and lower rates (--head-lr, --image-encoder-lr, --text-encoder-lr)"
                )
            progress.set_postfix(loss=f"{recent[:, 0].nanmean():.3f}")
        if after_step:
            after_step(losses)
    losses = torch.stack(losses)[:, 0]
    return losses.nanmean().item(), int(losses.isnan().sum())


def features(model, pairs, device, dtype):
    """(I_f, T_f) of a split, (n, d_i) and (m, d_t); those of towers that train are computed anew."""
    I_f, T_f = pairs.images[:, 0] if torch.is_tensor(pairs.images) else pairs.images, pairs.texts
    if not (torch.is_tensor(I_f) and I_f.ndim == 2):
        own = distributed.share(len(I_f))
        pictures = I_f[own.start : own.stop] if torch.is_tensor(I_f) else Subset(I_f, own)
        I_f = distributed.gather(image_features(model, pictures, device, dtype, len(own)))
    if not torch.is_tensor(T_f):
        own = distributed.share(len(T_f))
        T_f = distributed.gather(text_features(model, T_f[own.start : own.stop], device, dtype))
    if not (I_f.isfinite().all() and T_f.isfinite().all()):
        raise UserError("a tower's features are not finite; the last good checkpoint is kept, --resume with lower rates")
    return I_f, T_f


def train(config):
    """Runs a Config from captions file to run folder, and returns the model at its best epoch."""
    speed_up_cpu()
    if config.deterministic:
        be_deterministic()
    run_dir, device, writes = Path(config.run_dir), pick_device(config.device), distributed.rank() == 0
    dtype = pick_dtype(config.precision, device)
    if config.resume != "no" and (run_dir / "config.json").exists():
        refuse_changes(config, load_run(run_dir)["config"])
    if writes:
        remove_unfinished(config.cache_dir)
    torch.manual_seed(config.seed)

    whole_table, image_dir, skipped = load_captions(config.data_dir, config.image_path, config.captions_path, config.skip_bad)
    table = whole_table[whole_table["split"].isin(["train", "val"])]
    for split, ending in (("train", "train"), ("val", "dev")):
        if split not in set(table["split"]):
            raise UserError(
                f"{image_dir}: none of its images is in the {split} split; write their names into a file that ends in "
                f"{ending}Images.txt, or take more images"
            )
    model = create_model(config, table["caption"][table["split"] == "train"])
    generated = frozenset()
    if config.extra_data:
        pairs = load_generated(config.extra_data, table)
        table, generated = pd.concat([table, pairs], ignore_index=True), frozenset(pairs["image"])
    if config.train_image_from:
        model.image_encoder.train_from(config.train_image_from)
    with distributed.first_alone():
        splits, bad = read_pairs(config, table, image_dir, model, generated, dtype)
    training, validation = splits["train"], splits["val"]
    counts = [f"{len(pairs.names):,} {name} images ({len(pairs.captions):,} captions)" for name, pairs in splits.items()]
    print(f"{' and '.join(counts)} from {image_dir}; left out: {len(skipped) + len(bad)}")
    if generated:
        extra = generated_a_batch(config)
        print(f"of the train images {len(training.sources):,} are generated, {extra} in each batch of {config.batch_size}")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{config.image_encoder} at {model.image_encoder.size} px, {config.text_encoder}, {millions:.1f} million parameters")
    print(f"freeze {config.freeze}, pooling {model.text_encoder.pooling}, {device}, {str(dtype).removeprefix('torch.')}")

    with distributed.first_alone():  # the others see no earlier run
        if config.resume == "no" and writes:
            start_run(config, model, whole_table, skipped + bad)
    new_heads = "random" not in (config.image_weights, config.text_weights) and not is_openai(config)
    if config.heads_first and new_heads and config.freeze != "both" and not has_checkpoint(run_dir):
        begun = config.resume if (run_dir / "heads" / "config.json").exists() else "no"
        print("heads first, on features of the towers held still")
        still = replace(config, freeze="both", gan="none", train_image_from="", run_dir=str(run_dir / "heads"), resume=begun)
        still = replace(still, cached_views=1, mirror=False, captions_per_image=1, micro_batch_size=0)
        still = fill_in(replace(still, epochs=0, batch_size=0, head_lr=0))
        still = replace(still, batch_size=min(still.batch_size, len(training.names)))
        model.load_state_dict(train(still).state_dict())
        if writes:
            save_weights(model, run_dir)  # the best so far, should fine-tuning not improve on it
    start_rsum = best_rsum(run_dir / "heads")

    model.to(device, memory_format=torch.channels_last)
    with distributed.first_alone():
        note_use(run_dir, training.pictures.dataset.folder)
        freeze_towers(config, model, splits, image_dir, device, dtype)
    distributed.start_alike(model)
    average = None
    if config.ema_decay:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    scored = average.module if average else model
    if not config.micro_batch_size:
        distributed.share_statistics(model)
    if config.compile:
        model.image_encoder.compile()
        model.text_encoder.tower.compile(dynamic=True)  # not the buckets around it, whose lengths a graph cannot know
    joint, groups = None, parameter_groups(model, config)
    if config.gan == "joint":
        joint = Joint(config.projection_dim, generated_a_batch(config), config.gan_weight, device, dtype)
        groups.append(joint.parameter_group)
    optimizer = torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    keys = {"data": key_of(*((pairs.names, pairs.captions) for pairs in splits.values()))}
    keys["frozen"] = key_of_tensors({name: value for name, value in model.named_parameters() if not value.requires_grad})
    save = partial(save_last, run_dir, model, optimizer, scaler, keys=keys, config=config, average=average, joint=joint)
    history, losses = [], []
    if config.resume != "no" and has_checkpoint(run_dir):
        history, losses = load_last(run_dir, model, optimizer, scaler, keys, config, average, joint)
        if writes:  # with new rates, say, or another place of the pictures
            save_settings(config, model, whole_table)
        print(f"going on after epoch {len(history)}, step {len(losses)} of the next")
    if len(set(distributed.counts(len(history)))) > 1:
        raise UserError(f"--run-dir {run_dir}: not the same folder for all processes; put it on a disk that all machines share")

    captions_of = np.split(np.argsort(training.image_of_text, kind="stable"), np.bincount(training.image_of_text).cumsum()[:-1])
    extra = generated_a_batch(config) if generated else 0
    ranks = distributed.rank(), distributed.size()
    args = captions_of, config.batch_size, config.seed, config.micro_batch_size, training.sources, extra, ranks
    sampler = PairSampler(*args, config.captions_per_image)
    sided = list(map(is_sided, training.captions)) if config.mirror else None
    dataset = CLIPDataset(training.images, training.texts, model.image_encoder.size, config.crop, sided)
    loader = train_loader(dataset, sampler, model.tokenizer.padding["pad_id"], config.num_workers, device.type == "cuda")
    steps, width = config.epochs * sampler.steps, len(str(config.epochs))
    terminated = threading.Event()

    def after_step(losses):
        """Moves the average of the weights, and saves a checkpoint within the epoch where one is due, as SIGTERM makes it."""
        if average:
            average.update_parameters(model)
        if writes and (terminated.is_set() or config.save_every and len(losses) % config.save_every == 0):
            save(history, torch.stack(losses).cpu())
        if writes and terminated.is_set():
            print(f"terminated; --resume --run-dir {run_dir} goes on", file=sys.stderr)
            leave_at_once()

    with at_sigterm(terminated.set):  # it is looked at when a step has ended, and the state is whole
        for epoch in range(len(history), config.epochs):
            started = time.perf_counter()
            sampler.epoch = epoch
            rsums = [row["rsum"] for row in history]
            first = epoch * sampler.steps
            rates = [rate_factor(step, steps, config, rsums) for step in range(first, first + sampler.steps)]
            args = model, loader, sampler, optimizer, scaler, device, dtype, rates, f"epoch {epoch + 1}", joint
            loss, left_out = train_epoch(*args, losses, after_step)
            losses = []
            I_f, T_f = features(scored, validation, device, dtype)
            scores = score(scored, I_f, T_f, validation.image_of_text, device)
            row = {"epoch": epoch + 1, "loss": loss, "chance_loss": math.log(config.batch_size)}
            row |= {"temperature": math.exp(-model.logit_scale.item()), "rate_factor": rates[-1]}
            for direction in ("image_to_text", "text_to_image"):
                row |= {f"{direction}_{name}": value for name, value in scores[direction].items()}
            row |= {"steps_left_out": left_out, "rsum": scores["rsum"], "seconds": time.perf_counter() - started}
            history.append(row)
            best = row["rsum"] > max([start_rsum, *rsums])
            if joint:
                draw_generated(joint, scored, validation.captions, T_f, device, run_dir)
            if writes:
                if best:
                    save_weights(scored, run_dir)
                write_history(run_dir / "history.csv", history)
                save(history, losses)  # last: what a kill leaves unwritten is then written again
            recalls = [
                "/".join(f"{row[f'{direction}_R@{k}']:.1f}" for k in (1, 5, 10))
                for direction in ("image_to_text", "text_to_image")
            ]
            print(
                f"epoch {epoch + 1:{width}}/{config.epochs}  loss {loss:.3f} (chance {row['chance_loss']:.3f})  "
                f"temperature {row['temperature']:.3f}  image to text {recalls[0]}  text to image {recalls[1]}  "
                f"rsum {row['rsum']:.1f}{'*' if best else ' '} {row['seconds']:.1f} s"
                + (f"  left out: {left_out} steps whose gradients were not finite in fp16" if left_out else ""),
                flush=True,
            )

    with distributed.first_alone():  # it has written them
        load_weights(model, run_dir)
    I_f, T_f = features(model, validation, device, dtype)
    if writes:
        draw_curves(history, run_dir / "curves.png")
        draw_examples(model, validation, I_f, T_f, device, run_dir)
    best, chance = max(history, key=lambda row: row["rsum"]), 100 / len(validation.names)
    said = f"best epoch {best['epoch']}" if best["rsum"] > start_rsum else "best before fine-tuning, the heads alone"
    print(f"\n{said}, in {run_dir}; validation recall in percent (chance of R@1 from text to image: {chance:.2f}):")
    scores = score(model, I_f, T_f, validation.image_of_text, device)
    print(recall_table(scores))
    if writes:
        write_card(run_dir, config, model, splits, scores)
        (run_dir / PREVIOUS).unlink(missing_ok=True)  # for a run that ended well the last checkpoint is enough
    return model


def draw_generated(joint, model, captions, T_f, device, run_dir):
    """generated.png: what the generator draws for some of m captions, whose features are T_f, (m, d_t)."""
    rows = range(0, len(captions), max(1, len(captions) // SHOWN_GENERATED))[:SHOWN_GENERATED]
    pictures = joint.pictures(project(model.text_projection, T_f[list(rows)], device))
    titles = [textwrap.fill(captions[row], 34) for row in rows]
    draw_grid("generated for validation captions", pictures, titles, run_dir / "generated.png")


def draw_examples(model, pairs, I_f, T_f, device, run_dir):
    """similarity.png, some images against a caption of each; and matches.png, what captions find among all images."""
    images = np.arange(len(pairs.names))[:: max(1, len(pairs.names) // SHOWN_PAIRS)][:SHOWN_PAIRS]
    own = [np.flatnonzero(pairs.image_of_text == image) for image in images]
    rows = [captions[i % len(captions)] for i, captions in enumerate(own)]  # not always an image's first caption
    I_e = project(model.image_projection, I_f, device)
    T_e = project(model.text_projection, T_f[rows], device)
    similarity = (T_e @ I_e.T).numpy()  # (SHOWN_PAIRS, n) cosines
    captions = [pairs.captions[row] for row in rows]
    draw_similarity([pairs.pictures[i] for i in images], captions, similarity[:, images], run_dir / "similarity.png")
    searches = []
    for caption, cosines, image in list(zip(captions, similarity, images))[:SHOWN_QUERIES]:
        found = np.argsort(-cosines, kind="stable")[:SHOWN_MATCHES]
        right = int(np.flatnonzero(found == image)[0]) if image in found else None
        searches.append((caption, [pairs.pictures[i] for i in found], [f"{cosines[i]:.2f}" for i in found], right))
    draw_matches(searches, run_dir / "matches.png")


def with_data(config, flickr8k_dir):
    """The Config with the folder of its data, which is fetched or drawn first where that is asked for."""
    if not (config.data_dir or config.captions_path):
        if not (flickr8k_dir or config.download):
            raise UserError(f"no Flickr8k in {' or '.join(flickr8k.PLACES)}; pass --download, or {flickr8k.BY_HAND}")
        config = replace(config, data_dir=str(flickr8k_dir or flickr8k.download()))
    if config.data_dir == SHAPES.data_dir and not Path(config.data_dir).exists():
        print(f"drawing the sample into {config.data_dir}", flush=True)
        try:
            shapes.draw(config.data_dir)
        except OSError as error:
            raise UserError(f"{config.data_dir}: the sample cannot be drawn there ({error.strerror})") from None
    return config


def main():
    flickr8k_dir = flickr8k.find()
    config, preset = parse_config(sys.argv[1:], "flickr8k" if flickr8k_dir else "shapes")
    config = replace(config, device=distributed.join(config.device))
    if distributed.size() > config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: fewer than the {distributed.size()} processes of torchrun")
    if distributed.size() > 1 and config.gan == "joint":
        raise UserError("--gan joint: trains in one process; start it with python instead of torchrun")
    reason = f" (no Flickr8k in {', '.join(flickr8k.PLACES)})" if preset == "shapes" and not flickr8k_dir else ""
    print(f"preset {preset}{reason}", flush=True)
    gpus = torch.cuda.device_count()
    if gpus > 1 and distributed.size() == 1 and config.device in ("auto", "cuda") and config.gan == "none":
        words = shlex.join(sys.argv[1:])
        print(f"one of {gpus} GPUs is used; all: torchrun --nproc-per-node {gpus} main.py {words}", flush=True)
    try:
        with at_sigterm(leave_at_once), contextlib.nullcontext() if distributed.rank() else only_run_in(config.run_dir):
            with distributed.first_alone():
                config = with_data(config, flickr8k_dir)
            train(config)
            distributed.leave()
        print(cache_line(config.cache_dir))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what was trained is in {config.run_dir}; --resume --run-dir {config.run_dir} goes on"
        ) from None
    except RuntimeError as error:
        raise explain(error, config) from None


if __name__ == "__main__":
    run_command(main)
