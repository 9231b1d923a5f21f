"""Which of the processes that torchrun started this one is. Commands that need no torch can ask, too.

A process is a "rank"; rank 0 is the main process.
"""

import contextlib
import sys


def group():
    """torch.distributed where it is initialised, else None: then there is one process."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_initialized() else None


def rank():
    return group().get_rank() if group() else 0


def is_main_process():
    """True in the one process that writes files; in all that there are where training runs in one process."""
    return rank() == 0


def size():
    return group().get_world_size() if group() else 1


def barrier():
    """Waits until all ranks are here."""
    if size() > 1:
        group().barrier()


@contextlib.contextmanager
def main_process_first():
    """The main process runs this block before the others, which then find its files on disk."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()
