"""Ensembles and views, against the same cosines computed one by one."""

import json
import shutil

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import clip
import evaluate
import inference
from config import HUBNESS_FILE
from embedding import image_features, open_model, pair_scores, picture_vectors, text_features, text_vectors, token_ids
from encoders.hubness import Hubness
from search.options import read_search
from search.queries import embed_texts
from search.searcher import Searcher
from utils.errors import UserError
from utils.images import center_crop, view_crops

HIDDEN = 12  # units
TEXTS = ["a red circle", "a large blue star left of a small ring"]


@pytest.fixture(scope="module")
def other(run, tmp_path_factory):
    """A run of the same kind with other weights: the output of a head with a hidden layer is not linear in its features."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("other") / "run")
    settings = json.loads((folder / "config.json").read_text())
    settings["config"]["hidden_width"] = HIDDEN
    (folder / "config.json").write_text(json.dumps(settings))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for part in ("image", "text"):
        d_e, width = weights[f"{part}_projection.projection.weight"].shape
        shapes = {"0.weight": (HIDDEN, width), "0.bias": (HIDDEN,), "3.weight": (d_e, HIDDEN), "3.bias": (d_e,)}
        for name, shape in shapes.items():
            weights[f"{part}_projection.hidden.{name}"] = torch.randn(shape, generator=generator)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=(80, 100, 3), dtype=np.uint8), rng.integers(256, size=(120, 80, 3), dtype=np.uint8)]


def scores(opened, pictures):
    model, device, dtype = opened
    I_f = image_features(model, pictures, device, dtype, len(pictures))
    T_f = text_features(model, token_ids(model.tokenizer, TEXTS), device, dtype)
    return pair_scores(text_vectors(model, T_f, device), picture_vectors(model, I_f, device))


@pytest.mark.parametrize("views", [1, 2])
def test_an_ensembles_scores_are_the_mean_of_its_models(run, other, pictures, views, tmp_path):
    """One of the two has hubness."""
    plain, corrected = (shutil.copytree(folder, tmp_path / name) for folder, name in ((run, "plain"), (other, "corrected")))
    (plain / HUBNESS_FILE).unlink(missing_ok=True)
    Hubness(*F.normalize(torch.randn(2, 9, 256, generator=torch.Generator().manual_seed(0)), dim=2), 20.0).save(corrected)
    both = scores(open_model(f"{plain}, {corrected}", "cpu", "fp32", views), pictures)
    alone = [scores(open_model(name, "cpu", "fp32", views), pictures) for name in (plain, corrected)]
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    torch.testing.assert_close(both, sum(alone) / 2, atol=1e-5, rtol=0)


def test_models_of_other_sizes_make_no_ensemble(run, tmp_path):
    larger = shutil.copytree(run, tmp_path / "larger")
    settings = json.loads((larger / "config.json").read_text())
    settings["config"]["size"] = settings["encoders"]["image"]["size"] = 96
    (larger / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"different input sizes \(80 and 96\); leave one out"):
        open_model(f"{run},{larger}", "cpu", "fp32")


def test_views_are_averaged(run, pictures):
    model, device, dtype = open_model(run, "cpu", "fp32", views=4)
    found = image_features(model, pictures, device, dtype, 2)
    centre = pictures[0][:, 10:90]
    closer = cv2.resize(centre[6:74, 6:74], (80, 80), interpolation=cv2.INTER_LINEAR)
    crops = [centre, closer, centre[:, ::-1], closer[:, ::-1]]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(found[0], model.image_encoder(pixels).mean(dim=0), atol=1e-5, rtol=1e-4)


def test_one_and_two_views(pictures):
    wide = pictures[0]
    np.testing.assert_array_equal(view_crops(wide, 80, 1), [center_crop(wide, 80)])
    np.testing.assert_array_equal(view_crops(wide, 80, 2), [center_crop(wide, 80), center_crop(wide, 80)[:, ::-1]])


def test_a_search_with_an_ensemble_starts_without_torch_and_answers_the_same(run, other, tmp_path):
    name = f"{run},{other}"
    first = Searcher(name, "cpu", "fp32", tmp_path)
    expected = first.embed_texts(TEXTS)
    parts = [embed_texts(clip.load(part, "cpu")[0], TEXTS)[:, :-1] for part in (run, other)]
    np.testing.assert_allclose(expected, np.concatenate(parts, axis=1) / 2**0.5, atol=1e-6)
    assert first.width == 2 * parts[0].shape[1] + 1
    first.save_text_encoder()
    second = Searcher(name, "cpu", "fp32", tmp_path)
    np.testing.assert_allclose(second.embed_texts(TEXTS), expected, atol=1e-5)
    assert not second.is_loaded


def test_a_name_that_is_missing_between_commas_and_an_export_of_several_are_refused(run, other):
    with pytest.raises(UserError, match="a name is missing between the commas"):
        open_model(f"{run},", "cpu", "fp32")
    with pytest.raises(UserError, match="--export: writes one run"):
        inference.search(read_search(["--export", "onnx", "--run", f"{run},{other}"]))


def test_an_ensemble_is_scored_and_calibrated_and_then_has_match_probabilities(run, other, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.relevance.MIN_IMAGES", 20)
    monkeypatch.setattr("search.relevance.MIN_IMAGES", 20)
    flags = ["--run", f"{run},{other}", "--views", "2"]
    search = ["a red circle", *flags, "--cache-dir", str(tmp_path), "--output", str(tmp_path / "m.png")]
    inference.search(read_search(search))
    assert f"python evaluate.py calibrate --run {run},{other} --views 2 learns them" in capsys.readouterr().out
    for task in (["retrieval"], ["calibrate", "--cache-dir", str(tmp_path)]):
        evaluate.main([*task, *flags])
    said = capsys.readouterr().out
    assert "val: 24 images, 120 captions" in said and "match probabilities: on 12 images" in said
    inference.search(read_search(search))
    assert "calibrate" not in capsys.readouterr().out


def test_views_and_ensembles_have_galleries_of_their_own(run, other, tmp_path):
    names = run, f"{run},{other}"
    paths = {Searcher(name, "cpu", "fp32", tmp_path, views).gallery_path() for name in names for views in (1, 2)}
    assert len(paths) == 4
