"""`--dry-run`: what it says is what the run then does, and it writes nothing."""

import re
from functools import partial

import pandas as pd
import pytest

import main
from clip import create_model
from config import parse_config
from Datasets import shapes
from training.plan import describe_steps, print_plan, trained_parameters
from training.state import create_state
from utils.cache import bytes_in
from utils.errors import UserError


def plan(capsys, config):
    print_plan(config, None)
    return dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE))


def config_of(sample, folder, *flags):
    flags = ["--batch-size", "32", "--device", "cpu", "--cache-dir", folder / "cache", *flags]
    return parse_config(["shapes", "--data-dir", str(sample), "--run-dir", str(folder / "run"), *map(str, flags)], "shapes")[0]


def test_a_dry_run_writes_nothing_and_says_what_the_run_does(sample, tmp_path, capsys):
    config = config_of(sample, tmp_path, "--epochs", 2)
    said = plan(capsys, config)
    assert not list(tmp_path.iterdir())
    assert said["steps"] == "2 epochs of 3 steps of 32 images"  # 96 training images
    main.train(config)
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2
    decoded = next((tmp_path / "cache").glob("images-*"))
    assert abs(float(re.match(r"([\d.]+) GB of decoded", said["disk"])[1]) - bytes_in(decoded) / 1e9) < 0.005
    millions = re.match(r"([\d.]+) million, of which ([\d.]+)", said["parameters"])
    assert millions[1] == millions[2] == f"{(tmp_path / 'run' / 'model.safetensors').stat().st_size / 4e6:.1f}"


def test_a_dry_run_of_the_sample_does_not_leave_it_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shapes, "draw", partial(shapes.draw, train=40, val=8, test=8))
    said = plan(capsys, parse_config(["shapes", "--batch-size", "10", "--device", "cpu"], "shapes")[0])
    assert said["steps"].startswith("15 epochs of 4 steps") and "would be drawn" in said["data"]
    assert not list(tmp_path.iterdir())


def test_the_parameters_that_train_are_those_of_the_optimizer(sample, tmp_path):
    captions = pd.read_csv(sample / "captions.txt")["caption"]
    for flags in ([], ["--freeze", "image"], ["--freeze", "both", "--head-lr", "1e-3"]):
        config = config_of(sample, tmp_path, *flags)
        model = create_model(config, captions)
        count = trained_parameters(model, config)
        groups = create_state(config, model, {}, model.logit_scale.device, model.logit_scale.dtype).optimizer.param_groups
        assert count == sum(weight.numel() for group in groups for weight in group["params"])
        heads = 256 * (model.image_encoder.width + model.text_encoder.width) + 1
        assert count == heads if "both" in flags else count > heads


def test_a_batch_that_the_data_cannot_fill_is_refused_as_in_a_run(sample, tmp_path):
    with pytest.raises(UserError, match="--batch-size 97: there are only 96 training images"):
        print_plan(config_of(sample, tmp_path, "--batch-size", 97), None)


def test_heads_first_is_planned_as_a_stage_of_its_own():
    best = parse_config(["best"], "shapes")[0]
    assert describe_steps(best, 6000) == (
        "heads first: 60 epochs of 6 steps of 1000 images; then 12 epochs of 23 steps of 256 images"
    )
