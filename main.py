"""Trains CLIP: python main.py [PRESET] [--flags]. docs/runs.md lists the files that a run writes."""

import sys

from config import SHAPES, heads_config, parse_config, trains_heads_first
from utils.errors import UserError, at_sigterm, exit_terminated, run_command, to_user_error

if __name__ == "__main__":  # first, as what is imported below takes seconds to load
    CONFIG, PRESET = run_command(parse_config, sys.argv[1:])

import contextlib
import math
import os
import shlex
import threading
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else DistributedDataParallel warns that all weights are used

import torch

from clip import load_weights, save_weights, settings_of_model
from Datasets import flickr8k
from encoders.stages import unfreeze_from
from training import distributed
from training.adapters import add_adapters, describe_adapters, merge_adapters
from training.checkpoint import (
    TRADEOFF,
    has_checkpoint,
    lock_run_dir,
    refuse_other_settings,
    save_settings,
    start_run,
)
from training.data import fetch_data, fit_batch, load_splits, read_table, train_loader
from training.feature_cache import activation_bytes, freeze_encoders
from training.keeping import check_kept, keep_best_mixture, kept_score, score_start
from training.optimization import is_stale
from training.plan import print_plan, warn_of_memory
from training.report import draw_generated_pictures, history_row, print_epoch, print_setup, validate, write_report
from training.state import create_state
from training.steps import train_epoch
from training.stream import open_stream, stream_files
from training.trackers import Trackers, load_package
from training.trial import create_tried_model
from utils.cache import cache_line, note_use
from utils.device import make_deterministic, pick_device, pick_dtype, speed_up_cpu
from utils.files import remove_leftovers


def train(config):
    """A whole run: reads the data, trains, writes the run folder. Returns the model of the best epoch."""
    (device, dtype), run_dir = set_up(config), Path(config.run_dir)
    with distributed.main_process_first():
        table, image_dir, skipped = read_table(config)
        stream = open_stream(config)
    model = create_tried_model(config, stream.captions if stream else table["caption"][table["split"] == "train"])
    config = settings_of_model(config, model)
    if config.image_unfreeze_from:
        unfreeze_from(model.image_encoder, config.image_unfreeze_from)
    with distributed.main_process_first():
        bytes_to_come = activation_bytes(config, model.image_encoder, table, dtype)
        splits, bad = load_splits(config, table, image_dir, model, bytes_to_come, stream)
    config = fit_batch(config, splits["train"].num_real, image_dir)
    print_setup(config, model, splits, image_dir, len(skipped) + len(bad), device, dtype)
    with distributed.main_process_first():  # the other processes wait until an earlier run's folder is renamed
        if config.resume == "no":
            start_run(config, model, table, skipped + bad + (stream.index.problems if stream else []))

    if trains_heads_first(config) and (config.resume == "no" or not has_checkpoint(run_dir)):
        print("heads first: only the projection heads are trained, on features from the two frozen encoders")
        model.load_state_dict(train(heads_config(config, splits["train"].num_real)).state_dict())
        if distributed.is_main_process():
            save_weights(model, run_dir)  # the best so far; fine-tuning may not improve on it
    model.to(device, memory_format=torch.channels_last)
    with distributed.main_process_first():
        for path in (splits["val"].pictures.dataset.folder, table.attrs["contents"], *stream_files(config, stream, image_dir)):
            note_use(run_dir, path)
        freeze_encoders(config, model, splits, image_dir, device, dtype)
    distributed.broadcast_weights(model)
    start = score_start(config, model, splits, device, dtype)
    if config.lora_rank:
        add_adapters(model, config.lora_rank)
        print(describe_adapters(model, config.lora_rank))
    if config.model:
        warn_of_memory(config, model, table, device, dtype)

    state, trackers = create_state(config, model, splits, device, dtype), Trackers(config)
    if config.resume != "no" and has_checkpoint(run_dir):
        state.restore()
        save_settings(config, model, table)
        print(f"going on after epoch {len(state.history)}, step {len(state.losses)} of the next")
    distributed.require_same_run_dir(run_dir, len(state.history))
    loader, resumed = train_loader(config, model, splits["train"], device), len(state.history)
    train_epochs(state, loader, splits["val"], start, trackers, device, dtype)

    merge_adapters(model)
    with distributed.main_process_first():
        load_weights(model, run_dir)
    if config.wise_ft and not (len(state.history) == resumed and (run_dir / TRADEOFF).exists()):
        keep_best_mixture(model, start, splits["val"], config, device, dtype)
    write_report(state, splits, start, device, dtype)
    trackers.finish(run_dir, len(state.history))
    return model


def train_epochs(state, loader, validation, start, trackers, device, dtype):
    """The epochs that are left, each scored and saved. start: a `keeping.Start`, which the best epoch has to beat."""
    config = state.config
    steps = loader.batch_sampler.steps
    epochs = config.epochs
    if config.steps:
        epochs = len(state.history) + math.ceil((config.steps - state.steps_before(steps)) / steps)
    terminated = threading.Event()
    with at_sigterm(terminated.set):  # training ends after the step, when the state is whole
        while len(state.history) < epochs:
            if is_stale(state.rsums, start.rsum, config.early_stop):
                print(f"stopped early: {config.early_stop} epochs without a better rsum")
                break
            started = time.perf_counter()
            trained = train_epoch(state, loader, device, dtype, terminated)
            scored = state.scored_model
            scores, kept = validate(scored, validation, config, device, dtype), kept_score(scored, config, device, dtype)
            best = scores["rsum"] > max([start.rsum, *state.rsums])
            state.end_epoch(history_row(state, trained, scores, kept, time.perf_counter() - started))
            if state.joint:
                draw_generated_pictures(state, validation, device, dtype)
            state.save_epoch(best)
            print_epoch(state.history[-1], scores, epochs, best)
            trackers.log(state.history[-1], config)


def set_up(config):
    """Picks device and precision, seeds, and refuses what a resumed run may not change. Returns (device, dtype)."""
    speed_up_cpu()
    if config.deterministic:
        make_deterministic()
    device = pick_device(config.device)
    refuse_other_settings(config)
    for name in config.report_to:
        load_package(name)  # one that is missing is named before anything is decoded
    check_kept(config)
    if distributed.is_main_process():
        remove_leftovers(config.cache_dir)
    torch.manual_seed(config.seed)
    return device, pick_dtype(config.precision, device)


def main(config, preset):
    """What `python main.py` does; the arguments are what `config.parse_config` returns."""
    flickr8k_dir = flickr8k.find()
    config = replace(config, device=distributed.init_distributed(config.device))
    pick_device(config.device)  # one that is missing is named before anything is drawn or downloaded
    if distributed.size() > config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: fewer than the {distributed.size()} processes of torchrun")
    if distributed.size() > 1 and config.gan == "joint":
        raise UserError("--gan joint: trains in one process; start it with python instead of torchrun")
    sample = preset == "shapes" and config.data_dir == SHAPES.data_dir
    reason = f" (no Flickr8k in {', '.join(flickr8k.PLACES)})" if sample and not flickr8k_dir else ""
    print(f"preset {preset}{reason}", flush=True)
    gpus = torch.cuda.device_count()
    if gpus > 1 and distributed.size() == 1 and config.device in ("auto", "cuda") and config.gan == "none":
        words = shlex.join(sys.argv[1:])
        print(f"one of {gpus} GPUs is used; all: torchrun --nproc-per-node {gpus} main.py {words}", flush=True)
    if config.dry_run:
        check_kept(config)
        return print_plan(config, flickr8k_dir)
    try:
        marker = "config.json" if config.resume == "no" else ""
        locked = contextlib.nullcontext() if distributed.rank() else lock_run_dir(config.run_dir, marker)
        with at_sigterm(exit_terminated), locked:
            with distributed.main_process_first():
                config = fetch_data(config, flickr8k_dir)
            train(config)
            distributed.destroy_distributed()
        print(cache_line(config.cache_dir))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"what was trained is in {config.run_dir}; --resume --run-dir {config.run_dir} goes on"
        ) from None
    except RuntimeError as error:
        raise to_user_error(error, config) from None


if __name__ == "__main__":
    run_command(main, CONFIG, PRESET)
