"""The relevance floor and match probabilities, on made embeddings whose answers are known."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import evaluation.relevance
import inference
from evaluation.relevance import fit_relevance, label_pairs, measure_relevance, write_relevance
from search import relevance
from search.options import read_search
from search.queries import judge
from search.relevance import Relevance, load_relevance
from utils.errors import UserError


def made_pairs(count, seed, noise=0.7, width=32):
    """count images with two captions each, which are their embedding with noise: (I_e, T_e, image_of_text)."""
    rng = np.random.default_rng(seed)

    def unit(values):
        return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)

    I_e = unit(rng.normal(size=(count, width)))
    T_e = unit(np.repeat(I_e, 2, axis=0) + noise * rng.normal(size=(2 * count, width)) / width**0.5)
    return I_e, T_e, np.repeat(np.arange(count), 2)


def test_pairs_are_labelled_and_pictures_that_show_the_same_are_left_out():
    same, other = [1.0, 0.0], [0.0, 1.0]
    near = [0.95, np.sqrt(1 - 0.95**2)]
    T_e = np.array([same, near, near, same, other, other], dtype=np.float32)  # two of each of three images
    right, wrong = label_pairs(T_e, np.array([0, 0, 1, 1, 2, 2]), 3)
    assert right.tolist() == [[True, False, False]] * 2 + [[False, True, False]] * 2 + [[False, False, True]] * 2
    # The middle cosine of two captions of an image is 0.95, and images 0 and 1 have captions that are as near.
    assert wrong.tolist() == [[False, False, True]] * 4 + [[True, True, False]] * 2


def test_many_captions_are_sampled_evenly_over_the_images(tmp_path, monkeypatch):
    """All captions are compared with each other: 12,000 would take 0.6 GB, 40,000 more than 6."""
    learned = []

    def fit(I_v, T_q, image_of_text):
        learned.append(image_of_text)
        return fit_relevance(I_v, T_q, image_of_text)

    monkeypatch.setattr(evaluation.relevance, "fit_relevance", fit)
    monkeypatch.setattr(evaluation.relevance, "MIN_IMAGES", 40)
    I_e, T_e, image_of_text = made_pairs(40, 0)
    rows = np.repeat(np.arange(80), 150)  # 300 captions of each image
    write_relevance(tmp_path, I_e, T_e[rows], image_of_text[rows])
    assert [np.bincount(images).tolist() for images in learned] == [[125] * 20, [125] * 40]
    rows = np.concatenate([np.zeros(6000, dtype=int), np.arange(2, 80)])  # nearly all are of one image
    write_relevance(tmp_path, I_e, T_e[rows], image_of_text[rows])
    assert sorted(np.bincount(learned[-1])) == [2] * 39 + [125]


def test_the_floor_holds_what_it_promises_on_pictures_it_has_not_seen():
    learned = fit_relevance(*made_pairs(400, 0))
    found = measure_relevance(learned, *made_pairs(400, 1))
    assert 0.05 < found["wrong_above_floor"] < 0.2  # 0.1% was promised
    assert found["right_above_floor"] > 90 and found["calibration_error"] < 12
    blurred = measure_relevance(fit_relevance(*made_pairs(400, 0, noise=2.5)), *made_pairs(400, 1, noise=2.5))
    assert blurred["right_above_floor"] < found["right_above_floor"] - 20 and 0.03 < blurred["wrong_above_floor"] < 0.3


def test_a_floor_corrects_for_texts_that_are_near_all_pictures():
    """All cosines of some texts are raised by the same amount; their floor has to rise with it."""
    I_e, T_e, image_of_text = made_pairs(400, 0)
    raised = np.where(np.arange(len(T_e)) % 2, 0.5, 0.0).astype(np.float32)
    I_e, T_e = np.hstack([I_e, np.ones((len(I_e), 1), np.float32)]), np.hstack([T_e, raised[:, None]])
    learned = fit_relevance(I_e, T_e, image_of_text)
    assert learned.weights[1] == pytest.approx(-learned.weights[0], rel=0.2)
    alarms = []
    for rows in (raised == 0, raised > 0):
        scores = np.stack([learned.corrected_scores(I_e @ text, text) for text in T_e[rows]])
        wrong = image_of_text[rows][:, None] != np.arange(len(I_e))
        alarms.append((scores[wrong] >= learned.floor(0.001)).mean())
    assert all(0.0003 < alarm < 0.003 for alarm in alarms)


def test_floors_and_probabilities_are_read_off_their_curves(tmp_path):
    known = Relevance(np.zeros((200, 2)), [2.0, 0, 0], [0.1, 0.001], [1.0, 3.0], [0.9, 0.5], [0.0, 2.0], [0.0, 0.5])
    assert known.floor(0.1) == 1 and known.floor(0.01) == pytest.approx(2) and known.floor(1e-9) == 3
    assert known.floor(0) == -np.inf
    matches = judge([("a", 1.6), ("b", 0.6), ("c", 0.2)], np.zeros(2, np.float32), known, 0.1)  # scores 3.2, 1.2, 0.4
    assert [(match.filename, match.relevant) for match in matches] == [("a", True), ("b", True), ("c", False)]
    assert [match.probability for match in matches] == pytest.approx([0.5, 0.3, 0.1])
    known.save(tmp_path)
    assert load_relevance(tmp_path).floor(0.01) == known.floor(0.01)
    replace(known, references=known.references[:199]).save(tmp_path)
    assert load_relevance(tmp_path) is None  # an earlier version learned it from too few
    known.save(tmp_path)
    (tmp_path / relevance.JSON_FILE).write_text("{")
    with pytest.raises(UserError, match="damaged .*evaluate.py calibrate"):
        load_relevance(tmp_path)
    assert load_relevance(tmp_path / "nowhere") is None


def test_no_picture_is_a_match_for_certain():
    known = Relevance(np.zeros((200, 2)), [1.0, 0, 0], [0.1, 0.001], [1.0, 3.0], [0.9, 0.5], [0.0, 2.0], [0.0, 1.0])
    (match,) = judge([("a", 5.0)], np.zeros(2, np.float32), known)
    assert match.label().strip() == "99.9%" and match.record()["probability"] < 1


@pytest.mark.parametrize("count", [1, 199])
def test_too_few_pairs_are_named(tmp_path, count):
    with pytest.raises(UserError, match=f"{count} images with captions: a relevance floor needs 200"):
        write_relevance(tmp_path, *made_pairs(count, 0))
    assert not list(tmp_path.iterdir())


def test_a_model_that_knows_nothing_still_has_a_floor(tmp_path):
    I_e, T_e, image_of_text = made_pairs(200, 0)
    found = write_relevance(tmp_path, I_e, -T_e, image_of_text)
    assert np.isfinite(found["right_above_floor"]) and load_relevance(tmp_path).weights[0] > 0
    assert write_relevance(tmp_path, I_e, np.repeat(T_e[:1], len(T_e), axis=0), image_of_text)["images"] == 100


def test_the_best_are_shown_always_and_a_floor_cuts_only_where_it_is_given(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run")
    write_relevance(run, *made_pairs(200, 0, width=257))  # its own validation images are too few
    flags = [
        "--run",
        str(run),
        "--cache-dir",
        str(tmp_path),
        "--output",
        str(tmp_path / "m.png"),
        "--json",
        str(tmp_path / "f"),
    ]
    learned = json.loads((run / relevance.JSON_FILE).read_text())
    out_of_reach = learned | {"floors": [floor + 1000 for floor in learned["floors"]]}
    (run / relevance.JSON_FILE).write_text(json.dumps(out_of_reach))
    inference.search(read_search(["a red circle", "--floor", "0.001", *flags]))
    strict = json.loads((tmp_path / "f").read_text())
    assert "nothing here is above --floor (best guess below)" in capsys.readouterr().out
    inference.search(read_search(["a red circle", *flags]))
    everything = json.loads((tmp_path / "f").read_text())
    assert strict["matches"] == [] and len(everything["matches"]) == 9
    assert all(0 <= match["probability"] <= 1 for match in everything["matches"])
    assert strict["best_guess"]["filename"] == everything["matches"][0]["filename"]
    assert strict["best_guess"]["score"] == pytest.approx(everything["matches"][0]["score"], abs=1e-6)
    inference.search(read_search(["a red circle", "--more", "1", "--n", "3", *flags]))
    assert json.loads((tmp_path / "f").read_text())["matches"] == everything["matches"][3:6]


def test_calibrate_writes_the_floor_of_a_run(run, sample, tmp_path, evaluate_here, capsys, monkeypatch):
    run = shutil.copytree(run, tmp_path / "run")
    assert not (run / relevance.JSON_FILE).exists()  # its validation images are too few
    monkeypatch.setattr("evaluation.relevance.MIN_IMAGES", 20)
    evaluate_here("calibrate", "--run", run, "--json", tmp_path / "f", "--split", "val")
    assert "relevance floor: on 12 images" in capsys.readouterr().out
    assert json.loads((tmp_path / "f").read_text())["captions"] == 60 and (run / "relevance.png").exists()
