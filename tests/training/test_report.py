"""What training keeps as banks, and when."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import clip
import main
from captions import image_positions, load_captions
from config import HUBNESS_FILE, parse_config
from embedding import file_features, open_model, project_and_normalize
from encoders.hubness import Hubness, load_hubness
from evaluation.retrieval import recall
from training import report
from training.data import Split, some_pairs


def split(image_key, text_key):
    """Four images, of which the last is generated, with two, one, two and one captions, and three crops each where cached."""
    cached = torch.arange(4.0)[:, None, None].expand(4, 3, 2)
    pictures = Subset([f"picture {i}" for i in range(4)], range(4))
    texts = torch.arange(6.0)[:, None] if text_key == "text_features" else [[i] for i in range(6)]
    images = pictures if image_key == "image" else cached
    captions = [f"caption {i}" for i in range(6)]
    return Split(list("abcd"), pictures, captions, np.array([0, 0, 1, 2, 2, 3]), images, texts, image_key, text_key, [{0}])


@pytest.mark.parametrize("image_key", ["image", "image_activations", "image_features"])
@pytest.mark.parametrize("text_key", ["text", "text_features"])
def test_some_pairs_have_the_centre_crop_and_the_first_caption(image_key, text_key):
    """What is cached are three random crops, so the pictures themselves are taken."""
    found = some_pairs(split(image_key, text_key), np.array([0, 2]))
    assert (found.names, found.captions) == (["a", "c"], ["caption 0", "caption 3"])
    assert found.image_of_text.tolist() == [0, 1]
    texts = found.texts.tolist() if text_key == "text_features" else found.texts
    assert texts == [[0], [3]]
    assert found.image_key == "image" and list(found.images) == list(found.pictures) == ["picture 0", "picture 2"]


def test_cached_centre_crops_are_taken():
    cached = replace(split("image_features", "text"), images=torch.arange(4.0)[:, None, None])
    found = some_pairs(cached, np.array([0, 2]))
    assert found.image_key == "image_features" and found.images.tolist() == [[[0]], [[2]]]


def test_generated_pictures_are_in_no_bank(monkeypatch):
    seen = []

    def features(model, part, device, dtype):
        seen.extend(part.names)
        return torch.eye(3), torch.eye(3)

    class Model:
        image_projection = text_projection = torch.nn.Identity()
        logit_scale = torch.tensor(0.0)

    monkeypatch.setattr(report, "split_features", features)
    hubness = report.learn_hubness(Model, split("image", "text"), "cpu", torch.float32)
    assert seen == ["a", "b", "c"] and len(hubness.pictures) == 3


@pytest.mark.parametrize("unfreeze", ["", "layer3"])
def test_the_bank_has_centre_crops_as_searches_do(small_flags, sample, tmp_path, unfreeze):
    frozen = {"image_unfreeze_from": unfreeze} if unfreeze else {"freeze": "both"}
    main.train(parse_config(small_flags(**frozen, cached_crops=3, epochs=1), "shapes")[0])
    model, device, dtype = open_model(tmp_path / "run", "cpu", "auto")
    table, image_dir, _ = load_captions(sample)
    names, _ = image_positions(table[table["split"] == "train"])
    I_f, _ = file_features(model, [image_dir / name for name in names], device, dtype)
    I_e = project_and_normalize(model.image_projection, I_f, device)
    assert torch.equal(load_hubness(tmp_path / "run").pictures, I_e.half().float())


def scores_of(right):
    """(n, n) scores of n captions with n images, one each, where those of `right` are found and the others come last."""
    return np.where(np.eye(len(right)), np.where(right, 1.0, -1.0)[:, None], 0.0).astype(np.float32)


@pytest.mark.parametrize(
    "before, after, kept", [(20, 19, True), (20, 20, True), (18, 22, True), (40, 0, False), (30, 10, False)]
)
def test_the_correction_is_kept_unless_it_surely_harms(run, tmp_path, monkeypatch, capsys, before, after, kept):
    """Of 40 images one, which is 15 points of rsum, is no reason; half of them are."""
    model, _ = clip.load(run, "cpu")
    model.hubness, banks, n = None, Hubness(torch.eye(3), torch.eye(3), 2.0), 40
    found = {False: scores_of(np.arange(n) < before), True: scores_of(np.arange(n) >= n - after)}
    monkeypatch.setattr(report, "similarities", lambda model, *_: found[model.hubness is not None])
    pairs = SimpleNamespace(names=[""] * n, image_of_text=np.arange(n), captions=[f"caption {i}" for i in range(n)])
    old, new = (recall(found[corrected], pairs.image_of_text) for corrected in (False, True))
    result = report.correct_hubs(model, banks, old, pairs, None, None, "cpu", tmp_path)
    assert result["rsum"] == (new if kept else old)["rsum"] and (tmp_path / HUBNESS_FILE).exists() == kept
    printed = capsys.readouterr().out
    assert (
        f"hubness correction: rsum {new['rsum']:.1f} instead of {old['rsum']:.1f}; {'kept' if kept else 'not kept'}" in printed
    )
    assert (" rsum is lower in " in printed) == (new["rsum"] < old["rsum"])
    assert (model.hubness is not None) == kept == (load_hubness(tmp_path) is not None)
