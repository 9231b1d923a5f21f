"""Training in several processes, each with a GPU or some CPU cores: torchrun --nproc-per-node 2 main.py shapes.

Each process (a "rank"; rank 0 is the main process) holds the whole model and a shard of every batch. Ranks exchange
embeddings, not pictures:

    forward     each rank embeds its shard of the batch; all ranks gather all embeddings
    loss        each rank computes only those rows of the (n, n) logits that belong to its images and captions (section 2.5
                of the CLIP paper)
    backward    the gradients of the embeddings are summed over the ranks; each rank backpropagates those of its shard
                through the encoders, while torch's DistributedDataParallel sums the parameters' gradients; then all ranks
                take the same optimizer step

The result is the step of one process with the whole batch. A BatchNorm that is trained on CPUs is the exception: it takes its
statistics over each rank's shard, as over a micro-batch in one process (torch's SyncBatchNorm is for CUDA).
"""

import contextlib
import datetime
import io
import os
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError
from utils.processes import barrier, is_main_process, main_process_first, rank, size  # noqa: F401  used as distributed.rank

TIMEOUT = datetime.timedelta(hours=2)  # others wait while one rank decodes pictures; a rank that dies is noticed at once


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


def broadcast_weights(model):
    """Copies the main process's weights and buffers to all ranks."""
    if size() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def data_parallel(module):
    """The module itself or, in several processes, one whose backward pass averages the parameters' gradients over the ranks."""
    if size() == 1:
        return module
    # Statistics of BatchNorm differ between ranks until `average_batch_norm_statistics`; broadcasting them in each step instead
    # would take those of one rank. Some text encoders have weights that no caption uses.
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # torch 2.15 has a new name for broadcast_buffers
        return DistributedDataParallel(module, broadcast_buffers=False, find_unused_parameters=True)


def gradients_stay_here(module):
    """A context in which a module of `data_parallel` adds gradients up without averaging them over the ranks."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def all_reduce_gradients(parameters):
    """Sums the .grad of some parameters that are not in a `data_parallel` module over the ranks."""
    for parameter in parameters:
        if size() > 1 and parameter is not None and parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def synchronize_batch_norm(encoder, device):
    """The encoder with BatchNorm layers that, on CUDA, compute their statistics over the batch of all ranks."""
    if size() == 1 or device.type != "cuda":
        return encoder
    from timm.layers import convert_sync_batchnorm  # only here and below: a search in several processes does without timm

    return convert_sync_batchnorm(encoder)


def average_batch_norm_statistics(*models):
    """Averages the BatchNorm layers' running statistics over the ranks."""
    if size() > 1:
        from timm.utils import distribute_bn

        for model in models:
            distribute_bn(model, size(), reduce=True)


def any_rank(value):
    """Whether any rank passes True."""
    if size() == 1:
        return value
    flag = torch.tensor(int(value))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def all_reduce_sum(value):
    """The sum of a tensor over the ranks. Without gradient."""
    if size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value
