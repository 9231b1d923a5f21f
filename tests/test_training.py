"""Training end to end: run folders, resuming, frozen encoders, rates, and the errors of a run."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import run_script
from PIL import Image

import clip
import GAN
import inference
import main
from captions import load_captions
from config import HUBNESS_FILE, PRESETS, Config, heads_config, parse_config
from evaluation.splits import select_rows
from modules import ImageEncoder
from training import checkpoint, feature_cache, optimization, report, steps
from utils import cache
from utils.cache import model_key
from utils.errors import UserError

RUN_FILES = {
    "config.json", "model.safetensors", "tokenizer.json", "history.csv", "last.pt", "curves.png",
    "similarity.png", "matches.png", "README.md", "splits.csv", "cache.txt",
}  # fmt: skip


def train(flags, *more):
    config, _ = parse_config([*flags, *more], "shapes")
    return main.train(config)


def weights(run_dir):
    return safetensors.torch.load_file(run_dir / "model.safetensors")


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_folder_is_complete_and_loads_without_its_sources(small_flags, tmp_path):
    model = train(small_flags())
    assert {path.name for path in (tmp_path / "run").iterdir()} - {HUBNESS_FILE} == RUN_FILES  # which is kept where it helps
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert list(history["epoch"]) == [1, 2]
    assert history["chance_loss"].tolist() == pytest.approx([math.log(32)] * 2)
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded, preprocess = clip.load(tmp_path / "moved", device="cpu")
    assert_equal_weights(model.state_dict(), loaded.state_dict())
    assert loaded.tokenizer.to_str() == model.tokenizer.to_str()


def test_features_of_several_layers_train_and_come_back(small_flags, tmp_path):
    layers = {"image_feature_stages": "layer3,layer4", "text_feature_layers": 2}
    model = train(small_flags(freeze="both", text_layers=2, **layers)).eval()
    loaded, _ = clip.load(tmp_path / "run", device="cpu")
    assert_equal_weights(model.state_dict(), loaded.state_dict())
    image = torch.randint(256, (2, 3, model.image_encoder.size, model.image_encoder.size))
    torch.testing.assert_close(model.encode_image(image), loaded.encode_image(image))
    text = torch.tensor([[model.tokenizer.token_to_id(token) for token in ("[CLS]", "red", "[SEP]")]])
    torch.testing.assert_close(model.encode_text(text), loaded.encode_text(text))


def test_one_seed_gives_the_same_weights_and_another_others(small_flags, tmp_path):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_flags(run, seed=seed))
    assert_equal_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    other = weights(tmp_path / "c")
    assert not all(torch.equal(value, other[name]) for name, value in weights(tmp_path / "a").items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze": "image"},
        {"schedule": "plateau", "patience": 0},
        {"micro_batch_size": 8, "captions_per_image": 2},
        {"gan": "joint", "freeze": "text"},
        {"ema_decay": 0.9, "freeze": "text"},
        {"loss": "sigmoid", "unique_images": False, "targets": "image", "steps": 11},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(small_flags, tmp_path, monkeypatch, options):
    train(small_flags("whole", epochs=4, **options))
    calls, train_epoch = [], main.train_epoch

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    monkeypatch.setattr(main, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small_flags("halves", epochs=4, **options))
    assert (tmp_path / "halves" / "last.pt").exists()
    main.train(parse_config(["shapes", "--run-dir", str(tmp_path / "halves"), "--resume"], "shapes")[0])
    whole, halves = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "halves"))
    assert_equal_weights(whole["model"], halves["model"])
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    columns = ["epoch", "loss", "rsum", "lr_scale"]
    assert [[row[c] for c in columns] for row in whole["history"]] == [[row[c] for c in columns] for row in halves["history"]]


def test_an_average_of_the_weights_that_begins_on_resume_begins_with_the_weights(small_flags, tmp_path):
    """The checkpoint is that of an epoch's last step, after which nothing moves the average before it is scored."""
    train(small_flags(epochs=1))
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    config, _ = parse_config(small_flags(epochs=2, resume="yes", ema_decay=0.9), "shapes")
    table, image_dir, _ = main.read_table(config)
    model = clip.create_model(config, table["caption"][table["split"] == "train"])
    splits, _ = main.load_splits(config, table, image_dir, model, 0)
    state = main.create_state(config, model, splits, torch.device("cpu"), torch.float32)
    state.restore()
    assert_equal_weights(saved["model"], state.scored_model.state_dict())


def test_the_heads_are_first_trained_without_generated_pictures():
    config = Config(extra_data="somewhere", batch_size=128, run_dir="runs/x")
    heads = heads_config(config, num_images=500)
    assert (heads.extra_data, heads.batch_size, heads.freeze, heads.run_dir) == ("", 500, "both", "runs/x/heads")


RATES = ("head_lr", "image_encoder_lr", "text_encoder_lr")


def saved_weights(run_dir):
    return torch.load(run_dir / "last.pt", weights_only=True)["model"]


def largest_step(before, after):
    """How far the weights moved at most, BatchNorm's statistics aside."""
    names = [name for name in before if before[name].is_floating_point() and "running" not in name]
    return max((after[name] - before[name]).abs().max().item() for name in names)


def test_a_resumed_run_takes_the_rates_that_it_is_given(small_flags, tmp_path):
    """Three rates of 1e-9 each: groups that were apart have one rate, and nothing moves any more."""
    train(small_flags(epochs=1, weight_decay=0.5))
    before = saved_weights(tmp_path / "run")
    low = dict.fromkeys(RATES, 1e-9)
    train(small_flags(epochs=2, resume="yes", weight_decay=0.1, **low))
    assert 0 < largest_step(before, saved_weights(tmp_path / "run")) < 1e-6
    groups = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["base_lr"] for group in groups} == {1e-9} and {group["weight_decay"] for group in groups} == {0.0, 0.1}
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert [saved[name] for name in RATES] == [1e-9] * 3 and (saved["epochs"], saved["weight_decay"]) == (2, 0.1)


def test_a_resumed_run_may_change_its_precision(small_flags, tmp_path):
    train(small_flags(epochs=1))
    for epochs, precision in ((2, "fp16"), (3, "bf16")):
        train(small_flags(epochs=epochs, resume="yes", precision=precision))
        history = pd.read_csv(tmp_path / "run" / "history.csv")
        assert len(history) == epochs and history["loss"].iloc[-1] < history["loss"].iloc[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 48},
        {"pooling": "first"},
        {"freeze": "image"},
        {"image_feature_stages": "layer3"},
        {"seed": 1},
        {"max_length": 9},
    ],
)
def test_a_resumed_run_keeps_what_makes_its_model(small_flags, tmp_path, changed):
    train(small_flags(epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    [name] = changed
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .* was started with .*leave the flag out"):
        train(small_flags(epochs=2, resume="yes", **changed))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_resumed_run_with_other_frozen_weights_is_refused_and_with_moved_ones_is_not(small_flags, tmp_path):
    train(small_flags("source", epochs=1))
    encoder = clip.load(tmp_path / "source", device="cpu")[0].image_encoder.backbone.state_dict()
    safetensors.torch.save_file(encoder, tmp_path / "a.safetensors")
    options = {"freeze": "image", "epochs": 1, "image_weights": tmp_path / "a.safetensors"}
    train(small_flags(**options))
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    options |= {"epochs": 2, "resume": "yes", "image_weights": tmp_path / "b.safetensors"}
    train(small_flags(**options))
    safetensors.torch.save_file({name: value * 2 for name, value in encoder.items()}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="was started with other frozen weights"):
        train(small_flags(**options | {"epochs": 3}))


def test_a_text_encoder_in_half_precision_comes_back_as_it_was_trained(small_flags, tmp_path, sample):
    train(small_flags("source", epochs=1))
    source, _ = clip.load(tmp_path / "source", device="cpu")
    source.text_encoder.backbone.to(torch.bfloat16).save_pretrained(tmp_path / "text")
    shutil.copy(tmp_path / "source" / "tokenizer.json", tmp_path / "text")
    flags = small_flags(text_encoder=tmp_path / "text", epochs=1, freeze="text", precision="fp32")
    model = train(flags, "--text-weights", "pretrained").eval()
    loaded, _ = clip.load(tmp_path / "run", device="cpu")
    assert {value.dtype for value in loaded.state_dict().values()} <= {torch.float32, torch.int64}
    text = clip.tokenize(["a red circle", "a large blue star"])
    with torch.no_grad():
        assert torch.equal(model.encode_text(text), loaded.encode_text(text))
    assert len(inference.find_matches(loaded, torch.eye(256)[:5], "a red circle", list("abcde"), n=2)) == 2


def half_overflowing(model, steps):
    """Lets the gradient of a head be infinite in the first `steps` backward passes."""
    calls = []

    def poison(gradient):
        calls.append(None)
        return gradient * math.inf if len(calls) <= steps else gradient

    model.text_projection.projection.weight.register_hook(poison)


def test_in_fp16_a_step_whose_gradient_is_not_finite_is_left_out_and_only_a_run_of_them_ends_the_training(
    small_flags, tmp_path, monkeypatch
):
    train_epoch, overflowing = main.train_epoch, [2]

    def poisoned(state, *rest):
        half_overflowing(state.model, overflowing[0])
        return train_epoch(state, *rest)

    monkeypatch.setattr(main, "train_epoch", poisoned)
    train(small_flags(epochs=1, precision="fp16"))
    assert list(pd.read_csv(tmp_path / "run" / "history.csv")["skipped_steps"]) == [2]  # of three
    assert pd.read_csv(tmp_path / "run" / "history.csv")["loss"].notna().all()
    overflowing[0] = 10**6
    monkeypatch.setattr(steps, "CHECK_EVERY", 3)
    monkeypatch.setattr(steps, "MIN_LOSS_SCALE", 2.0**13)  # reached after four steps
    with pytest.raises(UserError, match="in fp16 the gradient of too many steps in a row is not finite"):
        train(small_flags(epochs=20, precision="fp16", resume="yes"))
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_two_encoders_with_the_same_weights_share_no_cached_features(small_flags):
    def keys(**options):
        torch.manual_seed(0)
        config, _ = parse_config(small_flags(**options), "shapes")
        model = clip.create_model(config, ["a red circle"])
        return model_key(model.image_encoder), model_key(model.text_encoder)

    vit = {"image_encoder": "vit", "image_width": 64, "image_layers": 1, "patch_size": 16, "size": 32}
    (two_heads, text), (four_heads, same_text) = keys(**vit, image_heads=2), keys(**vit, image_heads=4)
    assert two_heads != four_heads and text == same_text
    torch.manual_seed(0)
    gelu = ImageEncoder("vit_tiny_patch16_224", "random", 32)
    quick = ImageEncoder("vit_tiny_patch16_224", "random", 32)
    quick.load_state_dict(gelu.state_dict())
    assert model_key(gelu) == model_key(quick)
    quick.architecture["name"] = "vit_tiny_patch16_quickgelu_224"
    assert model_key(gelu) != model_key(quick)
    assert keys(text_heads=2)[1] != keys(text_heads=4)[1] and keys(pooling="first")[1] != keys()[1]


def test_activations_are_kept_in_16_bits_unless_fp32_is_asked_for(small_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a processor without bf16
    losses = {}
    for precision, dtype in (("auto", np.float16), ("fp32", np.float32)):
        cache = tmp_path / precision
        train(small_flags(precision, image_unfreeze_from="layer3", precision=precision, cache_dir=cache))
        assert {np.load(path).dtype for path in cache.glob("activations-*")} == {np.dtype(dtype)}
        losses[precision] = pd.read_csv(tmp_path / precision / "history.csv")["loss"]
    assert losses["auto"].to_numpy() == pytest.approx(losses["fp32"].to_numpy(), rel=2e-3)


def test_a_disk_that_is_too_small_for_what_is_kept_is_named_before_anything_is_written(small_flags, tmp_path, monkeypatch):
    """The pictures take 2.3 MB, which would go in, and the activations of 30 crops of each ten times as much."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(UserError, match=r"cache: 0.\d GB are needed there, but only 0.0 GB are free.*--cache-dir"):
        train(small_flags(image_unfreeze_from="layer3", cached_crops=30))
    assert not (tmp_path / "run").exists()
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").glob("*")} <= {"contents"}  # digests: a few kB
    train(small_flags(image_unfreeze_from="layer3", cached_crops=2, epochs=1))


def test_the_average_of_the_weights_is_what_is_scored_and_kept(small_flags, tmp_path, monkeypatch):
    taken, scored = [], []
    step, score = optimization.AdamW.step, report.score

    def keep_step(optimizer, *arguments):
        step(optimizer, *arguments)
        taken.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])

    def keep_score(model, *arguments):
        scored.append(model.state_dict()["image_projection.projection.weight"].clone())
        return score(model, *arguments)

    monkeypatch.setattr(optimization.AdamW, "step", keep_step)
    monkeypatch.setattr(report, "score", keep_score)
    model = train(small_flags(epochs=1, ema_decay=0.7))
    assert len(taken) > 2
    expected = taken[0]
    for now in taken[1:]:
        expected = [0.7 * average + 0.3 * value for average, value in zip(expected, now)]
    rows = [row for group in optimization.parameter_groups(model, Config()) for row in group["params"]]
    for average, kept in zip(expected, rows, strict=True):
        torch.testing.assert_close(average, kept.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(scored[0], weights(tmp_path / "run")["image_projection.projection.weight"])


def test_an_earlier_run_moves_aside(small_flags, tmp_path, capsys):
    train(small_flags(epochs=1))
    before = weights(tmp_path / "run")
    train(small_flags(epochs=1, seed=1))
    assert "run.1" in capsys.readouterr().out
    assert_equal_weights(before, weights(tmp_path / "run.1"))


@pytest.mark.parametrize("freeze, views", [("image", 3), ("text", 1), ("both", 1)])
def test_frozen_encoders_keep_still_and_are_computed_once(small_flags, tmp_path, freeze, views, monkeypatch):
    config, _ = parse_config(small_flags(freeze=freeze, cached_crops=views), "shapes")
    torch.manual_seed(config.seed)
    table, _, _ = load_captions(config.data_dir)
    start = clip.create_model(config, table["caption"][table["split"] == "train"]).state_dict()
    main.train(config)
    end = weights(tmp_path / "run")
    for encoder in ("image", "text"):
        names = [name for name in start if name.startswith(f"{encoder}_encoder.")]
        still = all(torch.equal(start[name], end[name]) for name in names)
        assert still == (freeze in (encoder, "both"))
    assert not torch.equal(start["image_projection.projection.weight"], end["image_projection.projection.weight"])

    def recomputed(*_):
        raise AssertionError("features were computed again")

    shutil.rmtree(tmp_path / "run")
    kept = sorted(map(np.load, (tmp_path / "cache").glob("image-features-*")), key=len)
    assert [len(rows) for rows in kept] == ([] if freeze == "text" else [24, 96 * views])
    if views > 1:
        assert not np.allclose(kept[1][0], kept[1][1])  # two crops of one picture
    if freeze != "text":
        monkeypatch.setattr(feature_cache, "as_batch", recomputed)
    if freeze != "image":
        monkeypatch.setattr(feature_cache, "text_features", recomputed)
    main.train(config)
    assert_equal_weights(end, weights(tmp_path / "run"))


@pytest.mark.parametrize("views", [1, 3])
def test_a_encoder_trained_from_a_stage_keeps_what_is_below_and_runs_it_once(small_flags, tmp_path, views, monkeypatch):
    flags = small_flags(image_unfreeze_from="layer3", cached_crops=views, image_drop_path=0.2) + ["--hflip"] * (views > 1)
    config, _ = parse_config(flags, "shapes")
    torch.manual_seed(config.seed)
    start = clip.create_model(config, load_captions(config.data_dir)[0]["caption"]).image_encoder.state_dict()
    main.train(config)
    end = weights(tmp_path / "run")
    moved = {name.split(".")[1] for name in start if not torch.equal(start[name], end[f"image_encoder.{name}"])}
    assert moved == {"layer3", "layer4"}  # BatchNorm statistics included
    [kept] = [path for path in (tmp_path / "cache").glob("activations-*") if len(np.load(path)) != 24]
    assert len(np.load(kept)) == 96 * views
    monkeypatch.setattr(feature_cache, "as_batch", None)  # would fail if the trunk ran again
    shutil.rmtree(tmp_path / "run")
    main.train(config)
    assert_equal_weights(end, weights(tmp_path / "run"))


def test_every_second_kept_view_is_a_mirror_image(small_flags, tmp_path):
    kept = []
    for folder, flags in (("plain", []), ("mirrored", ["--hflip"])):
        train(small_flags(folder, image_unfreeze_from="layer3", cached_crops=3, epochs=1, cache_dir=tmp_path / folder), *flags)
        [path] = [path for path in (tmp_path / folder).glob("activations-*") if len(np.load(path)) != 24]
        kept.append(np.load(path).reshape(96, 3, -1))
    same = (kept[0] == kept[1]).all(axis=2)
    assert same[:, [0, 2]].all() and not same[:, 1].any()


def test_the_compile_flag_compiles_both_encoders(small_flags, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(type(module).__name__))
    train(small_flags(), "--compile")
    assert compiled == ["ImageEncoder", "DistilBertModel"]


def test_fine_tuning_starts_from_trained_heads(small_flags, sample, tmp_path, monkeypatch):
    train(small_flags("source", epochs=1))
    source, _ = clip.load(tmp_path / "source", device="cpu")
    encoder = source.image_encoder.backbone.state_dict()
    safetensors.torch.save_file(encoder, tmp_path / "image.safetensors")
    source.text_encoder.backbone.save_pretrained(tmp_path / "text")
    shutil.copy(tmp_path / "source" / "tokenizer.json", tmp_path / "text")
    begun = []
    train_epoch = main.train_epoch
    monkeypatch.setattr(
        main, "train_epoch", lambda state, *rest: begun.append(snapshot(state.model)) or train_epoch(state, *rest)
    )

    def snapshot(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    heads = {"epochs": 3, "batch_size": 96}

    def heads_come_first(*given):
        (tmp_path / "run" / "last.pt").write_bytes(b"left by a process that was still ending")
        return main.replace(heads_config(*given), **heads)

    monkeypatch.setattr(main, "heads_config", heads_come_first)
    flags = small_flags(image_weights=tmp_path / "image.safetensors", text_encoder=tmp_path / "text", epochs=1)
    train(flags, "--text-weights", "pretrained", "--heads-first")
    heads = weights(tmp_path / "run" / "heads")
    assert len(begun) == 4
    assert_equal_weights(heads, begun[3])
    prefix = "image_encoder.backbone."
    assert_equal_weights(encoder, {name.removeprefix(prefix): heads[name] for name in heads if name.startswith(prefix)})


def test_steps_end_within_an_epoch_and_lower_the_rates_until_then(small_flags, tmp_path):
    train(small_flags(steps=5))  # an epoch has three
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert len(history) == 2 and len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["losses"]) == 0
    config = Config(warmup=Config().warmup)
    expected = [optimization.lr_scale(step, 5, config, []) for step in (2, 4)]
    assert history["lr_scale"].tolist() == pytest.approx(expected)


def test_train_images_are_drawn_with_the_seed_and_the_others_left_out(small_flags, tmp_path):
    chosen = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small_flags(run, seed=seed, train_images=40, epochs=1))
        splits = pd.read_csv(tmp_path / run / "splits.csv")
        chosen.append(set(splits.loc[splits["split"] == "train", "image"]))
        assert (splits["split"] == "val").sum() == 24
    assert chosen[0] == chosen[1] != chosen[2] and all(len(names) == 40 for names in chosen)
    scored, _, _ = select_rows(str(tmp_path / "a"), ("", "", ""), "train", skip_bad=False)
    assert set(scored["image"]) == chosen[0]
    with pytest.raises(UserError, match="--train-images 97: there are only 96 training images"):
        train(small_flags("d", train_images=97))


def test_a_fixed_temperature_stays_and_a_sigmoid_run_comes_back(small_flags, tmp_path):
    train(small_flags("fixed", temperature=0.2))
    assert pd.read_csv(tmp_path / "fixed" / "history.csv")["temperature"].tolist() == pytest.approx([0.2, 0.2])
    model = train(small_flags("sigmoid", loss="sigmoid"))
    history = pd.read_csv(tmp_path / "sigmoid" / "history.csv")
    assert history["chance_loss"].isna().all() and history["loss"].notna().all()
    loaded, _ = clip.load(tmp_path / "sigmoid", device="cpu")
    assert loaded.logit_bias.item() == model.logit_bias.item() != -10
    assert "sigmoid loss" in (tmp_path / "sigmoid" / "README.md").read_text(encoding="utf-8")


def test_a_run_without_heads_trains_is_loaded_and_searched(small_flags, sample, tmp_path):
    train(small_flags(text_width=96, projection_dim=96, num_projection_layers=0, epochs=1))
    loaded, _ = clip.load(tmp_path / "run", device="cpu")
    matches = inference.find_matches(loaded, torch.eye(96)[:5], "a red circle", list("abcde"), n=2)
    assert len(matches) == 2 and "one space of 96 dimensions" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="nothing but the temperature is left to train"):
        train(small_flags(text_width=96, projection_dim=96, num_projection_layers=0, freeze="both"))


def test_plateau_factor_equals_torchs_scheduler():
    rsums = [10, 20, 19, 18, 17, 25, 24, 24, 23, 22, 21, 26]
    for patience in (0, 1, 2):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        reference = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", factor=0.8, patience=patience, threshold=0, threshold_mode="abs"
        )
        for count, rsum in enumerate(rsums, start=1):
            reference.step(rsum)
            assert optimization.plateau_factor(rsums[:count], patience, 0.8) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_rates_rise_and_fall_as_worked_by_hand():
    config = Config(warmup=0.2)
    rates = [optimization.lr_scale(step, 10, config, []) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[6] == pytest.approx(0.5)  # half of the eight steps after the warm-up
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_each_part_has_its_rate_and_only_matrices_decay(small_flags):
    config, _ = parse_config(small_flags(), "shapes")
    model = clip.create_model(config, ["a red circle"])
    found = {}
    for group in optimization.parameter_groups(model, config):
        for parameter in group["params"]:
            found[id(parameter)] = (group["base_lr"], group["weight_decay"])
    rates = {"image_encoder": config.image_encoder_lr, "text_encoder": config.text_encoder_lr}
    for name, parameter in model.named_parameters():
        decay = config.weight_decay if parameter.ndim > 1 else 0
        assert found[id(parameter)] == (rates.get(name.split(".")[0], config.head_lr), decay)
    assert found[id(model.logit_scale)] == (config.head_lr, 0)


def test_a_vits_position_embeddings_do_not_decay(small_flags):
    vit = {"image_encoder": "vit", "image_width": 64, "image_layers": 1, "image_heads": 1, "patch_size": 16, "size": 32}
    config, _ = parse_config(small_flags(**vit), "shapes")
    model = clip.create_model(config, ["a red circle"])
    names = {id(parameter): name for name, parameter in model.image_encoder.backbone.named_parameters()}
    decaying = {
        names[id(parameter)]
        for group in optimization.parameter_groups(model, config)
        for parameter in group["params"]
        if group["weight_decay"] and id(parameter) in names
    }
    assert "pos_embed" in names.values() and not decaying & {"pos_embed", "cls_token"}
    assert all(name.endswith(".weight") for name in decaying) and "blocks.0.attn.qkv.weight" in decaying


def test_temperature_is_clamped(small_flags, monkeypatch):
    monkeypatch.setattr(steps, "MAX_LOGIT_SCALE", 1.0)
    assert train(small_flags(epochs=1)).logit_scale.item() <= 1.0


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(small_flags, tmp_path, monkeypatch):
    train_epoch = main.train_epoch

    def poisoned(state, *rest):
        if len(state.history) == 1:
            state.model.image_projection.projection.weight.data.fill_(math.nan)
        return train_epoch(state, *rest)

    monkeypatch.setattr(main, "train_epoch", poisoned)
    with pytest.raises(UserError, match=r"epoch 2, step 1: the loss is not finite.*--resume"):
        train(small_flags())
    assert len(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["history"]) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_skip_bad_trains_on_the_rest_and_lists_what_was_left_out(small_flags, sample, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(sample, data)
    (data / "Images" / "00003.png").write_bytes(b"broken")
    (data / "Images" / "00005.png").unlink()
    with open(data / "captions.txt", "a") as file:
        file.write('00007.png,""\n')
    train(small_flags(data_dir=data, epochs=1), "--skip-bad")
    skipped = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
    assert len(skipped) == 3
    assert all(any(re.search(word, line) for line in skipped) for word in ("00003.png", "00005.png", "row 722"))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_settings_of_each_preset_go_together(preset):
    config, name = parse_config([preset], "shapes")
    assert name == preset and config.run_dir == f"runs/{preset}" and config.epochs and config.batch_size


BAD_RUNS = {
    "missing folder": ({"data_dir": "nowhere"}, "--data-dir"),
    "batch of one": ({"batch_size": 1}, "--batch-size 1"),
    "batch too large": ({"batch_size": 97}, "only 96 training images"),
    "unknown image encoder": ({"image_encoder": "resnot"}, "--image-encoder resnot"),
    "unknown text encoder": ({"text_encoder": "nobert"}, "--text-encoder nobert"),
    "heads do not divide": ({"text_heads": 3}, "--text-width 32"),
    "negative rate": ({"head_lr": -1}, "--head-lr"),
    "micro-batch does not divide": ({"micro_batch_size": 12}, "--micro-batch-size 12: does not divide --batch-size 32"),
    "unknown stage": ({"image_unfreeze_from": "layer9"}, "--image-unfreeze-from layer9: no such stage; there are .*layer3"),
    "nothing below the stage": ({"image_unfreeze_from": "conv1"}, "there are no layers below"),
    "stage of a frozen encoder": (
        {"image_unfreeze_from": "layer3", "freeze": "image"},
        "--freeze image trains no image encoder",
    ),
    "no views": ({"image_unfreeze_from": "layer3", "cached_crops": 0}, "--cached-crops 0"),
    "no such device": ({"device": "cuda:99"}, "--device cuda:99"),
}


@pytest.mark.parametrize("problem", BAD_RUNS)
def test_bad_settings_end_in_one_line_and_leave_nothing(small_flags, tmp_path, problem):
    options, expected = BAD_RUNS[problem]
    with pytest.raises(UserError, match=expected) as error:
        train(small_flags(**options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("run_dir", [".", "", "..", "/", "./runs/.."])
def test_a_run_folder_that_holds_the_current_folder_is_refused(run_dir, monkeypatch):
    with pytest.raises(UserError, match="--run-dir .*: a run needs its own folder"):
        parse_config(["shapes", "--run-dir", run_dir], "shapes")
    with pytest.raises(UserError, match="--run-dir .*: a run needs its own folder"):
        GAN.parse_config(["shapes", "--run-dir", run_dir])


def test_middle_squares_alone_are_not_mirrored(small_flags):
    with pytest.raises(UserError, match="--hflip: --cached-crops 1 keeps centre crops only"):
        train(small_flags(freeze="image", cached_crops=1), "--hflip")


def test_a_broken_picture_ends_in_one_line_and_leaves_no_run(small_flags, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    (tmp_path / "data" / "Images" / "00003.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"00003\.png"):
        train(small_flags(data_dir=tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_data_without_training_images_is_refused(small_flags, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    (tmp_path / "data" / "shapes.trainImages.txt").unlink()
    with pytest.raises(UserError, match="train split"):
        train(small_flags(data_dir=tmp_path / "data"))


def test_unusable_run_folders_are_named(small_flags, tmp_path):
    train(small_flags(epochs=1))
    run = tmp_path / "run"
    with pytest.raises(UserError, match="nowhere: neither a run folder nor the name of a model"):
        clip.load(tmp_path / "nowhere")
    whole = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        clip.load(run)
    (run / "last.pt").write_bytes((run / "last.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.pt: damaged"):
        main.train(parse_config(["shapes", "--run-dir", str(run), "--resume"], "shapes")[0])
    saved = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(saved | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        clip.load(run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        clip.load(run)
    with pytest.raises(UserError, match="no run is there"):
        parse_config(["shapes", "--run-dir", str(tmp_path / "nowhere"), "--resume"], "shapes")


def test_the_command_exits_with_status_2_and_one_line(tmp_path):
    process = run_script("main.py", "shapes", "--data-dir", tmp_path / "nowhere")
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("error: ")
    with pytest.raises(UserError, match="--no-such-flag: there is no such flag"):
        parse_config(["shapes", "--no-such-flag"], "shapes")
    with pytest.raises(UserError, match="no-such-preset.*flickr8k, linear, fast, .*shapes"):
        parse_config(["no-such-preset"], "shapes")


def test_the_first_command_of_the_readme(tmp_path):
    """`python main.py` where there is no data draws the sample and trains on it; chance of R@10 is 3.3."""
    process = run_script("main.py", "--epochs", "2", "--train-images", "1500", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "shapes" in process.stdout.splitlines()[0]
    learned = {"relevance.json", "relevance.png", "references.npy", "reference-words.npy"}  # from 200 validation images on
    assert {path.name for path in (tmp_path / "runs" / "shapes").iterdir()} - {HUBNESS_FILE} == RUN_FILES | learned
    drawn = [Image.open(path).size for path in (tmp_path / "runs" / "shapes").glob("*.png")]
    assert len(drawn) == 4 and min(map(min, drawn)) > 300
    history = pd.read_csv(tmp_path / "runs" / "shapes" / "history.csv")
    assert history["text_to_image_R@10"].max() >= 9


def test_real_photographs_train_and_with_shuffled_captions_do_not(real_photographs, tmp_path):
    """A short run on Flickr8k with both pretrained encoders, frozen, finds far more than chance, which is 10 here.

    Where the training images have exchanged their captions it finds no more than that: nothing leaks from the scored images.
    """
    data = small_flickr8k(real_photographs, tmp_path)
    flags = [
        "flickr8k", "--data-dir", str(data), "--freeze", "both",
        "--image-encoder", "tf_efficientnet_lite0",
        "--image-weights", str(real_photographs / "weights" / "tf_efficientnet_lite0.safetensors"),
        "--text-encoder", str(real_photographs / "weights" / "distilbert-minilm-l6"),
        "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"),
        "--batch-size", "100", "--epochs", "20",
    ]  # fmt: skip
    main.train(parse_config(flags, "flickr8k")[0])
    assert pd.read_csv(tmp_path / "run" / "history.csv")["text_to_image_R@10"].iloc[-1] > 35
    table = pd.read_csv(data / "captions.txt")
    names = (data / "Flickr_8k.trainImages.txt").read_text().split()
    exchanged = dict(zip(names, np.random.default_rng(0).permutation(names)))
    table["image"] = [exchanged.get(name, name) for name in table["image"]]
    table.to_csv(data / "captions.txt", index=False)
    main.train(parse_config(flags, "flickr8k")[0])
    assert abs(pd.read_csv(tmp_path / "run" / "history.csv")["text_to_image_R@10"].iloc[-1] - 10) < 8


def small_flickr8k(shared, tmp_path):
    """400 training and 100 validation photographs in a folder of their own."""
    source, folder = shared / "flickr8k", tmp_path / "flickr8k"
    (folder / "Images").mkdir(parents=True)
    names = []
    for split, count in (("train", 400), ("dev", 100)):
        chosen = (source / f"Flickr_8k.{split}Images.txt").read_text().split()[:count]
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(chosen))
        names += chosen
    for name in names:
        shutil.copy(source / "Images" / name, folder / "Images")
    table = pd.read_csv(source / "captions.txt")
    table[table["image"].isin(names)].to_csv(folder / "captions.txt", index=False)
    return folder


def test_the_validation_loss_is_that_of_first_captions_in_whole_batches():
    """Worked by hand: five images in batches of two leave the fifth out; equal embeddings give ln 2 in a batch."""
    head = torch.nn.Identity()
    model = SimpleNamespace(image_projection=head, text_projection=head, logit_scale=torch.tensor(0.0), logit_bias=None)
    I_f = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1]])
    T_f = torch.tensor([[1.0, 0], [0, 1], [0, 1], [1, 0], [1, 0], [0, 1]])  # the second caption is image 0's, too
    image_of_text, config = np.array([0, 0, 1, 2, 3, 4]), SimpleNamespace(batch_size=2, loss="softmax")
    loss = report.validation_loss(model, I_f, T_f, image_of_text, config, "cpu")
    assert loss == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)
    model.logit_bias, config.loss = torch.tensor(-1.0), "sigmoid"
    # Logits without the bias: 1 and 0 for right and wrong pairs in the first batch, four times 1 in the second.
    first = 2 * math.log(1 + math.exp(0)) + 2 * math.log(1 + math.exp(-1))
    second = 2 * math.log(1 + math.exp(0)) + 2 * math.log(1 + math.exp(0))
    loss = report.validation_loss(model, I_f, T_f, image_of_text, config, "cpu")
    assert loss == pytest.approx((first / 2 + second / 2) / 2)


def test_a_run_of_an_older_version_gets_new_columns_when_it_goes_on(tmp_path):
    checkpoint.write_history(tmp_path / "history.csv", [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0, "val_loss": 1.5}])
    assert (tmp_path / "history.csv").read_text().split() == ["epoch,loss,val_loss", "1,2.0,", "2,1.0,1.5"]
