"""Turn user mistakes, SIGTERM, out-of-memory and lost processes into clear messages."""

import contextlib
import gc
import importlib.util
import io
import os
import re
import signal
import sys
import threading

from utils.processes import group, rank


class UserError(Exception):
    """Something the user can fix: one line that names the value, the place and the fix."""

    def __str__(self):
        return "".join(c if c.isprintable() else " " for c in super().__str__())  # file names may have control characters


def run_command(function, *arguments):
    """function(*arguments), in a command: an error that the user can fix ends the program with one line.

    A script calls this twice: to read its arguments, before it imports what takes seconds to load, and to act on them. An
    error between the two, such as a missing package, ends it likewise. Characters that the output's encoding lacks (cp1252 on
    Windows has no Japanese) are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.excepthook = end_command
    gc.freeze()  # what is imported stays, so there is no need to look through it again and again
    gc.enable()
    try:
        return function(*arguments)
    finally:
        gc.disable()  # until the next call: while a script's imports are loaded it finds nothing, and takes a sixth of the time
        sys.stdout.flush()  # now, because an error while Python exits cannot be caught


def missing_package(error):
    """The package that is not installed, where an error or its cause (pandas raises one of its own) is about one; else ""."""
    while error:
        if isinstance(error, ModuleNotFoundError) and error.name:
            package = error.name.partition(".")[0]
            return "" if importlib.util.find_spec(package) else package
        error = error.__cause__
    return ""


def end_command(kind, error, traceback):
    """Ends the program as an error asks for: exit status 2 and one line for what the user can fix, 130 for Ctrl-C.

    A closed output pipe, as after `| head`, ends it with status 1 and no message. Any other error is a fault of this program,
    and its traceback is printed. The arguments are those of `sys.excepthook`.
    """
    if isinstance(error, UserError):
        line, status = f"error: {error}", 2
    elif package := missing_package(error):
        line, status = f"error: the package {package} is missing: pip install -r requirements.txt", 2
    elif isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the remaining output
        sys.exit(1)
    elif isinstance(error, OSError) and error.filename:
        line, status = f"error: {error.filename}: {error.strerror}; fix that, then run the command again", 2
    elif isinstance(error, KeyboardInterrupt):
        line, status = f"\nstopped; {error}" if error.args else "\nstopped", 130
    else:
        return sys.__excepthook__(kind, error, traceback)
    print(line, file=sys.stderr)
    sys.exit(status)


TERMINATED = 128 + signal.SIGTERM  # exit status of a process that was ended by this signal, as schedulers expect
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory", re.IGNORECASE)
PEER_GONE = re.compile("closed by peer|reset by peer|Broken pipe", re.IGNORECASE)  # gloo's messages; nccl raises dist.DistError


@contextlib.contextmanager
def at_sigterm(action):
    """A context in which SIGTERM only calls action()."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def exit_terminated():
    """Ends the program with an exception, as Ctrl-C does, so that half-written files are removed."""
    sys.exit(TERMINATED)


def to_user_error(error, config):
    """A RuntimeError of torch -> a UserError that says what happened and what to do, or the same error if it is unknown."""
    import torch  # only here: this import takes seconds, and most commands that fail do not need it

    reason = str(error)
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY.search(reason):
        num_pairs = config.micro_batch_size or config.batch_size
        flag = "--batch-size" if config.gan == "joint" else "--micro-batch-size"
        smaller = next((n for n in range(num_pairs // 2, 0, -1) if num_pairs % n == 0), 1)  # equal micro-batches
        return UserError(
            f"out of memory with {num_pairs} pairs at once on --device {config.device}; the last checkpoint is kept: use "
            f"--resume with {flag} {smaller}"
        )
    if "DataLoader worker" in reason:
        return UserError(
            f"a data loader worker was killed ({reason.splitlines()[0]}); the last checkpoint is kept: use --resume, with "
            "fewer --num-workers if memory ran out"
        )
    return lost_process(error)


def lost_process(error):
    """A RuntimeError -> a UserError if another process has ended, or the same error."""
    reason = str(error)
    if group() and (isinstance(error, group().DistError) or PEER_GONE.search(reason)):
        return UserError(f"process {rank()}: another process has ended; see its message for the reason")
    return error
