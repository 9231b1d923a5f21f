"""One training in several processes, a GPU or some cores each: torchrun --nproc-per-node 2 main.py shapes.

Each process (a "rank") holds the whole model and a share of every batch. Embeddings travel between them, pictures do not:

    forward     each rank embeds its share of the batch, and all ranks get all embeddings
    loss        each rank has the rows of the (n, n) logits that its images and captions make, and no others (as in section
                2.5 of the CLIP paper)
    backward    the gradients of the embeddings are summed over the ranks; each carries those of its share on through its
                towers; the parameters' gradients are summed, and all take the same step

So the step is that of one process with the whole batch.
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

from storage import UserError

PATIENCE = datetime.timedelta(hours=2)  # with a rank that decodes pictures; one that dies is noticed at once


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def size():
    return dist.get_world_size() if dist.is_initialized() else 1


class NoTerminal(io.TextIOWrapper):
    """A stream on which no progress bars are drawn."""

    def isatty(self):
        return False


def join(device):
    """Joins the other processes that torchrun started, if it did; all but the first fall silent. Returns the device's name.

    device: of the command line; with CUDA each process on a machine takes a GPU of its own.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: there are only {torch.cuda.device_count()} GPUs here")
    if cuda:
        torch.cuda.set_device(local)
    store, own_rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
    # torchrun can keep the store when it starts all again, and the addresses in it are then of processes that are gone.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"  # features that were computed before lie on the CPU
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=own_rank, world_size=world_size)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
        sys.stderr = NoTerminal(sys.stderr.buffer, line_buffering=True)
    return f"cuda:{local}" if cuda else device


def leave():
    """Leaves the other processes, once all have come so far."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def first_alone():
    """The first rank goes through this block before the others, which then find on disk what it left there."""
    if rank():
        dist.barrier()
    yield
    if size() > 1 and not rank():
        dist.barrier()


def share(n):
    """The rows of n that are this rank's: a range; shares differ by one row at most."""
    bounds = np.linspace(0, n, size() + 1).round().astype(int)
    return range(bounds[rank()], bounds[rank() + 1])


def counts(own):
    """The number that each rank gives, in their order."""
    found = [own] * size()
    if size() > 1:
        dist.all_gather_object(found, own)
    return found


def gather(rows):
    """The rows of all ranks, (n, ...), from those of each, of which one may have more than another. Without gradient."""
    if size() == 1:
        return rows
    of_ranks = counts(len(rows))
    filled = torch.zeros(max(of_ranks), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    filled[: len(rows)] = rows
    found = [torch.empty_like(filled) for _ in of_ranks]
    dist.all_gather(found, filled)
    return torch.cat([rows[:count] for rows, count in zip(found, of_ranks)])


def start_alike(model):
    """Gives all ranks the first one's weights."""
    if size() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def sum_gradients(model):
    """Sums each parameter's .grad over the ranks."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if size() > 1 and gradients:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def average_statistics(model):
    """Gives all ranks the mean of their BatchNorm layers' running statistics."""
    if size() > 1:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.training:
                for statistic in (layer.running_mean, layer.running_var):
                    statistic.copy_(summed(statistic) / size())


def summed(value):
    """The sum of a tensor over the ranks. Without gradient."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


# ---- BatchNorm over all ranks ------------------------------------------------------------------------------------


def share_statistics(model):
    """Lets BatchNorm layers that learn their statistics take them from the batch of all ranks.

    torch's own SyncBatchNorm is for CUDA only.
    """
    if size() > 1:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.__class__ = type(f"Shared{type(module).__name__}", (SharedStatistics, type(module)), {})


class SharedStatistics:
    """Goes before a BatchNorm2d class, also before timm's with an activation after it."""

    def forward(self, x):
        if not (self.training and self.track_running_stats):
            return super().forward(x)
        out, mean, variance, count = NormaliseOverRanks.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        return self.act(self.drop(out)) if hasattr(self, "act") else out


class NormaliseOverRanks(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over the pixels of all ranks; (n, c, h, w) and c channels.

    Written out, with one exchange in each direction: autograd's own way through the means is three times as slow on a CPU.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        values, pixels = x.float(), (0, 2, 3)
        count = torch.tensor([x.numel() / x.shape[1]], device=x.device)
        sums = summed(torch.cat([values.sum(pixels), values.square().sum(pixels), count]))
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
        # Of mean and variance each pixel is a count-th part: what all pixels ask of them is taken off its gradient.
        off_bias, off_weight = (summed(torch.cat([bias_gradient, weight_gradient])) / count).chunk(2)
        constant, slope = mean * scale * off_weight - off_bias, -scale * off_weight
        inner = torch.addcmul(gradient + constant[:, None, None], values, slope[:, None, None])
        return (inner * (weight * scale)[:, None, None]).to(x.dtype), weight_gradient, bias_gradient, None
