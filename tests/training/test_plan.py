"""`--dry-run`: what it says is what the run then does, and it writes nothing."""

import re
from functools import partial

import pandas as pd
import pytest
import torch

import main
import training.plan
from clip import create_model
from config import load_run, parse_config
from Datasets import shapes
from training.data import fit_batch, read_table
from training.plan import describe_disk, describe_steps, freeze, output_bytes, print_plan, step_bytes, trained_parameters
from training.state import create_state
from utils.errors import UserError
from utils.images import decoded_bytes


def plan(capsys, config):
    print_plan(config, None)
    return dict(re.findall(r"^(\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE))


def config_of(sample, folder, *flags):
    flags = ["--batch-size", "32", "--device", "cpu", "--cache-dir", folder / "cache", *flags]
    return parse_config(["shapes", "--data-dir", str(sample), "--run-dir", str(folder / "run"), *map(str, flags)], "shapes")[0]


def test_a_dry_run_writes_nothing_and_says_what_the_run_does(sample, tmp_path, monkeypatch, capsys):
    config, measured = config_of(sample, tmp_path, "--epochs", 2), []
    with monkeypatch.context() as patched:
        patched.setattr(training.plan, "decoded_bytes", lambda *given: measured.append(decoded_bytes(*given)) or measured[-1])
        said = plan(capsys, config)
    assert not list(tmp_path.iterdir())
    assert said["steps"] == "2 epochs of 3 steps of 32 images"  # 96 training images
    main.train(config)
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2
    pixels = next((tmp_path / "cache").glob("images-*/pixels.bin")).stat().st_size
    assert measured == [pixels]
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
        freeze(config, model)
        count = trained_parameters(model, config)
        groups = create_state(config, model, {}, model.logit_scale.device, model.logit_scale.dtype).optimizer.param_groups
        assert count == sum(weight.numel() for group in groups for weight in group["params"])
        heads = 256 * (model.image_encoder.width + model.text_encoder.width) + 1
        assert count == heads if "both" in flags else count > heads


def test_a_batch_that_the_data_cannot_fill_is_refused_as_in_a_run(sample, tmp_path):
    with pytest.raises(UserError, match="--batch-size 97: there are only 96 training images"):
        print_plan(config_of(sample, tmp_path, "--batch-size", 97), None)


@pytest.mark.parametrize(
    ("arguments", "num_real", "size"),
    [
        (["shapes"], 96, 96),  # 128 is the preset's
        (["shapes"], 128, 128),
        (["fast"], 999, 999),  # 1000 is the default of frozen encoders
        (["fast"], 6000, 1000),
        (["shapes", "--micro-batch-size", "20"], 96, 80),
        (["shapes", "--micro-batch-size", "48"], 6000, 96),
        (["shapes", "--extra-data", "more"], 60, 80),  # of which 20 are generated
        (["shapes", "--gan", "joint"], 60, 60),
        (["shapes", "--batch-size", "32"], 96, 32),
    ],
)
def test_a_batch_size_that_nobody_passed_fits_the_data(arguments, num_real, size, capsys):
    given = parse_config(arguments)[0]
    config = fit_batch(given, num_real, "here")
    assert config.batch_size == size and type(config.batch_size) is int
    line = f"batch size {size} instead of {given.batch_size}: the largest that {num_real:,} training images fill"
    assert capsys.readouterr().out.startswith(line) == (size != given.batch_size)


@pytest.mark.parametrize(
    ("arguments", "num_real", "message"),
    [
        (["shapes", "--batch-size", "128"], 96, "--batch-size 128: there are only 96 training images in here; lower it"),
        (["shapes", "--batch_size=128"], 96, "--batch-size 128: there are only 96 training images in here; lower it"),
        (
            ["shapes", "--micro-batch-size", "64"],
            40,
            "here: 40 training images are too few for any batch in micro-batches of 64",
        ),
        (["fast"], 1, "here: 1 training images are too few for any batch; add pictures"),
    ],
)
def test_a_batch_that_cannot_be_filled_is_refused(arguments, num_real, message):
    with pytest.raises(UserError, match=message):
        fit_batch(parse_config(arguments)[0], num_real, "here")


def test_a_run_on_few_pictures_needs_no_batch_size_and_is_resumed_with_its_own(sample, tmp_path, capsys):
    places = ["--data-dir", str(sample), "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    flags = ["shapes", *places, "--text-layers", "1", "--device", "cpu"]
    assert plan(capsys, parse_config([*flags, "--epochs", "1"])[0])["steps"] == "1 epochs of 1 steps of 96 images"
    main.train(parse_config([*flags, "--epochs", "1"])[0])
    assert capsys.readouterr().out.count("batch size 96 instead of 128: the largest that 96 training images fill\n") == 1
    assert load_run(tmp_path / "run")["config"].batch_size == 96
    main.train(parse_config([*flags, "--epochs", "2", "--resume"])[0])
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2 and "batch size" not in capsys.readouterr().out


def test_heads_first_is_planned_as_a_stage_of_its_own():
    best = parse_config(["best"], "shapes")[0]
    assert describe_steps(best, 6000) == (
        "heads first: 30 epochs of 6 steps of 1000 images; then 12 epochs of 23 steps of 256 images"
    )


def test_disk_space_by_hand():
    config = parse_config(["shapes", "--ema-decay", "0.9", "--cache-dir", "."], "shapes")[0]
    # 1e8 weights of 4 bytes; two checkpoints with 5e7 that train, AdamW's two averages and the moving average: 16 bytes each
    cached, run, _ = describe_disk(config, pixels=2e9, outputs=3e9, total=1e8, trained=5e7).split("; ")
    assert cached == "2.00 GB of decoded pictures and 3.00 GB of features in ., unless they are there"
    assert run == "2.00 GB in runs/shapes"
    assert "features" not in describe_disk(config, 2e9, 0, 1e8, 5e7)


def test_cached_outputs_are_as_large_as_said(sample, tmp_path):
    """Features of both encoders, of two crops per training image."""
    config = config_of(sample, tmp_path, "--freeze", "both", "--cached-crops", 2, "--epochs", 1)
    table, image_dir, _ = read_table(config)
    model = create_model(config, table["caption"])
    expected = output_bytes(config, model, table, torch.float32)
    assert expected == 4 * model.image_encoder.width * (2 * 96 + 24) + 4 * model.text_encoder.width * 5 * (96 + 24)
    main.train(config)
    header = 128  # bytes at the start of a .npy file
    assert sum(path.stat().st_size - header for path in (tmp_path / "cache").glob("*features-*.npy")) == expected


def test_the_memory_of_a_step_grows_with_its_batch_and_not_with_frozen_encoders(sample, tmp_path):
    captions = pd.read_csv(sample / "captions.txt")["caption"]

    def of(count, *flags):
        config = config_of(sample, tmp_path, *flags)
        model = create_model(config, captions)
        freeze(config, model)
        return step_bytes(config, model, [5, 6, 7], count, torch.device("cpu"), torch.float32)

    two, four, six = (of(count) for count in (2, 4, 6))
    assert six - four == pytest.approx(four - two, rel=0.05) and two < four
    assert of(4, "--freeze", "text") < four
    assert of(4, "--freeze", "both", "--head-lr", 1e-3) < of(4, "--freeze", "image") < four
