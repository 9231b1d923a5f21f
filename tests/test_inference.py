"""Scoring and searching a run from the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import Image

import clip
import inference
from captions import load_captions
from Datasets import shapes
from search import index, queries, run_data
from search.occlusion import occlusion_map
from search.options import read_search
from utils.errors import UserError


def test_retrieval_scores_what_training_scored(run, tmp_path):
    process = run_script("evaluate.py", "retrieval", "--run", run, "--split", "val", "--json", tmp_path / "scores.json")
    assert process.returncode == 0, process.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    best = max(float(line.split(",")[-2]) for line in (run / "history.csv").read_text().splitlines()[1:])
    assert (scores["images"], scores["captions"]) == (24, 120)
    assert scores["rsum_of_cosines"] == pytest.approx(best)
    assert set(scores["text_to_image"]) == {"R@1", "R@5", "R@10", "median_rank"} == set(scores["image_to_text"])


@pytest.mark.drawn
def test_match_writes_scores_and_a_picture(run, tmp_path, evaluate_here):
    flags = ["match", "--run", run, "--output", tmp_path / "match.png", "--json", tmp_path / "scores.json"]
    evaluate_here(*flags, "--choices", "3")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["images"], scores["choices"], scores["chance"]) == (24, 3, pytest.approx(100 / 3))
    assert 0 <= scores["interval"][0] <= scores["accuracy"] <= scores["interval"][1] <= 100
    assert Image.open(tmp_path / "match.png").width > 500
    with pytest.raises(UserError, match="--choices 25: there are only 24 images"):
        evaluate_here(*flags, "--choices", "25")


def test_images_that_a_run_was_trained_on_are_left_out_of_its_scores(run, sample, tmp_path, evaluate_here, capsys):
    """As after a change of the lists: 5 of 24 test images now were training images."""
    shutil.copytree(sample, tmp_path / "data")
    lists = tmp_path / "data" / "shapes.trainImages.txt", tmp_path / "data" / "shapes.testImages.txt"
    train, test = (path.read_text().split() for path in lists)
    lists[0].write_text("\n".join(train[5:]))
    lists[1].write_text("\n".join([*test, *train[:5]]))
    flags = ["--run", run, "--data-dir", tmp_path / "data", "--json", tmp_path / "scores.json"]
    evaluate_here("retrieval", *flags, "--split", "test")
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 24
    assert "left out: 5 images of the test split, which this run was trained on" in capsys.readouterr().out
    lists[1].write_text("\n".join(train[:5]))
    with pytest.raises(UserError, match="--split test: .* was trained on all of these images"):
        evaluate_here("match", *flags, "--split", "test", "--output", tmp_path / "match.png")
    evaluate_here("retrieval", *flags, "--split", "all")
    assert "96 of these images were trained on" in capsys.readouterr().out


def test_split_all_scores_a_folder_that_only_holds_test_images(run, sample, tmp_path, evaluate_here):
    shutil.copytree(sample, tmp_path / "data")
    for path in (tmp_path / "data").glob("*Images.txt"):
        path.unlink()
    names = sorted(path.name for path in (tmp_path / "data" / "Images").iterdir())[:10]
    lines = (sample / "captions.txt").read_text().splitlines()
    kept = [lines[0], *(line for line in lines[1:] if line.split(",")[0] in names)]
    (tmp_path / "data" / "captions.txt").write_text("\n".join(kept))
    flags = ["--run", run, "--data-dir", tmp_path / "data", "--split", "all", "--json", tmp_path / "scores.json"]
    evaluate_here("retrieval", *flags)
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 10


def test_search_writes_grid_and_json(run, sample, tmp_path):
    flags = ["--run", run, "--n", "4", "--floor", "0", "--cache-dir", tmp_path / "cache", "--output", tmp_path / "grid.png"]
    process = run_script("inference.py", "a red circle", *flags, "--json", tmp_path / "found.json")
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["query"] == "a red circle" and len(found["matches"]) == 4
    scores = [match["score"] for match in found["matches"]]
    assert scores == sorted(scores, reverse=True) and all(-1 <= score <= 1 for score in scores)
    validation = (sample / "shapes.devImages.txt").read_text().split()
    assert all(match["filename"].split("/")[-1] in validation for match in found["matches"])
    assert Image.open(tmp_path / "grid.png").size[0] > 300


def test_find_matches_ranks_by_cosine_and_gives_what_there_is(run):
    model, _ = clip.load(run, device="cpu")
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(5, 256), dim=1)
    names = [f"{i}.png" for i in range(5)]
    matches = inference.find_matches(model, embeddings, "a small blue star", names, n=9)
    with torch.no_grad():
        ids = torch.tensor([model.tokenizer.encode("a small blue star").ids])
        text = torch.nn.functional.normalize(model.encode_text(ids), dim=1)[0]
    expected = sorted(((embeddings[i] @ text).item() for i in range(5)), reverse=True)
    assert [score for _, score in matches] == pytest.approx(expected, abs=1e-5)
    assert matches[0][0] == names[(embeddings @ text).argmax()]
    with pytest.raises(UserError, match="query is empty"):
        inference.find_matches(model, embeddings, "  ", names)


def search(*flags):
    inference.search(read_search(list(map(str, flags))))


def test_large_galleries_are_searched_through_an_index_that_stays(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index, "APPROXIMATE_FROM", 100)
    monkeypatch.setattr(index, "BITS", 3)
    shapes.draw(tmp_path / "drawn", train=270, val=1, test=1)

    def matches(*more):
        flags = [
            "a red circle",
            "--floor",
            "0",
            "--run",
            run,
            "--images",
            tmp_path / "drawn",
            "--cache-dir",
            tmp_path,
            "--output",
            tmp_path / "m.png",
        ]
        search(*flags, "--json", tmp_path / "matches.json", *more)
        found = json.loads((tmp_path / "matches.json").read_text())["matches"]
        return [match["filename"] for match in found], [match["score"] for match in found]

    names, scores = matches("--exact")
    assert "search index" not in capsys.readouterr().out
    for built in (True, False):
        found = matches()
        assert found[0] == names and found[1] == pytest.approx(scores, abs=1e-5)
        assert ("building the search index of 272 pictures" in capsys.readouterr().out) == built


def test_several_texts_are_added_and_taken_away(run):
    model, _ = clip.load(run, device="cpu")
    a, b, c = queries.embed_texts(model, ["a red circle", "a star", "a large ring"])
    expected = 2 * a + 0.5 * b - 3 * c
    found = queries.embed_query(model, ["a red circle", "a star"], ["a large ring"], [2, 0.5, 3])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected[:-1]), atol=1e-6)
    np.testing.assert_allclose(queries.embed_query(model, ["a star"]), b, atol=1e-6)
    with pytest.raises(UserError, match="cancel out"):
        queries.embed_query(model, ["a star"], ["a star"])
    with pytest.raises(UserError, match="--weights: 1 numbers for 1 texts and 1"):
        queries.embed_query(model, ["a star"], ["a ring"], [1])


@pytest.mark.drawn
def test_a_picture_finds_itself_its_captions_and_its_class(run, sample, tmp_path, capsys):
    picture = sorted((sample / "Images").iterdir())[0]
    flags = ["--image", picture, "--run", run, "--cache-dir", tmp_path, "--json", tmp_path / "found.json"]
    search(*flags, "--images", sample, "--n", "3", "--output", tmp_path / "grid.png")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["image"] == str(picture) and Path(found["matches"][0]["filename"]) == picture.resolve()
    assert found["matches"][0]["score"] == pytest.approx(1, abs=1e-2) and len(found["matches"]) == 3
    captions = set(load_captions(sample)[0]["caption"])
    assert len(found["captions"]) == 5 and all(row["caption"] in captions for row in found["captions"])
    assert Image.open(tmp_path / "grid.png").width > 300

    search(*flags, "--classify", "a red circle", "a blue star", "a ring")
    classes = json.loads((tmp_path / "found.json").read_text())["classes"]
    model, preprocess = clip.load(run, device="cpu")
    with torch.no_grad():
        names = ["a red circle", "a blue star", "a ring"]
        logits, _ = model(preprocess(Image.open(picture))[None], clip.tokenize(names))
    expected = dict(zip(names, logits[0].softmax(dim=0).tolist()))
    assert {row["name"]: row["probability"] for row in classes} == pytest.approx(expected, abs=0.02)
    assert [row["probability"] for row in classes] == sorted((row["probability"] for row in classes), reverse=True)


def test_where_the_data_set_is_gone_a_picture_has_no_captions_and_is_still_searched(run, sample, tmp_path, monkeypatch, capsys):
    def gone(run):
        raise UserError("DATA: not there")

    monkeypatch.setattr(run_data, "read_data", gone)
    picture = sorted((sample / "Images").iterdir())[0]
    search(
        "--image",
        picture,
        "--images",
        sample,
        "--run",
        run,
        "--n",
        "2",
        "--cache-dir",
        tmp_path,
        "--output",
        tmp_path / "m.png",
    )
    said = capsys.readouterr().out
    assert "no captions for pictures: DATA: not there" in said and str(picture) in said


def test_a_file_of_queries_is_answered_line_by_line(run, tmp_path):
    (tmp_path / "queries.txt").write_text("a red circle\n\na blue star\na red circle\n")
    flags = ["--run", run, "--n", "2", "--floor", "0", "--cache-dir", tmp_path, "--json", tmp_path / "f"]
    search("--query-file", tmp_path / "queries.txt", *flags)
    found = json.loads((tmp_path / "f").read_text())["queries"]
    assert [row["query"] for row in found] == ["a red circle", "a blue star", "a red circle"]
    assert all(len(row["matches"]) == 2 for row in found)


def test_an_explanation_points_at_what_the_score_hangs_on():
    class Bright(torch.nn.Module):
        """Its feature is how bright the lower right quarter is, beside a constant."""

        def image_features(self, image):
            return torch.stack([image[:, :, 32:, 32:].float().mean(dim=(1, 2, 3)), torch.full((len(image),), 50.0)], dim=1)

    model = Bright()
    model.image_projection = torch.nn.Identity()
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[40:56, 40:56] = 255
    heat = occlusion_map(model, picture, np.array([1.0, 0.0], np.float32), torch.device("cpu"), torch.float32)
    assert heat.shape == (64, 64) and heat.max() == 1
    assert heat[44:52, 44:52].min() > 0.5 and heat[:24, :24].max() == 0


@pytest.mark.drawn
def test_explained_matches_are_drawn(run, tmp_path):
    search("a red circle", "--explain", "--run", run, "--n", "2", "--cache-dir", tmp_path, "--output", tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 300


BAD_SEARCHES = {
    "empty query": (["", "--run", "RUN"], "query is empty"),
    "no run": (["a dog", "--run", "nowhere"], "nowhere"),
    "no folder": (["a dog", "--run", "RUN", "--images", "nowhere"], "--images nowhere"),
    "no pictures": (["a dog", "--run", "RUN", "--images", "EMPTY"], "no pictures"),
    "n of 0": (["a dog", "--run", "RUN", "--n", "0"], "--n 0"),
    "endless query": (["a dog " * 2000, "--run", "RUN"], "the query has 12,000 characters"),
    "nothing asked": (["--run", "RUN"], "say what to look for"),
    "two things asked": (["a dog", "--image", "x.png", "--run", "RUN"], "say what to look for"),
    "no picture to classify": (["a dog", "--classify", "a", "b", "--run", "RUN"], "--classify: needs the picture"),
    "no such picture": (["--image", "nowhere.png", "--run", "RUN"], "nowhere.png: no such file"),
    "weights of no query": (["--image", "x.png", "--minus", "a", "--run", "RUN"], "--minus, --weights and --explain"),
    "no such file of queries": (["--query-file", "nowhere.txt", "--run", "RUN"], "nowhere.txt: no such file"),
}


@pytest.mark.parametrize("problem", BAD_SEARCHES)
def test_bad_searches_are_named(run, tmp_path, monkeypatch, capsys, problem):
    arguments, expected = BAD_SEARCHES[problem]
    places = {"RUN": str(run), "EMPTY": str(tmp_path)}
    flags = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(UserError, match=expected):
        inference.search(read_search(flags))
    assert list(tmp_path.iterdir()) == []


def test_evaluate_names_an_unknown_task_and_an_absent_split(run, sample, tmp_path, evaluate_here):
    process = run_script("evaluate.py", "guess")
    assert process.returncode == 2 and "retrieval" in process.stderr
    (tmp_path / "captions.txt").write_text("image,caption\n00001.png,a red circle\n")
    flags = ["--run", run, "--captions-path", tmp_path / "captions.txt", "--image-path", sample / "Images"]
    with pytest.raises(UserError, match="--split all"):
        evaluate_here("retrieval", *flags, "--split", "test")
