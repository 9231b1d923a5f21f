"""The command line for people: a help of one screen, and mistakes that are answered with what was meant."""

import pytest

import inference
from config import PRESETS, Config, parse_config
from utils.errors import UserError


def printed_help(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        parse_config(list(arguments), "shapes")
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_help_fits_on_a_screen_and_shows_the_presets_own_values(capsys):
    shown = printed_help(capsys, "best", "--help")
    lines = shown.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 110
    assert all(f"  {name} " in shown for name in PRESETS)
    assert "--epochs 12" in shown and "--run-dir runs/best" in shown and "--help-all" in shown
    assert "--batch-size 128" in printed_help(capsys, "--help")


def test_all_flags_are_shown_on_request(capsys):
    shown = printed_help(capsys, "--help-all")
    assert not [name for name in vars(Config()) if f"--{name.replace('_', '-')}" not in shown]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["shape"], "did you mean shapes?"),
        (["nothing-like-it"], "is unknown; there are flickr8k"),
        (["--batch-size", "64", "shapes"], "python main.py shapes --batch-size 64"),
    ],
)
def test_a_mistaken_preset_is_answered(arguments, message):
    with pytest.raises(UserError) as raised:
        parse_config(arguments, "shapes")
    assert message in str(raised.value)


def test_an_encoder_named_as_a_preset_is_no_late_preset():
    config, preset = parse_config(["shapes", "--text-encoder", "gpt2"], "shapes")
    assert (config.text_encoder, preset) == ("gpt2", "shapes")


def test_words_without_quotes_are_asked_about():
    with pytest.raises(UserError, match='python inference.py "a red circle"'):
        inference.search(("a", "red", "circle"))
