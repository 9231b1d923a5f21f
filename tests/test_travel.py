"""Models that leave their machine: as a run folder through a model hub, as ONNX, with a card; and the notebook."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import clip
import inference
from config import PRESETS, resolve_defaults
from encoders.tokenizer import tokenize
from search.export import export_onnx
from search.options import read_search
from training.model_card import write_card
from utils.errors import UserError


def test_a_saved_model_is_a_run_folder_of_its_weights(run, tmp_path):
    model, _ = clip.load(run, "cpu")
    with torch.no_grad():
        model.image_projection.projection.weight.mul_(2)
    model.save_pretrained(tmp_path / "saved")
    names = {"config.json", "model.safetensors", "tokenizer.json", "splits.csv", "README.md", "history.csv", "curves.png"}
    names |= {path.name for path in run.glob("hubness.safetensors")}  # where the correction helped
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    for loaded in (clip.load(tmp_path / "saved", "cpu")[0], clip.CLIPModel.from_pretrained(tmp_path / "saved")):
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_model_saved_into_its_own_folder_leaves_its_settings_there(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    model, _ = clip.load(tmp_path / "run", "cpu")
    with torch.no_grad():
        model.image_projection.projection.weight.mul_(2)
    model.save_pretrained(tmp_path / "run")
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {"model.safetensors"} | ({*clip.OF_WEIGHTS} & before.keys()) - {clip.HUBNESS_FILE}  # that is the model's
    loaded, _ = clip.load(tmp_path / "run", "cpu")
    assert torch.equal(loaded.image_projection.projection.weight, model.image_projection.projection.weight)


def test_what_travels_names_no_folder_of_this_machine(run, sample, tmp_path):
    """The fixture's run was given absolute paths for all of its places, and a text encoder in a folder, as here."""
    shutil.copytree(run, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    assert saved["config"]["data_dir"] == str(sample)  # the run folder itself keeps it, to go on from
    saved["config"]["text_encoder"] = str(tmp_path / "encoders" / "my-bert")
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    model, _ = clip.load(tmp_path / "run", "cpu")
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name
    config = clip.load_run(tmp_path / "saved")["config"]
    assert (config.data_dir, config.text_encoder) == (sample.name, "my-bert")
    text = {"train": [0] * 3, "val": [0]}
    splits = {name: SimpleNamespace(names=rows, num_images=len(rows), num_captions=len(rows)) for name, rows in text.items()}
    scores = {side: dict.fromkeys(("R@1", "R@5", "R@10", "median_rank"), 0) for side in ("image_to_text", "text_to_image")}
    write_card(tmp_path, replace(config, text_encoder=str(tmp_path)), model, splits, scores)
    assert str(tmp_path) not in (tmp_path / "README.md").read_text() and tmp_path.name in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["runs/typo", "./typo", "/somebody/typo", "../typo", "~/typo", "runs\\typo"])
def test_what_means_a_folder_here_is_never_asked_of_a_hub(name, monkeypatch):
    def snapshot_download(*_, **__):
        raise AssertionError("a stranger's model would load")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="neither a run folder nor the name of a model"):
        clip.load(name)


def test_an_unknown_name_is_openais_runtime_error():
    with pytest.raises(RuntimeError, match=r"ViT-B/33: neither a run folder"):
        clip.load("ViT-B/33")


def test_a_pushed_model_is_fetched_by_its_name(run, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        for path in filter(Path.exists, (run / pattern for pattern in allow_patterns)):
            shutil.copy(path, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = clip.load("somebody/shapes", "cpu")
    assert asked == ["somebody/shapes"]
    own, _ = clip.load(run, "cpu")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in own.state_dict().items())


def test_a_name_that_no_hub_has_is_refused_with_the_list(capsys):
    with pytest.raises(UserError, match="somebody/nothing: neither a run folder nor the name of a model; there are .*RN50"):
        clip.load("somebody/nothing")


def test_only_a_run_can_be_saved(run, tmp_path):
    model, _ = clip.load(run, "cpu")
    model.run_dir = None
    with pytest.raises(UserError, match="only a model that clip.load found in a run folder"):
        model.save_pretrained(tmp_path / "saved")


def test_the_card_says_what_the_run_is(run):
    card = (run / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "{" not in card
    for said in ("96 training images with 480 captions", "24 validation images", "`test_resnet`", "`distilbert`", "seed 0"):
        assert said in card
    history = pd.read_csv(run / "history.csv")
    best = history.loc[history["rsum"].idxmax()]
    assert f"| {best['image_to_text_R@1']:.1f} |" in card


def check_onnx(model, folder):
    """The files in a folder give the model's embeddings, for other numbers and lengths than those that it was traced with."""
    onnxruntime = pytest.importorskip("onnxruntime")
    image = torch.randint(256, (5, 3, model.image_encoder.size, model.image_encoder.size)).float()
    ids, mask = tokenize(model.tokenizer, ["a red circle", "a large blue star left of a small ring", "a"])
    given = {"image": {"image": image}, "text": {"input_ids": ids, "attention_mask": mask}}
    with torch.no_grad():
        expected = {"image": model.encode_image(image), "text": model.encode_text(ids, mask)}
    for name, inputs in given.items():
        session = onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")
        [found] = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        np.testing.assert_allclose(found, torch.nn.functional.normalize(expected[name], dim=1).numpy(), atol=1e-4)


def test_onnx_files_give_the_same_embeddings(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    inference.search(read_search(["--export", "onnx", "--run", str(tmp_path / "run")]))
    check_onnx(clip.load(run, "cpu")[0], tmp_path / "run")


LAYERS = {"image_feature_stages": "layer2,layer3", "text_feature_layers": 2}


@pytest.mark.parametrize(("preset", "options"), [("gpt2", {}), ("gpt2", LAYERS), ("paper", {}), ("mixer", {})])
def test_every_preset_of_the_sample_becomes_onnx_files(preset, options, tmp_path):
    captions = ["a red circle", "a large blue star left of a small ring", "a"] * 20
    model = clip.create_model(resolve_defaults(replace(PRESETS[preset], data_dir=str(tmp_path), **options)), captions).eval()
    export_onnx(model, tmp_path)
    check_onnx(model, tmp_path)


def test_the_notebook_runs(tmp_path, sample, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    assert len(notebook.cells) <= 20
    shutil.copytree(sample, tmp_path / "Datasets" / "shapes")
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for cell in notebook.cells:  # the small sample has fewer images than the preset's batch
        cell.source = cell.source.replace("replace(PRESETS[preset],", "replace(PRESETS[preset], batch_size=32,")
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    for printed in ("no Flickr8k in", "by clip.contrastive_loss", "rsum", "a red circle"):
        assert printed in json.dumps(outputs)
    assert all("image/png" in json.dumps(cell.outputs) for cell in notebook.cells[-3::2])  # search and heat maps


def test_the_notebooks_stored_outputs_are_whole_and_small():
    path = ROOT / "notebook.ipynb"
    text = path.read_text(encoding="utf-8")
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert path.stat().st_size < 900_000
    pictures = ["".join(output["data"]["image/png"]) for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4
    assert max(map(len, pictures)) * 3 / 4 < 150_000  # base64 takes 4 characters for 3 bytes
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/(?:home|Users|root|tmp|opt|work)/|\\r", text)  # paths of a machine, progress bars


def first_cell(cwd, repository=""):
    """Runs the notebook's first cell as it would be run in a folder; returns what it prints."""
    cells = json.loads((ROOT / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    source = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "code"))
    assert 'REPOSITORY = ""' in source
    source = source.replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}") + "\nprint(os.getcwd())"
    command = [sys.executable, "-c", source]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=280).stdout


def test_the_notebooks_first_cell_says_that_the_project_is_missing(tmp_path):
    line, cwd = first_cell(tmp_path).splitlines()
    assert line.startswith("config.py is missing: set REPOSITORY")
    assert cwd == str(tmp_path)


def test_the_notebooks_first_cell_clones_the_project_once(tmp_path):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    (project / "config.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *arguments], cwd=project, check=True)
    for _ in range(2):
        line, cwd = first_cell(elsewhere, project.as_uri()).splitlines()
        assert line == "the project and its requirements are here"
        assert cwd == str(elsewhere / "clip-project")


def test_the_cards_code_runs_where_it_says(run, tmp_path, monkeypatch):
    """The fixture's run has an absolute --run-dir; runs/mine is below the folder that training was started in."""
    loaded = {}
    for folder in (run, tmp_path / "runs" / "mine"):
        if not folder.exists():
            shutil.copytree(run, folder)
            monkeypatch.chdir(tmp_path)
            saved = clip.load_run(folder)["config"]
            splits = {name: SimpleNamespace(names=[0], num_images=1, num_captions=1) for name in ("train", "val")}
            sides = ("image_to_text", "text_to_image")
            scores = {side: dict.fromkeys(("R@1", "R@5", "R@10", "median_rank"), 0) for side in sides}
            write_card("runs/mine", saved, clip.load(folder, "cpu")[0], splits, scores)
        card = (folder / "README.md").read_text(encoding="utf-8")
        code = "\n".join(line[4:] for line in card.splitlines() if line.startswith("    "))
        assert ("In the project's folder:" in card) == (folder != run)
        monkeypatch.chdir(tmp_path if folder != run else run.parent)
        exec(code, loaded)
        assert Path(loaded["model"].run_dir).resolve() == folder.resolve()
