"""Tests neither see what a user downloaded before nor leave anything there."""

import os
from pathlib import Path

import huggingface_hub
import torch


def test_the_libraries_caches_are_the_tests_own():
    own = Path(os.environ["CLIP_TEST_CACHES"])
    folders = [huggingface_hub.constants.HF_HUB_CACHE, torch.hub.get_dir(), os.environ["KAGGLEHUB_CACHE"]]
    assert all(Path(folder).is_relative_to(own) for folder in folders), folders
