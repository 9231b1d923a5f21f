import gc
import os
import tempfile

gc.disable()  # until all is imported
os.environ["MPLBACKEND"] = "agg"  # no test opens a window
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a network
if "CLIP_TEST_CACHES" not in os.environ:  # no test sees what a user fetched before, or leaves anything there
    caches = tempfile.TemporaryDirectory(prefix="clip-tests-")  # goes with this process; xdist's workers share it
    os.environ["CLIP_TEST_CACHES"] = caches.name
for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "TRANSFORMERS_CACHE"):
    os.environ.pop(variable, None)
for variable in ("HF_HOME", "TORCH_HOME", "KAGGLEHUB_CACHE"):
    os.environ[variable] = os.path.join(os.environ["CLIP_TEST_CACHES"], variable.lower())
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests run at once, each on a core
    os.environ["OMP_NUM_THREADS"] = "1"

import multiprocessing
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import evaluate
import inference
import main
from config import parse_config
from Datasets import shapes
from search.options import read_search
from tests.figures import save_blank

gc.freeze()  # else each full collection looks through half a million objects of the libraries
gc.enable()

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def run_script(*arguments, cwd=ROOT):
    """Runs a command of the project and returns the finished process."""
    command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)


def wait_until(condition, seconds=60):
    """Waits for a condition(). Fails where it is not true within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="try what is random as often as docs/runs.md says")


@pytest.fixture
def times(request):
    """times(short, long): how often something random is tried."""
    return lambda short, long: long if request.config.getoption("--long") else short


@pytest.fixture(scope="session")
def forked():
    """forked(function, *arguments) -> a started process, a copy of one that has the slow imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])

    def start(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Figures are built, but not drawn, which takes half of a small training's time; but in tests that look at them."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_blank)


@pytest.fixture
def evaluate_here():
    """Runs `python evaluate.py ARGUMENTS` in this process, which has its imports behind it."""
    return lambda *arguments: evaluate.main(list(map(str, arguments)))


@pytest.fixture
def search_here():
    """Runs `python inference.py ARGUMENTS` in this process."""
    return lambda *arguments: inference.search(read_search(list(map(str, arguments))))


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A small drawn sample: 96 training, 24 validation and 24 test images."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    shapes.draw(folder, train=96, val=24, test=24, seed=1)
    return folder


@pytest.fixture(scope="session")
def run(sample, tmp_path_factory):
    """The folder of a run on the small sample, in fp32: in bf16 it would be another on each kind of processor."""
    folder = tmp_path_factory.mktemp("run")
    flags = [
        "shapes", "--data-dir", str(sample), "--run-dir", str(folder / "run"), "--cache-dir", str(folder / "cache"),
        "--batch-size", "32", "--epochs", "3", "--device", "cpu", "--precision", "fp32",
    ]  # fmt: skip
    main.train(parse_config(flags, "shapes")[0])
    return folder / "run"


def flags_for_small(sample, folder, run_dir="run", **options):
    """Flags that train on the small sample in a second."""
    options = {
        "data_dir": sample, "run_dir": folder / run_dir, "cache_dir": folder / "cache", "text_layers": 1,
        "text_width": 32, "text_heads": 2, "batch_size": 32, "epochs": 2, "precision": "fp32", "device": "cpu",
    } | options  # fmt: skip
    named = [(name.replace("_", "-"), value) for name, value in options.items()]
    words = [[f"--no-{name}"] if value is False else [f"--{name}", str(value)] for name, value in named]
    return ["shapes", *sum(words, [])]


@pytest.fixture
def small_flags(sample, tmp_path):
    return partial(flags_for_small, sample, tmp_path)


@pytest.fixture
def real_photographs():
    if not (SHARED / "flickr8k").is_dir():
        pytest.skip("../shared/flickr8k is not here")
    return SHARED


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; the test is skipped where there is none."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
