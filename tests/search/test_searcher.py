"""A search loads no more of a run than it needs, and answers the same."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import clip
import inference
from search.options import Search, read_search
from search.queries import embed_texts
from search.searcher import Searcher

TEXTS = ["a red circle", "a large blue star left of a small ring", "star " * 190]
QUERY = """
import sys, inference
from search.options import read_search
inference.search(read_search(sys.argv[1:]))
print("loaded:", *sorted({"torch", "transformers", "timm", "albumentations", "pandas"} & sys.modules.keys()))
"""


def test_the_second_query_needs_no_torch_and_answers_as_the_first(run, sample, tmp_path):
    places = ["--run", run, "--images", sample / "Images", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "m.png"]

    def ask(number):
        command = [sys.executable, "-c", QUERY, "a red circle", "--floor", "0", *places, "--json", tmp_path / f"{number}.json"]
        process = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=280)
        assert process.returncode == 0, process.stderr
        return process.stdout, json.loads((tmp_path / f"{number}.json").read_text())

    said, first = ask(1)
    assert "saving the text encoder" in said and "torch" in said.split("loaded:")[1]
    said, second = ask(2)
    assert said.endswith("loaded:\n") and "saving" not in said
    assert [match["filename"] for match in second["matches"]] == [match["filename"] for match in first["matches"]]
    scores = [[match["score"] for match in found["matches"]] for found in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_texts_are_embedded_as_by_the_model(run, tmp_path):
    model, _ = clip.load(run, "cpu")
    expected = embed_texts(model, TEXTS)[:, :-1]
    first = Searcher(run, "cpu", "fp32", tmp_path)
    np.testing.assert_allclose(first.embed_texts(TEXTS), expected, atol=1e-6)
    assert first.keys and first.is_loaded
    first.save_text_encoder()
    second = Searcher(run, "cpu", "fp32", tmp_path)
    np.testing.assert_allclose(second.embed_texts(TEXTS * 40), np.tile(expected, (40, 1)), atol=1e-5)
    assert not second.is_loaded and second.keys == first.keys


def test_a_damaged_text_encoder_is_named_and_the_model_is_loaded(run, tmp_path, capsys):
    first = Searcher(run, "cpu", "fp32", tmp_path)
    assert first.keys and first.model
    first.save_text_encoder()
    [path] = tmp_path.glob("text-*/text.onnx")
    path.write_bytes(path.read_bytes()[:1000])
    second = Searcher(run, "cpu", "fp32", tmp_path)
    np.testing.assert_allclose(second.embed_texts(TEXTS), first.embed_texts(TEXTS), atol=1e-6)
    assert "cannot be read" in capsys.readouterr().out and second.is_loaded


def test_a_run_that_was_trained_again_has_keys_of_its_own(run, tmp_path):
    import os
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    keys = Searcher(copy, "cpu", "fp32", tmp_path / "cache").keys
    os.utime(copy / "model.safetensors", (1, 1))
    again = Searcher(copy, "cpu", "fp32", tmp_path / "cache")
    assert again.keys == keys and again.is_loaded  # looked at again, and found to be the same
    assert Searcher(copy, "cpu", "bf16", tmp_path / "cache").keys["gallery"] != keys["gallery"]


def test_words_and_a_picture_count_the_same(run, sample, tmp_path):
    """Blended, the order is that of the sum of both scores, each divided by its spread."""
    picture = sorted((sample / "Images").iterdir())[5]
    flags = ["--run", run, "--images", sample / "Images", "--cache-dir", tmp_path, "--output", tmp_path / "m.png"]
    flags = list(map(str, flags))
    json_file = tmp_path / "found"
    words = ["a blue star", "--similar-to", str(picture), "--n", "200", "--json", str(json_file)]
    inference.search(read_search([*words, *flags]))
    found = json.loads(json_file.read_text())
    assert found["query"] == f"a blue star like {picture.name}"
    searcher = Searcher(run, "cpu", "fp32", tmp_path)
    text, like = embed_texts(searcher, ["a blue star"])[0], searcher.embed_file(picture)
    options = Search(query=("a",), images=str(sample / "Images"))
    gallery = inference.find_gallery(searcher, options)
    vectors = gallery.vectors[gallery.rows].astype(np.float32)
    both = vectors @ text / (vectors @ text).std() + vectors @ like / (vectors @ like).std()
    score_of = dict(zip(gallery.paths, both))
    scores = [score_of[match["filename"]] for match in found["matches"]]
    assert scores[:20] == pytest.approx(np.sort(both)[::-1][:20], abs=0.05)  # near ties may swap: vectors are in fp16
