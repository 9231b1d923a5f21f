"""A run folder while it is trained: one process's own, begun, saved, and gone on with."""

import contextlib
import csv
import dataclasses
import hashlib
import json
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import torch

from captions import SPLITS, write_splits
from clip import describe_towers
from config import load_run, save_run
from storage import UserError, remove_unfinished, replace, write_whole
from tokenizer import read_tokenizer

LAST, PREVIOUS = "last.pt", "previous.pt"  # the newest checkpoint, and the one before
SEAL = hashlib.sha256().digest_size  # bytes at the end of a checkpoint: the digest of all before


# ---- checkpoints -------------------------------------------------------------------------------------------------


def write_checkpoint(run_dir, state):
    """Writes tensors and plain values as the newest checkpoint of a folder, sealed with their SHA-256.

    Whatever happens meanwhile, the folder holds a whole one.
    """

    def write(temporary):
        with open(temporary, "wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # so torch reports a full disk; what Python said of it is the context
                raise error.__context__ or error from None
        digest = hashlib.sha256(np.memmap(temporary, mode="r")).digest()
        with open(temporary, "ab") as file:
            file.write(digest)

    write_whole(run_dir / LAST, write, keep=run_dir / PREVIOUS)


def read_checkpoint(path):
    """Undoes `write_checkpoint`. Raises ValueError where a byte has changed; nothing but tensors and plain values is read."""
    sealed = np.memmap(path, mode="r")
    if hashlib.sha256(sealed[:-SEAL]).digest() != sealed[-SEAL:].tobytes():
        raise ValueError("its checksum does not fit")
    return torch.load(path, map_location="cpu", weights_only=True)


def has_checkpoint(run_dir):
    return any((run_dir / name).exists() for name in (LAST, PREVIOUS))


def load_newest(run_dir, take, fall_back=False):
    """What take(state) returns of a folder's newest checkpoint.

    fall_back: where that is damaged, the one before is taken.
    Raises UserError where there is a damaged one, or one of another model, and names the one before.
    """
    found = [run_dir / name for name in (LAST, PREVIOUS) if (run_dir / name).exists()]
    for path in found:
        try:
            return take(read_checkpoint(path))
        except UserError:
            raise
        except Exception as error:  # a damaged file can raise nearly anything
            reason = str(error).strip().split("\n")[0][:120]
            damaged = f"{path}: damaged, or of other networks or data ({reason})"
        if path == found[-1]:
            raise UserError(f"{damaged}; start the run anew")
        if not fall_back:
            raise UserError(f"{damaged}; {found[-1]} is the one before: rename it to {LAST}, and --resume goes on from there")
        print(f"{damaged}; going on from {found[-1]}")


def is_frozen(name, config):
    """Whether a tensor of the model, or of its moving average, belongs to a frozen tower."""
    frozen = tuple(f"{tower}_encoder." for tower in ("image", "text") if config.freeze in (tower, "both"))
    return name.removeprefix("module.").startswith(frozen)


def load_optimizer(optimizer, saved):
    """Loads an optimizer's moments from its saved state; rates, decay and betas stay those of the command line.

    Raises ValueError where the saved state is of other parameters.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise ValueError("its optimizer moves other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def save_last(run_dir, model, optimizer, scaler, history, losses, keys, config, average=None, joint=None):
    """What resuming needs: all that training changes. A frozen tower comes from where it came from before.

    Random states need no saving, as each step begins with its own seed, nor does the schedule, a function of the step.

    losses: of the steps of an epoch that has not ended. keys: "data", of the captions and pictures, and "frozen", of the
    weights that are not trained, both of which have to be the same again when the run is resumed.
    average, joint: the moving average of the weights and the `joint.Joint` of a run that has one.
    Raises UserError where a weight is not finite; the checkpoint before stays.
    """
    state = {name: value for name, value in model.state_dict().items() if not is_frozen(name, config)}
    broken = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if broken:
        raise UserError(f"{run_dir}: {broken} is not finite; the last good checkpoint is kept, --resume with lower rates")
    state = {"model": state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "history": history}
    state |= {"losses": losses, "batch_size": config.batch_size} | keys
    if average:
        state["average"] = {name: value for name, value in average.state_dict().items() if not is_frozen(name, config)}
    if joint:
        state["joint"] = joint.state_dict()
    write_checkpoint(run_dir, state)


def load_last(run_dir, model, optimizer, scaler, keys, config, average=None, joint=None):
    """Undoes `save_last` and returns (history, losses). Raises UserError where that is damaged or of another run."""

    def take(saved):
        if saved["data"] != keys["data"]:
            raise UserError(f"{run_dir}: its captions or pictures were others; put them back, or start a new run")
        same_model = load_run(run_dir)["towers"] == json.loads(json.dumps(describe_towers(model)))
        same_words = read_tokenizer(run_dir).to_str() == model.tokenizer.to_str()
        if not (same_model and same_words and saved["frozen"] == keys["frozen"]):
            raise UserError(
                f"{run_dir}: was begun with other frozen weights, another text encoder or another vocabulary; name the same "
                "with --image-weights and --text-encoder, or start a new run with another --run-dir"
            )
        missing, unexpected = model.load_state_dict(saved["model"], strict=False)
        if unexpected or not all(is_frozen(name, config) for name in missing):
            raise ValueError(f"{len(missing) + len(unexpected)} tensors differ")
        if len(saved["losses"]) and saved["batch_size"] != config.batch_size:
            raise UserError(
                f"--batch-size {config.batch_size}: {run_dir} stopped within an epoch of batches of {saved['batch_size']}; "
                "change it once that has ended"
            )
        load_optimizer(optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty unless in fp16
            scaler.load_state_dict(saved["scaler"])
        if average and "average" in saved:
            average.load_state_dict(saved["average"], strict=False)
        if joint:
            joint.load_state_dict(saved["joint"])
        return saved["history"], saved["losses"]

    return load_newest(run_dir, take, config.resume == "auto")


# ---- the rest of the folder --------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_run_in(run_dir):
    """Keeps a run folder to this process; the system takes the lock away with the process, however that ends.

    Raises UserError where another process has it, or the folder beside which the lock lies may not be written.
    """
    run_dir = Path(run_dir)
    lock = filelock.FileLock(run_dir.with_name(f".{run_dir.name}.lock"), timeout=0)
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{run_dir}: another run is training there; wait for its end, or name another --run-dir") from None
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another") from None
    try:
        remove_unfinished(run_dir)
        yield
    finally:
        lock.release()


def write_history(path, history):
    def write(temporary):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=history[0])
            writer.writeheader()
            writer.writerows(history)

    write_whole(path, write)


def best_rsum(run_dir):
    """The best rsum in a run's history.csv; -1, less than any, where there is none."""
    path = Path(run_dir) / "history.csv"
    return float(pd.read_csv(path)["rsum"].max()) if path.exists() else -1.0


def move_aside(run_dir, mark):
    """Renames the folder of a run that is there already, which the file named `mark` shows: nothing is lost."""
    if (run_dir / mark).exists():
        number = 1
        while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
            number += 1
        replace(run_dir, aside)
        print(f"{run_dir} held an earlier run, which is now {aside}")


def save_settings(config, model, table):
    """Writes config.json and splits.csv. table: what `load_captions` returns, all splits of it."""
    save_run(config.run_dir, dataclasses.replace(config, resume="no"), describe_towers(model))
    write_splits(Path(config.run_dir) / SPLITS, table)


def start_run(config, model, table, skipped):
    """Makes the run folder with all but weights. A run that is there already moves aside. table: as for `save_settings`."""
    run_dir = Path(config.run_dir)
    move_aside(run_dir, "config.json")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "skipped.txt").unlink(missing_ok=True)
        if skipped:
            (run_dir / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")
        model.tokenizer.save(str(run_dir / "tokenizer.json"))
        save_settings(config, model, table)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another") from None
