"""Training in several processes, each with a GPU or some CPU cores: torchrun --nproc-per-node 2 main.py shapes.

Each process (a "rank"; rank 0 is the main process) holds the whole model and a shard of every batch. Ranks exchange
embeddings, not pictures:

    forward     each rank embeds its shard of the batch; all ranks gather all embeddings
    loss        each rank computes only those rows of the (n, n) logits that belong to its images and captions (section 2.5
                of the CLIP paper)
    backward    the gradients of the embeddings are summed over the ranks; each rank backpropagates those of its shard
                through the encoders; the parameters' gradients are summed, and all ranks take the same optimizer step

The result is the step of one process with the whole batch.
"""

import contextlib
import datetime
import io
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError

TIMEOUT = datetime.timedelta(hours=2)  # others wait while one rank decodes pictures; a rank that dies is noticed at once


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process():
    """True in the one process that writes files; in all that there are where training runs in one process."""
    return rank() == 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


class NoTerminal(io.TextIOWrapper):
    """A stream on which no progress bars are drawn."""

    def isatty(self):
        return False


def init_distributed(device):
    """Initialises torch.distributed under torchrun; only the main process prints from then on. Returns the device's name.

    device: of the command line; with CUDA each process on a machine takes its own GPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: there are only {torch.cuda.device_count()} GPUs here")
    if cuda:
        torch.cuda.set_device(local_rank)
    store, global_rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # After a restart torchrun may reuse the store, which still holds the addresses of processes that have ended.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # cached features are on the CPU
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=global_rank, world_size=world_size)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends
        sys.stderr = NoTerminal(sys.stderr.buffer, line_buffering=True)
    return f"cuda:{local_rank}" if cuda else device


def destroy_distributed():
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def main_process_first():
    """The main process runs this block before the others, which then find its files on disk."""
    if rank():
        dist.barrier()
    yield
    if size() > 1 and not rank():
        dist.barrier()


def shard(n):
    """This rank's rows of n, a range; shards differ by one row at most."""
    bounds = np.linspace(0, n, size() + 1).round().astype(int)
    return range(bounds[rank()], bounds[rank() + 1])


def gather_counts(count):
    """The counts that all ranks pass, in rank order."""
    counts = [count] * size()
    if size() > 1:
        dist.all_gather_object(counts, count)
    return counts


def require_same_run_dir(run_dir, epochs):
    """Raises UserError where processes read different numbers of finished epochs: their run folders are then different."""
    if len(set(gather_counts(epochs))) > 1:
        raise UserError(f"--run-dir {run_dir}: not the same folder for all processes; put it on a disk that all machines share")


def all_gather(rows):
    """All ranks' rows, concatenated: (n, ...). Ranks may have different numbers of rows. Without gradient."""
    if size() == 1:
        return rows
    counts = gather_counts(len(rows))
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:count] for rows, count in zip(gathered, counts)])


def broadcast_parameters(model):
    """Copies the main process's weights to all ranks."""
    if size() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def all_reduce_gradients(model):
    """Sums each parameter's .grad over the ranks."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if size() > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def average_batch_norm_statistics(model):
    """Averages the BatchNorm layers' running statistics over the ranks."""
    if size() > 1:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.training:
                for statistic in (layer.running_mean, layer.running_var):
                    statistic.copy_(all_reduce_sum(statistic) / size())


def all_reduce_sum(value):
    """The sum of a tensor over the ranks. Without gradient."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


# ---- BatchNorm over all ranks ------------------------------------------------------------------------------------


def synchronize_batch_norm(model):
    """Makes trainable BatchNorm layers compute their statistics over the batch of all ranks.

    torch's SyncBatchNorm is for CUDA only.
    """
    if size() > 1:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.__class__ = type(f"Shared{type(module).__name__}", (SynchronizedBatchNorm, type(module)), {})


class SynchronizedBatchNorm:
    """A mixin for BatchNorm2d and for timm's subclass of it, which applies an activation afterwards."""

    def forward(self, x):
        if not (self.training and self.track_running_stats):
            return super().forward(x)
        out, mean, variance, count = NormalizeOverRanks.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return self.act(self.drop(out)) if hasattr(self, "act") else out


class NormalizeOverRanks(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the pixels of all ranks; (n, c, h, w) and c channels.

    Its backward pass is written by hand, with one all-reduce: autograd through the means is three times as slow on a CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        values, pixels = x.float(), (0, 2, 3)
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        sums = all_reduce_sum(torch.cat([values.sum(pixels), values.square().sum(pixels), count]))
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        variance = (square - mean.square()).clamp(min=0)
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        out = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        values, gradient, pixels = x.float(), gradient.float(), (0, 2, 3)
        bias_gradient = gradient.sum(pixels)
        weight_gradient = ((gradient * values).sum(pixels) - mean * bias_gradient) * scale
        # Each pixel contributes 1 / count to mean and variance, so the mean over all pixels is subtracted from its gradient.
        mean_bias, mean_weight = (all_reduce_sum(torch.cat([bias_gradient, weight_gradient])) / count).chunk(2)
        constant, slope = mean * scale * mean_weight - mean_bias, -scale * mean_weight
        inner = torch.addcmul(gradient + constant[:, None, None], values, slope[:, None, None])
        return (inner * (weight * scale)[:, None, None]).to(x.dtype), weight_gradient, bias_gradient, None
