"""Fine-tuning a whole model: adapters, rates by depth, what it forgets, and trackers."""

import csv
import json
import sqlite3
from dataclasses import replace
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import clip
import main
from config import parse_config
from Datasets import shapes
from training.adapters import add_adapters, describe_adapters, layers_to_adapt, merged
from training.keeping import choose, kept_score, mix
from training.optimization import is_stale, layers_above, parameter_groups
from training.state import TrainState
from training.trackers import Trackers, load_package
from utils.errors import UserError


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """A folder with two pictures for each pair of two colours and the shapes."""
    folder = tmp_path_factory.mktemp("classes") / "classes"
    shapes.draw_classes(folder, pictures=2, colors=("red", "blue"))
    return folder


@pytest.fixture
def tune(run, sample, tmp_path):
    """tune(*flags): fine-tunes the fixture's run for two epochs, in tmp_path/tuned unless the flags name another folder."""

    def start(*flags):
        places = ["--data-dir", str(sample), "--run-dir", str(tmp_path / "tuned"), "--cache-dir", str(tmp_path / "cache")]
        sizes = ["--batch-size", "32", "--epochs", "2", "--device", "cpu", "--precision", "fp32"]
        main.train(parse_config(["shapes", "--model", str(run), *places, *sizes, *map(str, flags)], "shapes")[0])
        return tmp_path / "tuned"

    return start


def small_text_model():
    """A run's model whose image encoder has linear layers, too."""
    flags = (
        "shapes --image-encoder vit --size 32 --image-width 24 --image-layers 2 --text-layers 1 --text-width 32 --text-heads 2"
    )
    torch.manual_seed(0)
    return clip.create_model(parse_config(flags.split(), "shapes")[0], ["a red circle", "a blue star"]).eval()


def inputs(model):
    size = model.image_encoder.size
    torch.manual_seed(1)
    return torch.randint(0, 256, (2, 3, size, size)), torch.tensor([[2, 5, 6, 3], [2, 6, 3, 0]])


# ---- adapters ----------------------------------------------------------------------------------------------------


def test_adapters_change_nothing_until_they_are_trained_and_merge_into_the_weights():
    model = small_text_model()
    image, text = inputs(model)
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(image, text)[0]
        add_adapters(model, 4)
        model.eval()
        torch.testing.assert_close(model(image, text)[0], before)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
        changed, whole = model(image, text)[0], merged(model)
        assert (changed - before).abs().max() > 1e-2
        torch.testing.assert_close(whole(image, text)[0], changed, atol=1e-4, rtol=1e-4)
    assert list(whole.state_dict()) == names  # a run folder has plain weights
    assert any("lora_" in name for name in model.state_dict())  # merging makes a copy


def test_only_adapters_heads_and_temperature_are_trained():
    model, rank = small_text_model(), 4
    layers = {part: layers_to_adapt(getattr(model, part).backbone) for part in ("image_encoder", "text_encoder")}
    sizes = [
        sum(getattr(model, part).backbone.get_submodule(name).weight.shape) for part, names in layers.items() for name in names
    ]
    heads = sum(p.numel() for p in [*model.image_projection.parameters(), *model.text_projection.parameters()])
    add_adapters(model, rank)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == rank * sum(sizes) + heads + 1
    assert f"{trained / 1e6:.2f} of" in describe_adapters(model, rank)


def test_attentions_of_torch_get_one_adapter_for_all_that_is_in_them():
    block = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "mlp": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))})
    assert layers_to_adapt(block) == ["attn", "mlp.0", "mlp.1"]


def test_an_encoder_without_linear_layers_is_named(tune):
    with pytest.raises(UserError, match="--lora-rank 8: the image encoder has no linear layers"):
        tune("--lora-rank", 8)


@pytest.fixture
def linear_run(sample, tmp_path):
    """The folder of a run whose encoders both have linear layers."""
    flags = (
        "shapes --image-encoder vit --size 32 --image-width 24 --image-layers 2 --text-layers 1 --text-width 32 --text-heads 2"
    )
    places = ["--data-dir", sample, "--run-dir", tmp_path / "linear", "--cache-dir", tmp_path / "cache"]
    flags = [*flags.split(), *map(str, places), "--epochs", "1", "--batch-size", "32", "--device", "cpu"]
    main.train(parse_config(flags, "shapes")[0])
    return tmp_path / "linear"


def test_a_run_with_adapters_goes_on_with_the_same_weights(linear_run, tune, tmp_path, monkeypatch):
    flags = ("--model", linear_run, "--lora-rank", 4, "--ema-decay", 0.5)
    whole = tune(*flags)
    saved = clip.load(whole, "cpu")[0].state_dict()
    assert not any("lora_" in name for name in saved)
    last = torch.load(whole / "last.pt", weights_only=True)["model"]
    assert any("lora_" in name for name in last) and not any("base_layer" in name for name in last)
    whole.rename(tmp_path / "whole")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(main, "print_epoch", stop)
        tune(*flags)
    main.train(parse_config(["shapes", "--resume", "--run-dir", str(tmp_path / "tuned")], "shapes")[0])
    again = torch.load(tmp_path / "tuned" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in last.items())
    resumed = clip.load(tmp_path / "tuned", "cpu")[0].state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in saved.items())


def test_too_little_memory_is_said_before(tune, monkeypatch, capsys):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1e6))
    tune("--epochs", 1)
    assert "GB of memory are needed, and 0.0 GB are free: lower --batch-size" in capsys.readouterr().out


# ---- rates -------------------------------------------------------------------------------------------------------


class Layered(nn.Module):
    """Parameters in the order in which open_clip's ViT has them: the projection comes first."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Parameter(torch.zeros(2, 2))
        self.embedding = nn.Embedding(2, 2)
        self.blocks = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        self.norm = nn.LayerNorm(2, bias=False)


def test_layers_are_counted_from_the_last_one_down():
    expected = {"proj": 0, "norm.weight": 0, "blocks.1.weight": 1, "blocks.0.weight": 2, "embedding.weight": 3}
    assert layers_above(Layered(), "x.") == {f"x.{name}": height for name, height in expected.items()}


def test_rates_fall_by_the_decay_with_each_layer():
    model = small_text_model()
    config = replace(parse_config(["shapes"], "shapes")[0], layer_decay=0.5, image_encoder_lr=1.0, text_encoder_lr=1.0)
    rate = {id(p): group["base_lr"] for group in parameter_groups(model, config) for p in group["params"]}
    backbone = model.image_encoder.backbone
    assert rate[id(backbone.norm.weight)] == 1.0
    assert rate[id(backbone.blocks[1].mlp.fc1.weight)] == 0.5 and rate[id(backbone.blocks[0].mlp.fc1.weight)] == 0.25
    assert rate[id(backbone.patch_embed.proj.weight)] == 0.125
    assert rate[id(model.image_projection.projection.weight)] == config.head_lr
    alone = parameter_groups(model, replace(config, layer_decay=1.0))
    assert {group["base_lr"] for group in alone} == {1.0, config.head_lr}


def test_training_is_stale_after_so_many_epochs_without_a_better_rsum():
    assert not is_stale([], -1, 2) and not is_stale([1, 2, 3], -1, 0)
    assert not is_stale([5, 4], -1, 2)  # the first of them was the best
    assert is_stale([5, 4, 5], -1, 2)
    assert not is_stale([5, 4, 6], -1, 2)
    assert is_stale([5, 6], 7, 2)  # no better than what it started from


def test_training_stops_early(tune, capsys):
    run = tune("--early-stop", 1, "--epochs", 9, "--head-lr", 1e-9, "--image-encoder-lr", 1e-9, "--text-encoder-lr", 1e-9)
    assert "stopped early: 1 epochs without a better rsum" in capsys.readouterr().out
    assert len((run / "history.csv").read_text().splitlines()) == 2


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_weights_are_mixed():
    before = {"w": torch.tensor([0.0, 2.0]), "n": torch.tensor(1)}
    after = {"w": torch.tensor([4.0, 2.0]), "n": torch.tensor(3)}
    mixed = mix(before, after, 0.25)
    assert torch.equal(mixed["w"], torch.tensor([1.0, 2.0])) and mixed["n"] == 3
    assert torch.equal(mix(before, after, 1.0)["w"], after["w"])


def test_the_best_mixture_loses_no_more_than_its_share():
    rows = [{"rsum": r, "kept": k} for r, k in [(100, 80.0), (150, 77.0), (190, 75.9), (200, 60.0)]]
    assert choose(rows, 0.05) is rows[1]  # 76 is the least that may be kept
    assert choose(rows, 0.1) is rows[2]
    assert choose(rows, 0.9) is rows[3]
    assert choose(rows, 0.0) is rows[0]


def test_the_watched_score_is_that_of_evaluate(run, sample, classes, tmp_path, evaluate_here):
    model, _ = clip.load(run, "cpu")
    config = replace(parse_config(["shapes"], "shapes")[0], keep_folder=str(classes), keep_template="a {} .")
    arguments = "--device", "cpu", "--precision", "fp32", "--json", tmp_path / "scores.json"
    cpu = torch.device("cpu"), torch.float32
    evaluate_here(
        "zeroshot", "--run", run, "--images", classes, "--template", "a {} .", *arguments, "--output", tmp_path / "c.png"
    )
    assert kept_score(model, config, *cpu) == pytest.approx(json.loads((tmp_path / "scores.json").read_text())["top1"])
    evaluate_here("retrieval", "--run", run, "--data-dir", sample, *arguments)
    scores = json.loads((tmp_path / "scores.json").read_text())
    mean = (scores["image_to_text"]["R@1"] + scores["text_to_image"]["R@1"]) / 2
    assert kept_score(model, replace(config, keep_folder="", keep_data=str(sample)), *cpu) == pytest.approx(mean)
    assert kept_score(model, replace(config, keep_folder=""), *cpu) is None


def test_the_mixture_that_is_kept_is_what_the_run_folder_holds(run, tune, classes, capsys):
    rates = ("--head-lr", 1e-2, "--image-encoder-lr", 1e-2, "--text-encoder-lr", 1e-2)
    flags = ("--keep-folder", classes, "--keep-template", "a {} .", "--wise-ft", "--wise-ft-share", 0.3, *rates)
    tuned = tune(*flags)
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((tuned / "tradeoff.csv").open()))
    assert [float(row["share"]) for row in rows] == [number / 10 for number in range(11)]
    [chosen] = [row for row in rows if row["chosen"]]
    assert f"mixture: {float(chosen['share']):.0%} of the new weights" in printed and (tuned / "tradeoff.png").exists()
    assert "kept" in (tuned / "history.csv").read_text().splitlines()[0] and printed.count("  kept ") == 3
    before, after = (clip.load(folder, "cpu")[0].state_dict() for folder in (run, tuned))
    assert any(not torch.equal(value, after[name]) for name, value in before.items()) == (float(chosen["share"]) > 0)
    contents = (tuned / "model.safetensors").read_bytes()
    main.train(parse_config(["shapes", "--resume", "--run-dir", str(tuned)], "shapes")[0])
    assert (tuned / "model.safetensors").read_bytes() == contents  # nothing was trained, so nothing is mixed again


def test_where_no_epoch_beat_the_start_the_best_of_them_is_mixed(run, tune, classes, capsys):
    """It is not the start that is mixed with itself, and what is printed as new is what the epoch had."""
    rates = ("--head-lr", 0.3, "--image-encoder-lr", 0.3, "--text-encoder-lr", 0.3)
    tuned = tune("--keep-folder", classes, "--keep-template", "a {} .", "--wise-ft", *rates)
    printed = capsys.readouterr().out
    epochs = [float(row["rsum"]) for row in csv.DictReader((tuned / "history.csv").open())]
    rows = list(csv.DictReader((tuned / "tradeoff.csv").open()))
    old, new = (float(rows[end]["rsum"]) for end in (0, -1))
    assert old > new == max(epochs)
    assert f"no epoch beat the start: rsum {new:.1f} at best, {old:.1f} before" in printed
    assert f"(new {new:.1f}, old {old:.1f})" in printed and "\nmixture, in " in printed and "best epoch" not in printed
    trained, before = (clip.load(folder, "cpu")[0].state_dict() for folder in (tuned, run))
    weights = safetensors.torch.load_file(tuned / "trained" / "model.safetensors")
    assert any(not torch.equal(value, weights[name]) for name, value in before.items())
    share = float(next(row["share"] for row in rows if row["chosen"]))
    assert all(torch.equal(value, trained[name]) for name, value in mix(before, weights, share).items())
    assert "a mixture of those before and after" in (tuned / "README.md").read_text()


def test_a_run_that_kept_no_epochs_weights_says_so(tune, classes, capsys):
    tuned = tune("--head-lr", 0.3, "--image-encoder-lr", 0.3, "--text-encoder-lr", 0.3)
    flags = ["--keep-folder", str(classes), "--keep-template", "a {} .", "--wise-ft"]
    main.train(parse_config(["shapes", "--resume", "--run-dir", str(tuned), *flags], "shapes")[0])
    assert "mixture: none, as the run kept the weights of no epoch" in capsys.readouterr().out
    assert not (tuned / "tradeoff.csv").exists()


@pytest.mark.parametrize(("wise_ft", "rsums", "kept"), [(True, [1, 2], "new"), (False, [1, 2], None), (False, [2, 1], "old")])
def test_the_best_trained_epoch_is_kept_or_none(tmp_path, monkeypatch, wise_ft, rsums, kept):
    """With --wise-ft switched off and on again, an earlier epoch than the best must not be mixed."""
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "weights").write_text("old")
    monkeypatch.setattr("training.state.save_weights", lambda _, folder: (folder / "weights").write_text("new"))
    config = SimpleNamespace(run_dir=tmp_path, wise_ft=wise_ft)
    state = SimpleNamespace(config=config, rsums=rsums, scored_model=None, history=[{"epoch": 2}], save=lambda: None)
    TrainState.save_epoch(state, False)
    found = tmp_path / "trained" / "weights"
    assert (found.read_text() if found.exists() else None) == kept


def test_what_does_not_improve_is_not_kept(run, tune, capsys):
    tuned = tune("--head-lr", 0.3, "--image-encoder-lr", 0.3, "--text-encoder-lr", 0.3)
    before, after = (clip.load(folder, "cpu")[0].state_dict() for folder in (run, tuned))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert "best before fine-tuning, in" in capsys.readouterr().out


def test_a_folder_without_classes_is_named(tune, run, classes, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--keep-template 'a': write {} in it once"):
        tune("--keep-folder", classes, "--keep-template", "a")
    with pytest.raises(UserError, match="is the run that is fine-tuned; name another"):
        tune("--run-dir", run)
    assert not (tmp_path / "tuned").exists()  # nothing was started
    with pytest.raises(UserError, match="--keep-folder .*empty: no class folders there"):
        tune("--keep-folder", tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no run is there"):
        tune("--model", tmp_path / "nowhere")


# ---- models side by side -----------------------------------------------------------------------------------------


def test_models_are_compared_by_recall_speed_and_size(run, linear_run, classes, sample, tmp_path, evaluate_here, capsys):
    other = str(linear_run)
    places = (
        "--output",
        tmp_path / "compare.png",
        "--json",
        tmp_path / "scores.json",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    )
    template = ("--images", classes, "--template", "a {} .")
    evaluate_here("compare", "--run", run, other, "--data-dir", sample, *template, *places)
    rows = json.loads((tmp_path / "scores.json").read_text())["runs"]
    evaluate_here("retrieval", "--run", run, "--data-dir", sample, *places[2:])
    assert rows[str(run)]["rsum"] == json.loads((tmp_path / "scores.json").read_text())["rsum"]
    assert rows[other]["width"] == 256 and rows[other]["pixels"] == 32
    assert all(row["pictures_per_second"] > 0 and row["captions_per_second"] > 0 for row in rows.values())
    evaluate_here("zeroshot", "--run", run, *template, *places)
    assert rows[str(run)]["top1"] == json.loads((tmp_path / "scores.json").read_text())["top1"]
    lines = capsys.readouterr().out.splitlines()
    table = [line.split()[0] for line in lines if line.startswith((f"{run} ", f"{other} "))]
    assert table == sorted((str(run), other), key=lambda name: -rows[name]["rsum"])  # the best comes first
    capsys.readouterr()
    shapes.draw(tmp_path / "other", train=32, val=8, test=8, seed=9)
    flags = ["shapes", "--data-dir", tmp_path / "other", "--run-dir", tmp_path / "third", "--cache-dir", tmp_path / "cache"]
    main.train(parse_config([*map(str, flags), "--epochs", "1", "--batch-size", "16", "--device", "cpu"], "shapes")[0])
    with pytest.raises(UserError, match="no images in common; name one data set"):
        evaluate_here("compare", "--run", run, tmp_path / "third", *places)
    with pytest.raises(UserError, match="at least two models"):
        evaluate_here("compare", "--run", run)


# ---- trackers ----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_losses_rates_recalls_and_pictures(tune):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tuned = tune("--report-to", "tensorboard")
    events = EventAccumulator(str(tuned / "tensorboard"))
    events.Reload()
    history = list(csv.DictReader((tuned / "history.csv").open()))
    for name in ("loss", "val_loss", "temperature", "rsum", "text_to_image_R@1"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(int(row["epoch"]), pytest.approx(float(row[name]), rel=1e-5)) for row in history]
    assert [event.step for event in events.Scalars("image_encoder_lr")] == [1, 2]
    assert {"matches", "similarity"} <= set(events.Tags()["images"])


def test_trackio_gets_them_too(tune, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    tune("--report-to", "trackio")
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(metrics) for (metrics,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    assert sum("rsum" in row for row in rows) == 2


def test_wandb_and_mlflow_write_offline(tune, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its database needs the whole package
    tuned = tune("--report-to", "wandb", "mlflow")
    assert list(tuned.glob("wandb/offline-run-*/*.wandb"))
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("clip").experiment_id])
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "rsum")] == [1, 2]
    assert any(file.path == "matches.png" for file in client.list_artifacts(run.info.run_id))


def test_a_missing_package_and_a_tracker_that_fails_are_one_line(tmp_path, monkeypatch, capsys):
    config = replace(parse_config(["shapes"], "shapes")[0], report_to=("wandb",), run_dir=str(tmp_path))
    monkeypatch.setattr("training.trackers.PACKAGES", {"wandb": "no_such_package"})
    with pytest.raises(UserError, match="--report-to wandb: pip install wandb"):
        load_package("wandb")
    trackers = Trackers(replace(config, report_to=()))

    class Broken:
        def log(self, figures, epoch):
            raise OSError("the disk is full")

    trackers.trackers["broken"] = Broken()
    trackers.log({"epoch": 1, "lr_scale": 1.0, "rsum": 100.0}, config)
    assert "--report-to broken: the disk is full" in capsys.readouterr().out and not trackers.trackers
