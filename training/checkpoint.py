"""Create, lock, checkpoint and resume a run folder."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import re
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import torch

from clip import describe_encoders
from config import load_run, refuse_changes, save_run
from loading.trained import SPLITS, earlier_rows, write_splits
from training import distributed
from utils.errors import UserError
from utils.files import CACHED, FILE_MANAGERS, atomic_dir, atomic_write, remove_leftovers, replace

LAST, PREVIOUS = "last.pt", "previous.pt"  # the newest checkpoint, and the one before
TRADEOFF = "tradeoff.csv"  # says which mixture of --wise-ft was kept
TRAINED = "trained"  # with --wise-ft a folder with the weights of the best epoch; the run's own may be others, or a mixture
FORMATS = {"config.json": {"format", "config", "encoders"}, "gan.json": {"format", "config"}}  # keys that tell whose it is
RUN_FILES = re.compile(  # names of all that a run and the commands that use it write into its folder
    r"(config|gan|relevance|tokenizer)\.json|(model|hubness|generator)\.safetensors|reference(s|-words)\.npy|(last|previous)\.pt|"
    r"(history|splits|tradeoff)\.csv|(curves|similarity|matches|relevance|generated|tradeoff)\.png|README\.md|"
    r"(cache|skipped)\.txt|done\.json|.+\.tmp|heads|trained|onnx|samples|pictures|tensorboard|wandb"
)
DIGEST_SIZE = hashlib.sha256().digest_size  # bytes at the end of a checkpoint: the SHA-256 of all before them


# ---- checkpoints -------------------------------------------------------------------------------------------------


def write_checkpoint(run_dir, state):
    """Writes tensors and plain values as the newest checkpoint of a folder, followed by their SHA-256.

    The folder holds a complete checkpoint at all times, even if the process is killed.
    """

    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's report of a full disk; its context is Python's OSError
                raise error.__context__ or error from None
        digest = hashlib.sha256(np.memmap(temporary, mode="r")).digest()
        with open(temporary, "ab") as file:
            file.write(digest)

    atomic_write(run_dir / LAST, write, backup=run_dir / PREVIOUS)


def read_checkpoint(path):
    """The inverse of `write_checkpoint`; reads tensors and plain values only. Raises ValueError where a byte has changed."""
    checksummed = np.memmap(path, mode="r")
    if hashlib.sha256(checksummed[:-DIGEST_SIZE]).digest() != checksummed[-DIGEST_SIZE:].tobytes():
        raise ValueError("its checksum does not match")
    return torch.load(path, map_location="cpu", weights_only=True)


def has_checkpoint(run_dir):
    return any((run_dir / name).exists() for name in (LAST, PREVIOUS))


def load_latest(run_dir, restore, use_previous=False):
    """What restore(state) returns for a folder's newest checkpoint.

    use_previous: if that one is damaged, use the one before it.
    Raises UserError for a checkpoint that is damaged or of another model, and names the one before.
    """
    paths = [run_dir / name for name in (LAST, PREVIOUS) if (run_dir / name).exists()]
    for path in paths:
        try:
            return restore(read_checkpoint(path))
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise almost any exception
            reason = str(error).strip().split("\n")[0][:120]
            damaged = f"{path}: damaged, or of another model or other data ({reason})"
        if path == paths[-1]:
            raise UserError(f"{damaged}; start the run again")
        if not use_previous:
            raise UserError(f"{damaged}; {paths[-1]} is the one before: rename it to {LAST} and use --resume")
        print(f"{damaged}; resuming from {paths[-1]}")


def load_optimizer(optimizer, saved):
    """Loads an optimizer's moments from its saved state; learning rates, weight decay and betas stay as configured.

    Raises ValueError where the saved state belongs to other parameters.
    """
    groups, count = [], 0  # not from its state_dict, which a sharded optimizer first has to gather
    for group in optimizer.param_groups:
        groups.append(group | {"params": list(range(count, count + len(group["params"])))})
        count += len(group["params"])
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise ValueError("its optimizer has other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    if hasattr(optimizer, "consolidate_state_dict"):  # it is sharded
        optimizer.state.clear()  # a second copy; its own share is in optimizer.optim


# ---- the run folder ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_run_dir(run_dir, marker=""):
    """Locks a run folder for this process; the operating system releases the lock if the process is killed.

    marker: for a new run, as for `require_run_dir`.
    Raises UserError where that does, where another process holds the lock, or where the lock file beside the folder cannot be
    written.
    """
    run_dir = Path(run_dir)
    if marker:
        require_run_dir(run_dir, marker)
    lock = filelock.FileLock(run_dir.with_name(f".{run_dir.name}.lock"), timeout=0)
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{run_dir}: another run is training there; wait until it ends, or name another --run-dir") from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another") from None
    try:
        remove_leftovers(run_dir)
        yield
    finally:
        lock.release()


def write_history(path, history):
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=history[-1])  # rows of an older version may have fewer
            writer.writeheader()
            writer.writerows(history)

    atomic_write(path, write)


def best_rsum(run_dir):
    """The best sum of the six recalls (rsum) in a run's history.csv; -1, less than any, if there is no such file."""
    path = Path(run_dir) / "history.csv"
    return float(pd.read_csv(path)["rsum"].max()) if path.exists() else -1.0


def require_run_dir(run_dir, marker):
    """Raises UserError where a new run may not take a folder.

    It may where there is none, where it is empty, and where it holds a run of the same command and nothing else, which
    `backup_run` then renames. marker: the file by whose name and keys such a run is recognised.
    """
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise UserError(f"--run-dir {run_dir}: is a file; name a folder")
    names = sorted(path.name for path in run_dir.iterdir() if path.name not in FILE_MANAGERS)
    names = [name for name in names if not CACHED.fullmatch(name)]  # where --cache-dir names the same folder
    try:
        is_run = not names or FORMATS[marker] <= set(json.loads((run_dir / marker).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        is_run = False
    foreign = [name for name in names if not is_run or not RUN_FILES.fullmatch(name)]
    runs = [name for name in foreign if any((run_dir / name / file).exists() for file in FORMATS)]
    if foreign:
        what = f"other runs ({runs[0]})" if runs else f"what is not of a run of this command ({foreign[0]})"
        raise UserError(f"--run-dir {run_dir}: holds {what}; a new run needs a folder of its own, such as runs/mine")


def backup_run(run_dir, marker):
    """Renames the folder if it holds an earlier run, so that nothing is overwritten. Raises UserError as `require_run_dir`."""
    require_run_dir(run_dir, marker)
    if (run_dir / marker).exists():
        number = 1
        while (backup := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        replace(run_dir, backup)
        print(f"{run_dir} held an earlier run, which was renamed to {backup}")


def refuse_other_settings(config):
    """Raises UserError where a resumed run's settings would change the model or its input."""
    if config.resume != "no" and (Path(config.run_dir) / "config.json").exists():
        refuse_changes(config, load_run(config.run_dir)["config"])


def save_settings(config, model, table, folder=None):
    """Writes config.json and splits.csv, in the main process. table: what `training.data.read_table` returns.

    folder: where to; None: the run folder.
    """
    if not distributed.is_main_process():
        return
    folder = Path(folder or config.run_dir)
    save_run(folder, dataclasses.replace(config, resume="no"), describe_encoders(model))
    earlier = earlier_rows(config.model, config.run_dir, config.resume != "no")
    write_splits(folder / SPLITS, table, earlier)


def start_run(config, model, table, skipped):
    """Creates the run folder, without weights, in the main process; an earlier run's folder is renamed.

    table: as for `save_settings`.
    """
    if not distributed.is_main_process():
        return
    run_dir = Path(config.run_dir)
    backup_run(run_dir, "config.json")
    try:
        # After a kill there is a whole run folder or none. An empty one that is there may be a disk's, which cannot be renamed.
        with contextlib.nullcontext(run_dir) if run_dir.exists() else atomic_dir(run_dir) as folder:
            if skipped:
                (folder / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")
            model.tokenizer.save(str(folder / "tokenizer.json"))
            save_settings(config, model, table, folder)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another") from None
