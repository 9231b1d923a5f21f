"""Scoring and searching a run from the command line."""

import json
import shutil

import pytest
import torch
from conftest import run_script
from PIL import Image

import clip
import inference
from device import pick_device, pick_dtype
from storage import UserError


def test_retrieval_scores_what_training_scored(run, tmp_path):
    process = run_script("evaluate.py", "retrieval", "--run", run, "--split", "val", "--json", tmp_path / "scores.json")
    assert process.returncode == 0, process.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    best = max(float(line.split(",")[-2]) for line in (run / "history.csv").read_text().splitlines()[1:])
    assert (scores["images"], scores["captions"]) == (24, 120)
    assert scores["rsum"] == pytest.approx(best)
    assert set(scores["text_to_image"]) == {"R@1", "R@5", "R@10", "median_rank"} == set(scores["image_to_text"])


def test_match_writes_scores_and_a_picture(run, tmp_path, evaluate_here):
    flags = ["match", "--run", run, "--output", tmp_path / "match.png", "--json", tmp_path / "scores.json"]
    evaluate_here(*flags, "--choices", "3")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["images"], scores["choices"], scores["chance"]) == (24, 3, pytest.approx(100 / 3))
    assert 0 <= scores["interval"][0] <= scores["accuracy"] <= scores["interval"][1] <= 100
    assert Image.open(tmp_path / "match.png").width > 500
    with pytest.raises(UserError, match="--choices 25: there are only 24 images"):
        evaluate_here(*flags, "--choices", "25")


def test_split_all_scores_a_folder_that_only_holds_test_images(run, sample, tmp_path):
    shutil.copytree(sample, tmp_path / "data")
    for path in (tmp_path / "data").glob("*Images.txt"):
        path.unlink()
    names = sorted(path.name for path in (tmp_path / "data" / "Images").iterdir())[:10]
    lines = (sample / "captions.txt").read_text().splitlines()
    kept = [lines[0], *(line for line in lines[1:] if line.split(",")[0] in names)]
    (tmp_path / "data" / "captions.txt").write_text("\n".join(kept))
    run_script("evaluate.py", "retrieval", "--run", run, "--data-dir", tmp_path / "data", "--split", "all",
               "--json", tmp_path / "scores.json")  # fmt: skip
    assert json.loads((tmp_path / "scores.json").read_text())["images"] == 10


def test_search_writes_grid_and_json(run, sample, tmp_path):
    process = run_script("inference.py", "a red circle", "--run", run, "--n", "4", "--cache-dir", tmp_path / "cache",
                         "--output", tmp_path / "grid.png", "--json", tmp_path / "found.json")  # fmt: skip
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


def test_gallery_is_embedded_once_notices_changes_and_skips_broken_files(run, sample, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures" / "deeper"
    folder.mkdir(parents=True)
    for path in sorted((sample / "Images").iterdir())[:6]:
        shutil.copy(path, folder)
    (folder / "broken.jpg").write_text("no picture")
    model, preprocess = clip.load(run, device="cpu")
    device = pick_device("cpu")
    dtype = pick_dtype("fp32", device)

    def embed():
        gallery = inference.gallery(run, tmp_path / "pictures")
        return inference.embed_gallery(model, gallery, tmp_path / "cache", device, dtype)[:2]

    paths, embeddings = embed()
    assert len(paths) == len(embeddings) == 6 and "left out 1" in capsys.readouterr().out
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        expected = torch.nn.functional.normalize(model.encode_image(pixels), dim=1)
    torch.testing.assert_close(embeddings, expected, atol=1e-4, rtol=1e-4)
    computed = []
    original = inference.file_features
    monkeypatch.setattr(inference, "file_features", lambda *a, **k: computed.append(1) or original(*a, **k))
    assert torch.equal(embed()[1], embeddings) and not computed
    (folder / "broken.jpg").unlink()
    assert len(embed()[0]) == 6 and computed


def test_a_large_gallery_is_searched_through_an_index_that_stays(run, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "FROM", 100)  # the sample has 144 pictures

    def matches(*more):
        flags = ["a red circle", "--run", run, "--images", sample, "--cache-dir", tmp_path, "--output", tmp_path / "m.png"]
        flags += ["--json", tmp_path / "matches.json", *more]
        inference.parse_flags(inference.search, "inference.py", None, list(map(str, flags)))
        found = json.loads((tmp_path / "matches.json").read_text())["matches"]
        return [match["filename"] for match in found], [match["score"] for match in found]

    names, scores = matches("--exact")
    assert "building" not in capsys.readouterr().out
    for built in (True, False):
        found = matches()
        assert found[0] == names and found[1] == pytest.approx(scores, abs=1e-5)
        assert ("building" in capsys.readouterr().out) == built
    [index] = tmp_path.glob("*.faiss")
    index.write_bytes(index.read_bytes()[:1000])
    assert matches()[0] == names and "building" in capsys.readouterr().out


BAD_SEARCHES = {
    "empty query": (["", "--run", "RUN"], "query is empty"),
    "no run": (["a dog", "--run", "nowhere"], "nowhere"),
    "no folder": (["a dog", "--run", "RUN", "--images", "nowhere"], "--images nowhere"),
    "no pictures": (["a dog", "--run", "RUN", "--images", "EMPTY"], "no pictures"),
    "n of 0": (["a dog", "--run", "RUN", "--n", "0"], "--n 0"),
}


@pytest.mark.parametrize("problem", BAD_SEARCHES)
def test_bad_searches_are_named(run, tmp_path, monkeypatch, capsys, problem):
    arguments, expected = BAD_SEARCHES[problem]
    places = {"RUN": str(run), "EMPTY": str(tmp_path)}
    flags = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(UserError, match=expected):
        inference.parse_flags(inference.search, "inference.py", None, flags)
    assert list(tmp_path.iterdir()) == []


def test_evaluate_names_an_unknown_task_and_an_absent_split(run, sample, tmp_path):
    process = run_script("evaluate.py", "guess")
    assert process.returncode == 2 and "retrieval" in process.stderr
    (tmp_path / "captions.txt").write_text("image,caption\n00001.png,a red circle\n")
    process = run_script("evaluate.py", "retrieval", "--run", run, "--captions-path", tmp_path / "captions.txt",
                         "--image-path", sample / "Images", "--split", "test")  # fmt: skip
    assert process.returncode == 2 and "--split all" in process.stderr and process.stderr.count("\n") == 1
