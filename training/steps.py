"""One epoch of training, and its two kinds of steps: a plain one, and one for micro-batches or several processes."""

import math
import sys

import numpy as np
import torch
from tqdm import tqdm

from clip import MAX_LOGIT_SCALE, loss_over_captions
from training import distributed, gradient_cache
from training.losses import CLIP
from training.optimization import lr_scale
from utils.device import autocast
from utils.errors import UserError, exit_terminated

CHECK_EVERY = 20  # steps between checks of the loss, each of which waits for the device
MIN_LOSS_SCALE = 1.0  # the fp16 scaler starts at 65,536 and halves its scale at each skipped step


def train_epoch(state, loader, device, dtype, terminated):
    """One pass over the training images, from the step after those in state.losses.

    loader: over the batches of a `PairSampler`. terminated: a threading.Event; once it is set, the process ends after a step.
    Returns {"loss": mean of the epoch, "lr_scale": at the last step, "skipped_steps": how many steps fp16's scaler skipped
    because their gradients were not finite}.
    Raises UserError at a loss that is not finite; in fp16, where too many steps in a row are skipped.
    """
    model, sampler = state.model, loader.batch_sampler
    set_train_mode(model)
    state.losses = [losses.to(device) for losses in state.losses]
    sampler.epoch, sampler.start = len(state.history), len(state.losses)
    done, total = state.steps_before(sampler.steps), state.config.steps or state.config.epochs * sampler.steps
    steps = min(sampler.steps, total - done)  # the last epoch of --steps may be shorter
    scales = [lr_scale(done + step, total, state.config, state.rsums) for step in range(steps)]
    desc, batches = f"epoch {sampler.epoch + 1}", iter(loader)
    progress = tqdm(range(sampler.start, steps), desc=desc, leave=False, disable=None)
    for step in progress:
        for group in state.optimizer.param_groups:
            group["lr"] = group["base_lr"] * scales[step]
        state.optimizer.zero_grad(set_to_none=True)
        seeds = np.random.default_rng([sampler.seed, sampler.epoch, step]).integers(2**31, size=sampler.parts).tolist()
        if sampler.parts > 1 or state.objective != CLIP:
            losses = gradient_cached_step(state, batches, [seeds[part] for part in sampler.local_parts], device, dtype)
        else:
            losses = plain_step(state, next(batches), seeds[0], device, dtype)
        skipped = update_weights(state)
        state.losses.append(losses * (math.nan if skipped else 1.0))
        if step % CHECK_EVERY == 0 or step == steps - 1 or skipped:
            recent = torch.stack(state.losses[-CHECK_EVERY:])
            refuse_infinite_loss(recent, state.scaler, f"{desc}, step {step + 1}")
            progress.set_postfix(loss=f"{recent[:, 0].nanmean():.3f}")
        save_within_epoch(state, terminated)
    state.average_batch_norm_statistics()
    losses = torch.stack(state.losses)[:, 0]
    return {"loss": losses.nanmean().item(), "lr_scale": scales[-1], "skipped_steps": int(losses.isnan().sum())}


def set_train_mode(model):
    """Train mode, except for frozen encoders: their BatchNorm statistics are fixed and their dropout is off."""
    model.train()
    for encoder in (model.image_encoder, model.text_encoder):
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()


def plain_step(state, batch, seed, device, dtype):
    """Forward, loss, backward. Returns (2,): CLIP's loss, and the total with the generator's. seed: of dropout."""
    torch.manual_seed(seed)  # so the random state need not be saved
    batch, generator_loss = to_device(batch, device), 0.0
    if state.joint:
        batch, generator_loss = state.joint.insert_generated(state.model, batch, state.scaler)
    with autocast(device, dtype):
        I_f, T_f = state.model.features(batch)
        logits = state.model.logits(I_f, T_f)
    loss = loss_over_captions(logits)
    total = loss + generator_loss
    state.scaler.scale(total).backward()
    return torch.stack([loss, total]).detach()


def gradient_cached_step(state, batches, seeds, device, dtype):
    """As `plain_step`, in micro-batches or several processes, with the gradient of the whole batch; and for other losses."""
    model, embedder = state.model, state.embedder
    loss = gradient_cache.backward(model, embedder, batches, seeds, device, dtype, state.scaler, state.objective)
    return torch.stack([loss, loss]).detach()


def to_device(batch, device):
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def update_weights(state):
    """Takes the optimizer's step. Returns True where fp16's scaler skipped it."""
    scale = state.scaler.get_scale()  # 1 unless in fp16
    state.scaler.step(state.optimizer)
    state.scaler.update()
    if state.config.loss != "sigmoid":  # SigLIP's pretrained scales are larger
        with torch.no_grad():
            state.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    if state.average:
        state.average.update_parameters(state.model)
    return state.scaler.get_scale() < scale


def refuse_infinite_loss(recent, scaler, where):
    """Raises UserError where a recent loss, (steps, 2), is not finite; in fp16, where too many steps in a row are skipped."""
    broken = scaler.get_scale() < MIN_LOSS_SCALE if scaler.is_enabled() else not recent.isfinite().all()
    if broken:
        what = "in fp16 the gradient of too many steps in a row" if scaler.is_enabled() else "the loss"
        raise UserError(
            f"{where}: {what} is not finite; the last good checkpoint is kept; continue from it with "
            "--resume and lower learning rates (--head-lr, --image-encoder-lr, --text-encoder-lr)"
        )


def save_within_epoch(state, terminated):
    """Saves a checkpoint if one is due; after SIGTERM saves one in any case and ends the process, and all ranks with it."""
    due = state.config.save_every and len(state.losses) % state.config.save_every == 0
    ends = distributed.any_rank(terminated.is_set())
    if due or ends:
        state.average_batch_norm_statistics()
        state.save()
    if ends:
        if distributed.is_main_process():
            print(f"terminated; continue with --resume --run-dir {state.config.run_dir}", file=sys.stderr)
        exit_terminated()
