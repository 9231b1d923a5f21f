"""The command line for people: a help of one screen, and mistakes that are answered with what was meant."""

import re

import pytest
import torch
from conftest import run_script

import inference
import main
from config import PRESET_NOTES, PRESETS, SUGGESTED, Config, parse_config
from evaluation.options import TASKS, Leaks, read_task
from experiments.lesson import Learn
from generation import options as generation
from search.options import Page, Search, read_search
from training.data import fetch_data
from training.shards import WriteShards
from utils.cli import dataclass_flags, run_cli
from utils.errors import UserError


def printed_help(capsys, command, *arguments):
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ") and max(map(len, shown.splitlines())) <= 100
    return shown


def flags_in(shown):
    """The flags that a help lists, without dashes in front."""
    return re.findall(r"^  --(?:\[no-\])?([\w-]+)", shown, re.MULTILINE)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_help_fits_on_a_screen_and_shows_the_presets_own_values(preset, capsys):
    shown = printed_help(capsys, parse_config, [preset, "--help"], "shapes")
    assert len(shown.splitlines()) <= 45
    assert all(f"  {name} " in shown for name in (SUGGESTED if preset == "open_clip" else PRESETS))
    assert f"--run-dir {PRESETS[preset].run_dir}" in shown and "--help-all" in shown
    assert "--epochs 12 " in printed_help(capsys, parse_config, ["best", "-h"], "shapes")
    assert "--batch-size 128 " in printed_help(capsys, parse_config, ["--help"], "shapes")


def test_every_preset_is_described():
    assert list(PRESET_NOTES) == list(PRESETS)


def test_all_flags_are_shown_once_and_in_groups_on_request(capsys):
    shown = printed_help(capsys, parse_config, ["--help-all"], "shapes")
    assert flags_in(shown) == [name.replace("_", "-") for name in vars(Config())]
    groups = ["Data", "Encoders", "Heads", "Training", "Generated pictures", "The run"]
    assert [line for line in shown.splitlines() if line.removesuffix(":") in groups] == [f"{name}:" for name in groups]
    assert shown.index("Training:") < shown.index("--[no-]heads-first") < shown.index("Generated pictures:")


def test_every_setting_has_a_text():
    assert all(flag.text for settings in (Config(), generation.GANConfig()) for flag in dataclass_flags(settings))


def test_flags_that_are_on_can_be_turned_off():
    flags = ["--no-heads-first", "--no-hflip", "--no-fast-convolutions", "--no-skip-bad", "--head-init", "random"]
    config, _ = parse_config(["best", *flags], "shapes")
    assert not (config.heads_first or config.hflip or config.fast_convolutions or config.skip_bad)
    assert parse_config(["shapes", "--hflip", "--no-download"], "shapes")[0].hflip


@pytest.mark.parametrize("settings", [*(task[0] for task in TASKS.values()), Search, Page, Learn, WriteShards])
def test_the_help_of_a_command_explains_each_flag_once(settings, capsys):
    shown = printed_help(capsys, run_cli, settings, "command.py", ["--help"], ["python command.py here"])
    assert shown.index("  python command.py here") < shown.index("Flags")
    flags = flags_in(shown)
    assert flags and len(flags) == len(set(flags)) and "device" in flags or settings in (Leaks, WriteShards)
    assert not re.search(r"^  (--\S+ \S+|\S+ \.\.\.)\s*$", re.sub(r"\n {38}", " ", shown), re.MULTILINE)  # one without text
    if settings is not Search:
        assert "json-path" not in flags and "QUERY" not in shown
    else:
        assert "json" in flags and "[QUERY ...]" in shown and "--export '' " in shown


def test_the_help_of_evaluate_has_an_example_per_task(capsys):
    shown = printed_help(capsys, read_task, ["--help"])
    assert all(f"\n  {task} --" in shown for task in TASKS)


def test_the_help_of_the_generator(capsys):
    shown = printed_help(capsys, generation.parse_config, ["flickr8k", "--help"])
    assert "python GAN.py shapes --generate 5000" in shown and "--run runs/flickr8k " in shown
    assert flags_in(shown) == [name.replace("_", "-") for name in vars(generation.GANConfig())]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shape"], "did you mean shapes?"),
        (["nothing-like-it"], "is unknown; there are flickr8k"),
        (["--batch-size", "64", "shapes"], "python main.py shapes --batch-size 64"),
        (["--batch-size=64", "shapes"], "python main.py shapes --batch-size=64"),
        (["--no-hflip", "shapes"], "python main.py shapes --no-hflip"),
        (["shapes", "--batch-size", "64", "gpt2"], "gpt2: shapes is the preset already"),
    ],
)
def test_a_mistaken_preset_is_answered(arguments, message):
    with pytest.raises(UserError) as raised:
        parse_config(arguments, "shapes")
    assert message in str(raised.value)


def test_own_data_without_a_preset_leave_an_earlier_run_where_it_is(sample, tmp_path):
    (tmp_path / "runs" / "shapes").mkdir(parents=True)
    (tmp_path / "runs" / "shapes" / "config.json").write_text("an earlier run")
    for more in ([], ["--dry-run"], ["--resume", "auto", "--run-dir", "runs/new"]):
        process = run_script("main.py", "--data-dir", sample, *more, cwd=tmp_path)
        assert (process.returncode, process.stdout) == (2, "") and process.stderr.count("\n") == 1
        assert all(f" {name}," in process.stderr for name in ("flickr8k", "linear", "fast", "best", "shapes", "gpt2", "paper"))
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["runs", "shapes", "config.json"]


def test_own_captions_take_the_place_of_the_sample_which_is_not_drawn(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ["--captions-path", str(sample / "captions.txt"), "--image-path", str(sample / "Images")]
    config = parse_config(["shapes", *places])[0]
    assert config.data_dir == "" and fetch_data(config, None) == config and not list(tmp_path.iterdir())
    assert parse_config(["shapes", "--data-dir", "Datasets/shapes", *places])[0].data_dir == "Datasets/shapes"


def test_the_usual_data_need_no_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--data-dir", "Datasets/shapes"], ["--epochs", "2"]):
        assert parse_config(arguments)[1] == "shapes"
    (tmp_path / "Datasets" / "flickr8k" / "Images").mkdir(parents=True)
    for arguments in ([], ["--data-dir", "Datasets/flickr8k"]):
        assert parse_config(arguments)[1] == "flickr8k"
    with pytest.raises(UserError, match="--data-dir Datasets/shapes: name the preset"):
        parse_config(["--data-dir", "Datasets/shapes"])


def test_an_encoder_named_as_a_preset_is_no_late_preset():
    config, preset = parse_config(["shapes", "--text-encoder", "gpt2"], "shapes")
    assert (config.text_encoder, preset) == ("gpt2", "shapes")


def test_words_without_quotes_are_asked_about():
    with pytest.raises(UserError, match='python inference.py "a red circle"'):
        inference.search(read_search(["a", "red", "circle"]))


@pytest.mark.parametrize("classes", [["a dog"], ["a dog", "a dog "]])
def test_one_class_is_nothing_to_choose_from(classes):
    with pytest.raises(UserError, match='--classify "a dog": one class is always 100%; name two or more'):
        Search(image="photo.jpg", classify=tuple(classes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")
def test_a_missing_device_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--device cuda"):
        main.main(*parse_config(["shapes", "--device", "cuda"]))
    assert not list(tmp_path.iterdir())
