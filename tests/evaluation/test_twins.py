"""Twins: both captions have the same words, and each is true of its own scene only; a bag of words scores at chance."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from Datasets import shapes
from evaluation import twins
from utils.errors import UserError

WORDS = {word: color for color, (words, _) in shapes.COLORS.items() for word in words}
NOUNS = {noun: shape for shape, nouns in shapes.SHAPES.items() for noun in nouns}
CPU, FP32 = torch.device("cpu"), torch.float32


def says(scene, caption):
    """Whether a twin's caption, "a SIZE COLOR SHAPE is RELATION a SIZE COLOR SHAPE .", is true of a scene."""
    left, _, right = caption.removesuffix(" .").partition(" is ")
    words = next(words for words in sorted(shapes.RELATIONS, key=len, reverse=True) if right.startswith(words))
    first, second = (find(scene, text) for text in (left, right.removeprefix(words).strip()))
    if not (first and second):
        return False
    (row, column), (other_row, other_column) = first.cell, second.cell
    holds = {"left": column < other_column, "right": column > other_column, "above": row < other_row, "below": row > other_row}
    return holds[shapes.RELATIONS[words]]


def find(scene, text):
    _, size, color, noun = text.split(" ", 3)
    look = WORDS[color], NOUNS[noun]
    return next((t for t in scene.things if (t.color, t.shape) == look and size in shapes.SIZES[t.size][0]), None)


def test_each_caption_is_true_of_its_own_scene_and_false_of_the_twin():
    pairs = shapes.twin_pairs(200)
    for pair in pairs:
        (scene, twin), (caption, twin_caption) = pair.scenes, pair.captions
        assert sorted(caption.split()) == sorted(twin_caption.split()) and caption != twin_caption
        assert says(scene, caption) and says(twin, twin_caption)
        assert not says(scene, twin_caption) and not says(twin, caption)
        assert not any(s.shows(shapes.HELD_OUT) for s in pair.scenes)
    assert {pair.swapped for pair in pairs} == {"color", "place"}
    assert {pair.relation for pair in pairs} == {"left", "right", "above", "below"}
    assert pairs[:50] == shapes.twin_pairs(50) != shapes.twin_pairs(50, seed=1)


def test_a_mirrored_scene_makes_its_caption_false():
    """Places are read back from the words: a caption's place is that of its own scene, and the other's is opposite."""
    for pair in shapes.mirrored_pairs(200):
        cells = []
        for scene, caption in zip(pair.scenes, pair.captions):
            (thing,) = scene.things
            words = max((w for cell in shapes.PLACES.values() for w in cell if caption.endswith(f" {w} .")), key=len)
            assert words in shapes.PLACES[thing.cell] and (thing.color, thing.shape) not in shapes.HELD_OUT
            cells.append(thing.cell)
        (row, column), (other_row, other_column) = cells
        if pair.relation in ("left", "right"):
            assert row == other_row and column == 2 - other_column == {"left": 0, "right": 2}[pair.relation]
        else:
            assert column == other_column and row == 2 - other_row == {"above": 0, "below": 2}[pair.relation]
        assert replace(pair.scenes[0].things[0], cell=cells[1]) == pair.scenes[1].things[0]
    assert {pair.relation for pair in shapes.mirrored_pairs(100)} == {"left", "right", "above", "below"}


def scored(monkeypatch, embed_text, pairs):
    """`twin_scores` where the i-th picture has the i-th unit vector, and captions are embedded by embed_text(i)."""
    n = 2 * len(pairs)
    monkeypatch.setattr(twins, "image_features", lambda *_: torch.eye(n))
    monkeypatch.setattr(twins, "text_features", lambda *_: torch.stack([embed_text(i) for i in range(n)]))
    monkeypatch.setattr(twins, "token_ids", lambda tokenizer, captions: captions)
    monkeypatch.setattr(twins, "project_and_normalize", lambda head, features, device: features)
    encoder = SimpleNamespace(size=16, resize="shortest area")
    model = SimpleNamespace(image_encoder=encoder, image_projection=None, text_projection=None, tokenizer=None)
    return twins.twin_scores(model, pairs, CPU, FP32)


def test_scores_by_hand(monkeypatch):
    pairs = shapes.twin_pairs(6)
    eye = torch.eye(12)
    assert scored(monkeypatch, lambda i: eye[i], pairs)["accuracy"] == 100
    assert scored(monkeypatch, lambda i: eye[i ^ 1], pairs)["accuracy"] == 0  # the twin's picture
    assert scored(monkeypatch, lambda i: torch.ones(12), pairs)["accuracy"] == 0  # a tie is wrong
    bag = scored(monkeypatch, lambda i: eye[i & ~1], pairs)  # both captions of a pair have one embedding
    assert bag["accuracy"] == 50 and bag["color"] in (50, None) and bag["place"] in (50, None)
    first = next(i for i, pair in enumerate(pairs) if pair.swapped == "place")
    only = scored(monkeypatch, lambda i: eye[i] if i // 2 == first else eye[i ^ 1], pairs)
    places = [pair for pair in pairs if pair.swapped == "place"]
    assert only["place"] == pytest.approx(100 / len(places)) and only["color"] == 0
    same = [pair for pair in places if pair.relation == pairs[first].relation]
    assert only["relations"][pairs[first].relation] == pytest.approx(100 / len(same))


def test_the_command_scores_a_run(run, tmp_path, evaluate_here, capsys):
    evaluate_here("twins", "--run", run, "--pairs", 20, "--json", tmp_path / "twins.json")
    scores = json.loads((tmp_path / "twins.json").read_text(encoding="utf-8"))
    assert scores["pairs"] == 20 and scores["chance"] == 50 and 0 <= scores["accuracy"] <= 100
    assert f"accuracy {scores['accuracy']:.1f}%" in capsys.readouterr().out
    with pytest.raises(UserError, match="--pairs 0: must be 1 or more"):
        evaluate_here("twins", "--run", run, "--pairs", 0)
