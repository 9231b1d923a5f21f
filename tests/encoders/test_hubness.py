"""The correction of hubs, against a table worked by hand and against loops."""

import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import clip
from config import HUBNESS_FILE
from embedding import pair_scores, picture_vectors, text_vectors
from encoders.hubness import SHARE, EnsembleHubness, Hubness, load_hubness
from search.files import find_pictures
from search.gallery import open_gallery
from search.queries import best_matches, embed_query
from search.searcher import Searcher
from utils.errors import UserError


def unit(*rows):
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_nearness_by_hand():
    """Three bank texts along x, y and z. Without the nearest, a picture along x has the cosines 0 and 0 with the others."""
    axes = torch.eye(3)
    hubness = Hubness(axes, axes, 2.0)
    assert hubness.levels == pytest.approx([math.log(2 / 3) / 2] * 2, abs=1e-6)
    found = hubness.of_pictures(unit((1, 0, 0), (1, 1, 0)))  # the second has the cosines 0.7071 (left out), 0.7071 and 0
    nearness = math.log((math.exp(2 * math.sqrt(0.5)) + 1) / 3) / 2
    assert found.tolist() == pytest.approx([0, SHARE * (nearness - math.log(2 / 3) / 2)], abs=1e-6)


def test_pictures_are_compared_with_texts_and_texts_with_pictures():
    rng = np.random.default_rng(0)
    pictures, texts, asked = (F.normalize(torch.tensor(rng.normal(size=(n, 5)), dtype=torch.float32), dim=1) for n in (7, 9, 4))
    hubness = Hubness(pictures, texts, 10.0)

    def nearness(x, bank):
        others = sorted(math.exp(10 * float(x @ b)) for b in bank)[:-1]
        return math.log(sum(others) / len(bank)) / 10

    for found, own, other in ((hubness.of_pictures(asked), pictures, texts), (hubness.of_texts(asked), texts, pictures)):
        level = sum(nearness(x, other) for x in own) / len(own)
        assert found.tolist() == pytest.approx([SHARE * (nearness(x, other) - level) for x in asked], abs=1e-5)


def test_a_picture_that_is_near_to_all_texts_no_longer_wins():
    """Pictures have the cosine 0.5 with their own text and 0 with the others; a hub has 0.58 with all three."""
    texts = torch.eye(3, 4)
    own = F.normalize(texts + math.sqrt(3) * torch.tensor([0.0, 0, 0, 1]), dim=1)
    pictures = torch.cat([own, unit((1, 1, 1, 0))])
    cosines = texts @ pictures.T
    assert (cosines.argmax(dim=1) == 3).all()
    corrected = cosines - Hubness(own, texts, 20.0).of_pictures(pictures)
    assert corrected.argmax(dim=1).tolist() == [0, 1, 2]


@pytest.fixture
def corrected(run, tmp_path):
    """A run with random banks."""
    generator = torch.Generator().manual_seed(0)
    folder = shutil.copytree(run, tmp_path / "corrected")
    Hubness(*F.normalize(torch.randn(2, 9, 256, generator=generator), dim=2), 20.0).save(folder)
    return folder


def test_a_run_keeps_its_banks_and_its_scores_are_corrected(corrected, tmp_path):
    model, _ = clip.load(corrected, "cpu")
    I_f, T_f = torch.randn(6, model.image_encoder.width), torch.randn(6, model.text_encoder.width)
    I_v, T_v = picture_vectors(model, I_f, "cpu"), text_vectors(model, T_f, "cpu")
    for vectors, found in ((I_v, model.hubness.of_pictures(I_v[:, :-1])), (T_v, model.hubness.of_texts(T_v[:, :-1]))):
        assert found.abs().max() > 1e-3
        torch.testing.assert_close(vectors[:, -1], -found)
    scores = pair_scores(T_v, I_v)
    expected = T_v[2, :-1] @ I_v[3, :-1] - model.hubness.of_texts(T_v[2:3, :-1]) - model.hubness.of_pictures(I_v[3:4, :-1])
    assert scores[2, 3].item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_search_ranks_by_corrected_scores(corrected, sample, tmp_path):
    searcher = Searcher(corrected, "cpu", "fp32", tmp_path / "cache")
    gallery = open_gallery(searcher, find_pictures(sample / "Images"), sample / "Images")
    found = dict(best_matches(gallery, embed_query(searcher, ["a red circle"]), gallery.paths, 5))
    model, T_e = searcher.model, torch.from_numpy(searcher.embed_texts(["a red circle"]))
    vectors = torch.from_numpy(gallery.vectors[gallery.rows].astype(np.float32))
    hubness = model.hubness.of_pictures(F.normalize(vectors[:, :-1], dim=1))
    assert hubness.std() > 1e-3
    expected = dict(zip(gallery.paths, (vectors[:, :-1] @ T_e[0] - hubness).tolist()))
    assert found == pytest.approx({path: expected[path] for path in found}, abs=2e-3)
    assert list(found.values()) == pytest.approx(sorted(expected.values(), reverse=True)[:5], abs=2e-3)


def test_new_weights_drop_the_banks_of_the_old_ones(corrected, tmp_path):
    model, _ = clip.load(corrected, "cpu")
    model.save_pretrained(tmp_path / "copy")
    model.save_pretrained(corrected)
    assert load_hubness(tmp_path / "copy").key == load_hubness(corrected).key
    model.hubness = None
    clip.save_weights(model, corrected)
    assert load_hubness(corrected) is None


@pytest.mark.parametrize(
    "contents", [b"no safetensors", safetensors.torch.save({"numbers": torch.zeros(0)})], ids=["no safetensors", "no numbers"]
)
def test_damaged_banks_are_named(tmp_path, contents):
    (tmp_path / HUBNESS_FILE).write_bytes(contents)
    with pytest.raises(UserError, match=r"hubness.safetensors: damaged .* write it again"):
        load_hubness(tmp_path)


def test_an_ensembles_hubness_is_the_mean_of_its_models():
    first, second = (Hubness(*F.normalize(torch.randn(2, 8, d), dim=2), 5.0) for d in (3, 4))
    a, b = F.normalize(torch.randn(5, 3), dim=1), F.normalize(torch.randn(5, 4), dim=1)
    both, one = EnsembleHubness([first, second], [3, 4]), EnsembleHubness([first, None], [3, 4])
    side_by_side = torch.cat([a, b], dim=1) / 2**0.5
    torch.testing.assert_close(both.of_pictures(side_by_side), (first.of_pictures(a) + second.of_pictures(b)) / 2)
    torch.testing.assert_close(one.of_pictures(side_by_side), first.of_pictures(a) / 2)
    torch.testing.assert_close(both.of_texts(side_by_side), (first.of_texts(a) + second.of_texts(b)) / 2)
