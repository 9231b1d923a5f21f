"""What training keeps as banks, and when."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

import clip
from config import HUBNESS_FILE
from encoders.hubness import Hubness, load_hubness
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
def test_some_pairs_have_one_crop_and_the_first_caption(image_key, text_key):
    found = some_pairs(split(image_key, text_key), np.array([0, 2]))
    assert (found.names, found.captions) == (["a", "c"], ["caption 0", "caption 3"])
    assert found.image_of_text.tolist() == [0, 1]
    texts = found.texts.tolist() if text_key == "text_features" else found.texts
    assert texts == [[0], [3]]
    images = list(found.images) if image_key == "image" else found.images.tolist()
    assert images == (["picture 0", "picture 2"] if image_key == "image" else [[[0, 0]], [[2, 2]]])


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


@pytest.mark.parametrize("helps", [True, False])
def test_the_correction_is_kept_where_it_helps(run, tmp_path, monkeypatch, capsys, helps):
    model, _ = clip.load(run, "cpu")
    model.hubness, banks = None, Hubness(torch.eye(3), torch.eye(3), 2.0)
    scores = {side: {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0, "median_rank": 1} for side in ("image_to_text", "text_to_image")}
    corrected = scores | {"rsum": 5.0 if helps else 3.0}
    monkeypatch.setattr(report, "score", lambda *arguments: corrected)
    found = report.correct_hubs(model, banks, scores | {"rsum": 4.0}, split("image", "text"), None, None, "cpu", tmp_path)
    assert found["rsum"] == (5.0 if helps else 4.0) and (tmp_path / HUBNESS_FILE).exists() == helps
    assert ("; kept" if helps else "; not kept") in capsys.readouterr().out
    assert (model.hubness is not None) == helps == (load_hubness(tmp_path) is not None)
