"""Finding Flickr8k, and fetching it where there is a network."""

import sys
import types

import pytest

import main
from config import parse_config
from Datasets import flickr8k
from utils.errors import UserError


def test_it_is_found_where_a_place_holds_data(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "captions.txt").touch()
    monkeypatch.setattr(flickr8k, "PLACES", [str(tmp_path / name) for name in ("nowhere", "empty", "full")])
    assert flickr8k.find() == str(tmp_path / "full")


@pytest.mark.parametrize("place", ["flickr8k", "datasets/owner/flickr8k", "a/b/c/d", "datasets/owner/flickr8k/Flickr8k"])
def test_it_is_found_wherever_kaggle_mounts_it(tmp_path, monkeypatch, place):
    monkeypatch.setattr(flickr8k, "PLACES", [])
    monkeypatch.setattr(flickr8k, "KAGGLE_INPUT", str(tmp_path))
    assert flickr8k.find() is None
    (tmp_path / "competition" / "x").mkdir(parents=True)
    (tmp_path / "competition" / "captions.txt").touch()  # has no Images/ beside it
    (tmp_path / "x" / "y" / "z" / "too" / "deep" / "Images").mkdir(parents=True)
    (tmp_path / "x" / "y" / "z" / "too" / "deep" / "captions.txt").touch()
    assert flickr8k.find() is None
    (tmp_path / place / "Images").mkdir(parents=True)
    (tmp_path / place / "captions.txt").touch()
    assert flickr8k.find() == str(tmp_path / place)


def kagglehub(monkeypatch, fetch):
    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=fetch))
    monkeypatch.setattr(flickr8k, "find", lambda: None)


def test_download_trains_on_what_kagglehub_fetched(monkeypatch):
    kagglehub(monkeypatch, lambda name: f"/fetched/{name}")
    trained = []
    monkeypatch.setattr(main, "train", trained.append)
    for words in (["flickr8k", "--download"], ["--download"]):
        main.main(*parse_config(words))
    assert [config.data_dir for config in trained] == ["/fetched/adityajn105/flickr8k"] * 2


def test_without_a_network_it_says_what_to_do_by_hand(monkeypatch):
    def fetch(name):
        raise ConnectionError("no network")

    kagglehub(monkeypatch, fetch)
    for flags in (["--download"], []):
        with pytest.raises(UserError, match=r"kaggle\.com/datasets/adityajn105/flickr8k.*--data-dir"):
            main.main(*parse_config(["flickr8k", *flags]))


def test_data_that_is_there_decides_the_preset(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(main, "train", trained.append)
    monkeypatch.setattr(flickr8k, "find", lambda: str(tmp_path))
    main.main(*parse_config([]))
    assert trained[0].image_encoder == "resnet50" and trained[0].data_dir == str(tmp_path)
