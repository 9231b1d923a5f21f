"""What ends a training from outside, in words that say what to do: SIGTERM, memory that runs out, dead processes."""

import contextlib
import re
import signal
import sys
import threading

import torch
import torch.distributed as dist

from storage import UserError

TERMINATED = 128 + signal.SIGTERM  # the exit status that a scheduler takes for its own doing
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
PEER_GONE = re.compile("closed by peer|reset by peer|Broken pipe", re.IGNORECASE)  # gloo's words; nccl has a class of errors


@contextlib.contextmanager
def at_sigterm(act):
    """In here SIGTERM does nothing but call act()."""
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    earlier = signal.signal(signal.SIGTERM, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def leave_at_once():
    """Ends the program as Ctrl-C would, with what is half-written taken back."""
    sys.exit(TERMINATED)


def explain(error, config):
    """A RuntimeError of torch -> the UserError that says what happened and what to do, or the error as it is."""
    reason = str(error)
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(reason):
        at_once = config.micro_batch_size or config.batch_size
        flag = "--batch-size" if config.gan == "joint" else "--micro-batch-size"
        fewer = next((n for n in range(at_once // 2, 0, -1) if at_once % n == 0), 1)  # micro-batches have to be equal
        return UserError(
            f"out of memory with {at_once} pairs at once on --device {config.device}; the last checkpoint is kept: --resume, "
            f"with {flag} {fewer}"
        )
    if "DataLoader worker" in reason:
        return UserError(
            f"a process that cuts crops was killed ({reason.splitlines()[0]}); the last checkpoint is kept: --resume goes on, "
            "with fewer --num-workers where memory was short"
        )
    if dist.is_initialized() and (isinstance(error, dist.DistError) or PEER_GONE.search(reason)):
        return UserError(f"process {dist.get_rank()}: another process has ended; its own message says why")
    return error
