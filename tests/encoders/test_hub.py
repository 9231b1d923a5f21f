"""Files of a model hub: those on this machine first, then the network, and a fast answer where there is none."""

import http.server
import json
import shutil
import threading
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
import transformers

import clip
from encoders import build, hub
from encoders.hubness import Hubness
from utils.errors import UserError


@pytest.fixture
def online(monkeypatch):
    """As for a user, whose huggingface_hub may ask the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_files_that_are_here_ask_no_network(online, monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("the network was asked"))
    assert hub.from_hub(lambda: ("loaded", huggingface_hub.constants.HF_HUB_OFFLINE)) == ("loaded", True)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("answers", [True, False])
def test_files_that_are_not_here_are_fetched_where_a_hub_answers(online, monkeypatch, answers):
    monkeypatch.setattr(hub, "hub_answers", lambda: answers)
    tries = []

    def load():
        tries.append(huggingface_hub.constants.HF_HUB_OFFLINE)
        if tries[-1]:
            raise OSError("not on this machine")
        return "fetched"

    if answers:
        assert hub.from_hub(load) == "fetched" and tries == [True, False]
    else:
        with pytest.raises(OSError, match="not on this machine"):
            hub.from_hub(load)
        assert tries == [True]
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


class NotFound(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_any_answer_counts_and_it_is_asked_for_as_downloads_are(online, monkeypatch):
    """Python from python.org on macOS has no certificates for urllib; huggingface_hub brings its own."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked through urllib"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub.hub_answers()
    server.shutdown()
    server.server_close()
    assert not hub.hub_answers()


def test_without_a_hub_a_name_is_refused_at_once_in_one_line(online, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    started = time.monotonic()
    for load in (
        lambda: build.timm_encoder("resnet18", "pretrained"),
        lambda: build.load_pretrained(transformers.AutoModel, "somebody/nothing"),
    ):
        with pytest.raises(UserError) as error:
            load()
        assert "\n" not in str(error.value) and "neither on this machine nor" in str(error.value)
    assert time.monotonic() - started < 4 * hub.HUB_TIMEOUT  # not the minutes of five tries a file


@pytest.fixture
def scored(run, tmp_path):
    """A copy of the run that has all that is of its weights."""
    shutil.copytree(run, tmp_path / "scored")
    banks = [F.normalize(torch.randn(8, 256, generator=torch.Generator().manual_seed(seed)), dim=1) for seed in (0, 1)]
    Hubness(*banks, 10.0).save(tmp_path / "scored")
    for name in hub.RELEVANCE:
        (tmp_path / "scored" / name).write_text(f"learned with these weights: {name}")
    return tmp_path / "scored"


OF_COPIES = {"hubness.safetensors", *hub.RELEVANCE, "README.md"}


def test_a_copy_has_what_is_of_its_weights(scored, tmp_path):
    clip.load(scored, "cpu")[0].save_pretrained(tmp_path / "copy")
    for name in OF_COPIES | {"model.safetensors", "tokenizer.json", "splits.csv", "history.csv", "curves.png"}:
        assert (tmp_path / "copy" / name).read_bytes() == (scored / name).read_bytes(), name


def test_a_copy_of_other_weights_has_no_floor_and_no_figures(scored, tmp_path):
    model, _ = clip.load(scored, "cpu")
    model.save_pretrained(tmp_path / "copy")
    with torch.no_grad():
        model.logit_scale.mul_(0.5)
    model.save_pretrained(tmp_path / "copy")  # over the first one
    assert not any((tmp_path / "copy" / name).exists() for name in hub.RELEVANCE)
    assert (tmp_path / "copy" / "README.md").read_text() != (scored / "README.md").read_text()
    assert torch.equal(clip.load(tmp_path / "copy", "cpu")[0].logit_scale, model.logit_scale)


def test_what_is_pushed_is_complete_and_replaces_what_is_of_other_weights(scored, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, folder_path, delete_patterns, **options):
            uploaded.update(options, files={path.name for path in folder_path.iterdir()}, deleted=set(delete_patterns))

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    model, _ = clip.load(scored, "cpu")
    model.push_to_hub("somebody/shapes", branch="v2", delete_patterns="*.bin")
    assert OF_COPIES | {"config.json", "model.safetensors", "tokenizer.json"} <= uploaded["files"]
    assert uploaded["repo_id"] == "somebody/shapes" and uploaded["revision"] == "v2"
    assert {*hub.RELEVANCE, "hubness.safetensors", "*.bin"} <= uploaded["deleted"]


@pytest.fixture
def pushed(scored, tmp_path, monkeypatch, online):
    """A hub with two revisions of a run, and its cache here; the returned list gets what is asked of it."""
    asked, versions = [], {"v1": 0.25, "main": 0.5}

    def snapshot_download(name, allow_patterns, revision="main", **options):
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        asked.append((revision, offline))
        folder = tmp_path / "cache" / revision
        if not offline:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for path in filter(Path.exists, (scored / pattern for pattern in allow_patterns)):
                shutil.copy(path, folder)
            model, _ = clip.load(scored, "cpu")
            model.logit_scale.data.fill_(versions[revision])
            (folder / "model.safetensors").write_bytes(hub.weights_as_bytes(model))
        if not folder.exists():
            raise OSError("not on this machine")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda *_, **__: str(scored / "config.json"))
    monkeypatch.setattr(hub, "hub_answers", lambda: True)
    return asked, versions


def test_a_revision_holds_for_the_weights(pushed):
    for revision, expected in (("v1", 0.25), (None, 0.5)):
        model = clip.CLIPModel.from_pretrained("somebody/shapes", revision=revision)
        assert model.logit_scale.item() == expected and model.hubness is not None
    assert pushed[0] == [("v1", False), ("main", False)]


def test_a_hubs_copy_is_refreshed_and_used_without_a_hub(pushed, monkeypatch):
    asked, versions = pushed
    assert clip.load("somebody/shapes", "cpu")[0].logit_scale.item() == 0.5
    versions["main"] = 0.75
    assert clip.load("somebody/shapes", "cpu")[0].logit_scale.item() == 0.75
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    versions["main"] = 1.0
    assert clip.load("somebody/shapes", "cpu")[0].logit_scale.item() == 0.75
    assert asked[-1] == ("main", True)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_partial_download_is_said_for_what_it_is(pushed, tmp_path, monkeypatch, file):
    clip.load("somebody/shapes", "cpu")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    (tmp_path / "cache" / "main" / file).unlink()
    with pytest.raises(UserError, match=f"somebody/shapes: no {file} in .*; its download was interrupted") as error:
        clip.load("somebody/shapes", "cpu")
    assert "epoch" not in str(error.value) and "train" not in str(error.value)


def test_a_loaded_run_without_its_pictures_names_a_flag_of_the_search(scored, search_here, tmp_path):
    saved = json.loads((scored / "config.json").read_text())
    saved["config"]["data_dir"] = str(tmp_path / "elsewhere")
    (scored / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="its own pictures .* are not on this machine; name a .* with --images$"):
        search_here("a dog", "--run", scored, "--cache-dir", tmp_path / "cache", "--output", tmp_path / "matches.png")
