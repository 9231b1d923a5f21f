"""Which folder a run may take, what belongs to its weights, and what a resumed run compares and counts."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest

import clip
import main
from config import parse_config
from training.checkpoint import backup_run, lock_run_dir, require_run_dir
from training.state import TrainState
from utils.errors import UserError


def train(flags):
    return main.train(parse_config(flags, "shapes")[0])


def test_a_folder_that_holds_runs_or_files_of_the_users_is_not_renamed(run, tmp_path):
    shutil.copytree(run, tmp_path / "runs" / "a")
    shutil.copytree(run, tmp_path / "noted")
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')  # of another library
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for name, problem in (("runs", "holds other runs .a."), ("noted", "notes.txt"), ("model", "config.json"), ("file", "file")):
        with pytest.raises(UserError, match=f"--run-dir .*{name}: .*{problem}"), lock_run_dir(tmp_path / name, "config.json"):
            pass
        with pytest.raises(UserError):
            backup_run(tmp_path / name, "config.json")
    with pytest.raises(
        UserError, match="holds what is not of a run of this command"
    ):  # a generator's files have the same names
        require_run_dir(tmp_path / "runs" / "a", "gan.json")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_run_in_a_folder_of_runs_is_refused_and_in_its_own_renames_the_first(small_flags, tmp_path):
    train(small_flags("runs/a", epochs=1))
    with pytest.raises(UserError, match="holds other runs"):
        train(small_flags("runs", epochs=1))
    train(small_flags("runs/a", epochs=1))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if not path.name.startswith(".")) == ["a", "a.1"]


def test_what_is_true_of_old_weights_goes_with_them(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    model, _ = clip.load(folder, "cpu")
    before = {path.name for path in folder.iterdir()}
    clip.save_weights(model, folder)  # the same
    assert {path.name for path in folder.iterdir()} == before
    model.logit_scale.data += 1
    model.hubness = None
    clip.save_weights(model, folder)
    gone = before - {path.name for path in folder.iterdir()}
    assert gone == {*clip.OF_WEIGHTS} & before and {"README.md", "matches.png", "similarity.png"} <= gone


def test_a_copy_of_a_run_replaces_neither_another_run_nor_files_of_the_users(run, tmp_path):
    model, _ = clip.load(run, "cpu")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    shutil.copytree(run, tmp_path / "other")
    for name in ("mine", "other"):
        with pytest.raises(UserError, match="name a new folder"):
            model.save_pretrained(tmp_path / name)
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    for _ in range(2):
        model.save_pretrained(tmp_path / "copy")


def test_resumed_steps_are_counted_whatever_the_batch_size(small_flags, tmp_path, monkeypatch):
    flags = small_flags(steps=7, batch_size=16)  # an epoch has six
    done = []

    def stop_after_one(state, best, save=TrainState.save_epoch):
        save(state, best)
        done.append(state.steps_done)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainState, "save_epoch", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        train(flags)
    train([*flags, "--batch-size", "48", "--resume"])  # an epoch has two
    assert done == [6, 7] and len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2
    train([*flags, "--batch-size", "48", "--resume"])
    assert done == [6, 7]  # all steps are done


def test_pictures_that_were_replaced_under_their_names_are_noticed(small_flags, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    train(small_flags(data_dir=tmp_path / "data", epochs=1))
    resumed = [*small_flags(data_dir=tmp_path / "data", epochs=2), "--resume"]
    for path in (tmp_path / "data" / "Images").iterdir():
        path.touch()  # copied without their times
    train(resumed)
    cv2.imwrite(str(tmp_path / "data" / "Images" / "00000.png"), np.full((96, 96, 3), 77, np.uint8))
    with pytest.raises(UserError, match="its pictures have changed, under the same names"):
        train([*resumed, "--epochs", "3"])
