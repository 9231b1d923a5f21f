"""Zero-shot classification: names, prompts, scores."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
from Datasets import shapes
from evaluation.zeroshot import class_names, classifier, find_pictures
from utils.errors import UserError


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes") / "classes"
    shapes.draw_classes(folder, pictures=1)
    return folder


def test_folders_name_the_classes():
    assert class_names(["red_circle", "tench"]) == (["red circle", "tench"], {"red_circle": 0, "tench": 1})
    with pytest.raises(UserError, match="n01440764: a WordNet id .*--classes"):
        class_names(["dog", "n01440764"])


def test_imagenets_layouts_name_the_classes(tmp_path):
    folders = ["n01440764", "n01443537"]
    expected = (["goldfish", "tench", "white shark"], {"n01440764": 1, "n01443537": 0})
    lines = "n01443537 goldfish, Carassius auratus\nn01440764 tench, Tinca tinca\nn01484850 white shark, great white\n"
    (tmp_path / "synsets.txt").write_text(lines)
    assert class_names(folders, tmp_path / "synsets.txt") == expected
    (tmp_path / "tabs.txt").write_text("n01443537\tgoldfish\nn01440764\ttench\nn01484850\twhite shark\n")
    assert class_names(folders, tmp_path / "tabs.txt") == expected
    index = {"1": ["n01440764", "tench"], "0": ["n01443537", "goldfish"], "2": ["n01484850", "white_shark"]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert class_names(folders, tmp_path / "index.json") == expected


def test_plain_names_may_have_no_folder_and_folders_other_names(tmp_path):
    (tmp_path / "names.txt").write_text("hot dog\ncat\n\ncar\n")
    assert class_names(["car", "hot_dog"], tmp_path / "names.txt") == (["hot dog", "cat", "car"], {"car": 2, "hot_dog": 0})
    (tmp_path / "named.txt").write_text("c1\ta sports car\nc2\ta truck\n")
    assert class_names(["c2"], tmp_path / "named.txt") == (["a sports car", "a truck"], {"c2": 1})


@pytest.mark.parametrize(
    "text, expected",
    [("cat\ndog\n", "folder car is not among its 2 classes"), ("car\ncat\ncar\n", "two classes are called 'car'")],
)
def test_lists_that_do_not_fit_are_named(tmp_path, text, expected):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=expected):
        class_names(["car"], tmp_path / "names.txt")
    (tmp_path / "names.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="not in the layout"):
        class_names(["car"], tmp_path / "names.json")
    with pytest.raises(UserError, match="check --classes"):
        class_names(["car"], tmp_path / "nowhere.txt")


def test_folders_without_pictures_or_classes_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class folders"):
        find_pictures(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="only the class dog"):
        find_pictures(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="no pictures in its 2 folders"):
        find_pictures(tmp_path)


def test_several_templates_are_averaged(run):
    model, _ = clip.load(str(run), device="cpu")
    names, templates = ["red circle", "blue star"], ["a {} .", "one {} on sand ."]
    weights = classifier(model, names, templates, torch.device("cpu"), torch.float32)
    for name, row in zip(names, weights):
        with torch.no_grad():
            embeddings = [F.normalize(model.encode_text(clip.tokenize(t.format(name))), dim=1)[0] for t in templates]
        mean = (embeddings[0] + embeddings[1]) / 2
        torch.testing.assert_close(row, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="template 'a photo'"):
        classifier(model, names, ["a photo"], torch.device("cpu"), torch.float32)


def test_scores_are_those_of_openais_calls(run, classes, tmp_path, evaluate_here, capsys):
    (classes / "red star" / "broken.png").write_text("no picture")
    flags = ["zeroshot", "--run", run, "--images", classes, "--template", "a {} .", "the {} is small", "--precision", "fp32"]
    flags += ["--device", "cpu", "--output", tmp_path / "confusion.png", "--json", tmp_path / "scores.json"]
    with pytest.raises(UserError, match="broken.png: .*--skip-bad"):
        evaluate_here(*flags)
    evaluate_here(*flags, "--skip-bad")
    (classes / "red star" / "broken.png").unlink()
    assert "left out: 1 pictures" in capsys.readouterr().out
    model, preprocess = clip.load(str(run), device="cpu")
    names = sorted(path.name for path in classes.iterdir())
    image = torch.stack([preprocess(Image.open(classes / name / "000.png")) for name in names])
    with torch.no_grad():
        prompts = [model.encode_text(clip.tokenize([t.format(n) for n in names])) for t in ("a {} .", "the {} is small")]
        T_e = F.normalize(sum(F.normalize(e, dim=1) for e in prompts), dim=1)
        logits = (F.normalize(model.encode_image(image), dim=1) @ T_e.T).numpy()
    ranks = (logits >= np.diag(logits)[:, None]).sum(axis=1)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["images"], scores["classes"]) == (48, 48)
    assert scores["top1"] == pytest.approx(100 * (ranks <= 1).mean())
    assert scores["top5"] == pytest.approx(100 * (ranks <= 5).mean())
    assert cv2.imread(str(tmp_path / "confusion.png")) is not None


def test_foreign_folders_are_no_classes_and_their_files_no_pictures(tmp_path, capsys):
    for name in ("cat", "dog", "__MACOSX", ".ipynb_checkpoints", "@eaDir", "cat/@eaDir"):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "0.png"), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "dog" / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "dog" / "0.png").rename(tmp_path / "dog" / "0.jfif")
    names, paths, labels = find_pictures(tmp_path)
    assert names == ["cat", "dog"] and [path.name for path in paths] == ["0.png", "0.jfif"] and labels.tolist() == [0, 1]
    assert "left out 2 files hidden" in capsys.readouterr().out
