"""The figure of a run is one: printed, in history.csv, in the model card and by evaluate.py, to the bit of each score."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from config import Config, parse_config
from embedding import open_model
from encoders import precision
from evaluation import retrieval
from training import report
from training.keeping import Start

VIT = {"image_encoder": "vit", "size": 32, "image_width": 24, "image_layers": 2}
KINDS = {
    "all weights": {},
    "moving average": {"ema_decay": 0.5},
    "frozen, one crop, cca": {"freeze": "both", "cached_crops": 1, "head_init": "cca", "head_lr": 1e-3},
    "frozen, three crops": {"freeze": "both", "cached_crops": 3, "head_lr": 1e-3},
    "convolutions from a stage on": {"image_unfreeze_from": "layer3", "cached_crops": 2},
    "a transformer from a stage on": VIT | {"image_unfreeze_from": "blocks.1", "cached_crops": 2},
}


@pytest.fixture
def scored(monkeypatch):
    """The similarities of which recall is computed, as they come."""
    found, recall = [], retrieval.recall

    def keep(similarity, *arguments):
        found.append(np.array(similarity))
        return recall(similarity, *arguments)

    monkeypatch.setattr(retrieval, "recall", keep)
    monkeypatch.setattr(report, "recall", keep)
    return found


def train(flags):
    config, _ = parse_config(flags, "shapes")
    main.train(config)
    return config.run_dir


def check_figures(run, printed, json_file):
    """Checks that the files and the lines of a run say what evaluate.py wrote."""
    with open(f"{run}/history.csv", newline="", encoding="utf-8") as file:
        best = max(float(row["rsum"]) for row in csv.DictReader(file))
    scores = json.loads(json_file.read_text(encoding="utf-8"))
    assert scores["rsum_of_cosines"] == best
    lines = re.findall(r"^rsum ([\d.]+)", printed, re.MULTILINE)
    assert lines[0] == f"{best:.1f}"
    card = Path(run, "README.md").read_text(encoding="utf-8")
    assert f"{scores['rsum']:.1f}" in card and f"{best:.1f}" in card and lines[-1] == f"{scores['rsum']:.1f}"
    for side in ("image_to_text", "text_to_image"):
        assert f"| {side.replace('_', ' ')} | {scores[side]['R@1']:.1f} | {scores[side]['R@5']:.1f} |" in card


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_scored_again_has_the_same_figure(small_flags, tmp_path, scored, evaluate_here, capsys, kind, precision):
    run = train(small_flags(**KINDS[kind], precision=precision))
    printed, trained = capsys.readouterr().out, list(scored)
    scored.clear()
    evaluate_here("retrieval", "--run", run, "--split", "val", "--device", "cpu", "--json", tmp_path / "scores.json")
    check_figures(run, printed, tmp_path / "scores.json")
    for similarity in scored:  # corrected for hubness, and the cosines
        assert any(np.array_equal(similarity, other) for other in trained)


def test_adapters_are_scored_as_they_are_saved(small_flags, tmp_path, scored, evaluate_here, monkeypatch):
    whole = train(small_flags("whole", **VIT, epochs=1))
    monkeypatch.setattr(main, "score_start", lambda *arguments: Start(-1.0))  # so that an epoch of the adapters is the best
    flags = {"model": whole, "lora_rank": 4, "precision": "bf16", "head_lr": 1e-2, "text_encoder_lr": 1e-2}
    run = train(small_flags("adapted", **flags))
    trained = list(scored)
    scored.clear()
    evaluate_here("retrieval", "--run", run, "--split", "val", "--device", "cpu", "--json", tmp_path / "scores.json")
    with open(f"{run}/history.csv", newline="", encoding="utf-8") as file:
        rsums = [float(row["rsum"]) for row in csv.DictReader(file)]
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["rsum_of_cosines"] == max(rsums)
    assert all(any(np.array_equal(similarity, other) for other in trained) for similarity in scored)


def test_a_runs_own_precision_is_taken_where_the_device_has_it(run, monkeypatch, capsys):
    assert open_model(run, "cpu", "auto")[2] == torch.float32  # the fixture's, whatever this processor prefers
    assert open_model(run, "cpu", "bf16")[2] == torch.bfloat16  # what is asked for
    monkeypatch.setattr(precision, "load_run", lambda run_dir: {"config": Config(precision="fp16")})
    monkeypatch.setattr(precision, "can_multiply", lambda device, dtype: dtype != torch.float16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # a processor without bf16
    assert open_model(run, "cpu", "auto")[2] == torch.float32
    assert f"{run}: trained in fp16, which cpu cannot compute; in float32 figures differ a little" in capsys.readouterr().out
