"""A run folder while it is trained: begun, saved after each epoch, and gone on with."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from clip import describe_towers
from config import save_run
from storage import UserError, write_whole


def frozen_prefixes(config):
    return tuple(f"{tower}_encoder." for tower in ("image", "text") if config.freeze in (tower, "both"))


def save_last(path, model, optimizer, scaler, history, config, joint=None):
    """What resuming needs: all that training changes. A frozen tower comes from where it came from before.

    joint: the `joint.Joint` of a run that has one.
    """
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(frozen_prefixes(config))}
    state = {"model": state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "history": history}
    if joint:
        state["joint"] = joint.state_dict()
    write_whole(path, lambda temporary: torch.save(state, temporary))


def load_last(path, model, optimizer, scaler, config, joint=None):
    """Undoes `save_last` and returns the history. Raises UserError where the file is damaged or of another model."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = model.load_state_dict(saved["model"], strict=False)
        if unexpected or any(not name.startswith(frozen_prefixes(config)) for name in missing):
            raise ValueError(f"{len(missing) + len(unexpected)} tensors differ")
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        if joint:
            joint.load_state_dict(saved["joint"])
        return saved["history"]
    except Exception as error:  # unpickling a damaged file can raise nearly anything
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(f"{path}: damaged, or of a run with other towers or data ({reason}); start the run anew") from None


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
        os.replace(run_dir, aside)
        print(f"{run_dir} held an earlier run, which is now {aside}")


def start_run(config, model, skipped):
    """Makes the run folder with all but weights. A run that is there already moves aside."""
    run_dir = Path(config.run_dir)
    move_aside(run_dir, "config.json")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "skipped.txt").unlink(missing_ok=True)
        if skipped:
            (run_dir / "skipped.txt").write_text("\n".join(skipped) + "\n", encoding="utf-8")
        model.tokenizer.save(str(run_dir / "tokenizer.json"))
        save_run(run_dir, replace(config, resume=False), describe_towers(model))
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: cannot be written ({error.strerror}); name another") from None
