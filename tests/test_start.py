"""Commands start at once: a help and a mistake load nothing that takes seconds, and a run loads only what it needs."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

from config import PRESETS
from evaluation.options import TASKS

SLOW = {
    "torch",
    "torchvision",
    "transformers",
    "timm",
    "numpy",
    "pandas",
    "cv2",
    "matplotlib",
    "sklearn",
    "scipy",
    "onnxruntime",
}
SCRIPTS = (
    *("main.py", "evaluate.py", "inference.py", "GAN.py", "app.py", "lessons.py"),
    *("assignment/check.py", "assignment/make.py", "Datasets/shapes.py"),
)
COMMANDS = [*([script] for script in SCRIPTS), ["-m", "utils.cache"], ["-m", "training.shards"]]
MISTAKES = [  # a command line: what its answer names
    ("main.py shapes --batch-size 64 --epoch 3 --seed 1", "--epoch: there is no such flag; did you mean --epochs?"),
    ("main.py shapes --seed 1 --epochs=many --head-lr 1", "--epochs many: must be a whole number"),
    ("main.py shapes --head-lr fast --seed 1", "--head-lr fast: must be a number"),
    ("main.py shapes --precision fp8 --seed 1", "--precision fp8: must be one of auto, fp32, bf16, fp16"),
    ("main.py shapes --epochs", "--epochs: a value is missing behind it"),
    ("main.py shapes --epochs 1 2", "2: belongs to no flag"),
    ("main.py shape --epochs 3", "did you mean shapes?"),
    ("main.py shapes --batch-size -1", "--batch-size -1: must be at least 0"),
    ("main.py shapes --batch-size 30 --micro-batch-size 8", "does not divide --batch-size 30"),
    ("main.py shapes --resume --run-dir nowhere", "nowhere: no run is there"),
    ("main.py --data-dir mine", "--data-dir mine: name the preset, too: for photographs flickr8k, linear, fast,"),
    ("main.py --data-dir mine --dry-run", "from scratch shapes, gpt2, paper, mixer; as in python main.py fast --data-dir mine"),
    ("main.py --data-dir mine/00.tar --val-data mine/01.tar", "--data-dir mine/00.tar: name the preset, too"),
    ("main.py --captions-path mine.csv --image-path mine", "--captions-path mine.csv: name the preset, too"),
    ("main.py --image-path mine", "--image-path mine: name the preset, too"),
    ("main.py shapes --image-path mine", "--image-path mine: name its captions, too"),
    ("main.py --model ViT-B/32", "as in python main.py open_clip --model ViT-B/32"),
    ("GAN.py --data-dir mine", "without a preset the text encoder would be the drawn sample's"),
    ("main.py open_clip --model runs/nowhere", "runs/nowhere: no run is there"),
    ("evaluate.py retreival --run runs/shapes", "did you mean retrieval?"),
    ("evaluate.py retrieval --split tests --run nowhere", "--split tests: must be one of train, val, test, all"),
    ("evaluate.py retrieval --split test", "--run is missing"),
    *((f"evaluate.py {task} --run nowhere{more}", "nowhere: no run is there") for task, more in (
        ("retrieval", ""), ("match", ""), ("zeroshot", " --images ."), ("sts", " --file x"), ("twins", ""), ("calibrate", ""),
        ("compare", " nowhere-else"),
    )),
    ("evaluate.py leaks", "--data-dir: name the folder to check"),
    ("inference.py dog --run nowhere", "nowhere: no run is there"),
    ("inference.py dog --imges .", "did you mean --images?"),
    ("inference.py dog --n 0", "--n 0"),
    ("inference.py", "say what to look for"),
    ("GAN.py shapes --ema 1", "--ema 1.0: must be at least 0 and below 1"),
    ("GAN.py flickr8k --run nowhere", "nowhere: no run is there"),
    ("GAN.py shapes --generate 5 --run-dir nowhere", "nowhere: no generator is there"),
    ("app.py --run nowhere", "nowhere: no run is there"),
    ("app.py --prot 7860", "did you mean --port?"),
    ("lessons.py temprature", "did you mean temperature?"),
    ("lessons.py loss --sedes 0", "did you mean --seeds?"),
    ("assignment/check.py nowhere", "nowhere: no such folder"),
    ("assignment/check.py --task los", "--task los: unknown"),
    ("assignment/make.py nowhere more", "more: belongs to no flag"),
    ("Datasets/shapes.py", "folder: is missing"),
    ("Datasets/shapes.py nowhere --clases", "did you mean --classes?"),
    ("-m utils.cache --cache-dr nowhere", "did you mean --cache-dir?"),
    ("-m training.shards Datasets", "output: is missing"),
]  # fmt: skip


WITHOUT_TORCH = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *others: None if name.partition(".")[0] in ("torch", "numpy") else find(name, *others)
"""


@pytest.fixture
def start(tmp_path):
    """start(command) -> the finished process of a command, in an empty folder, and the modules that it imported."""

    def start(arguments, *options, **environment):
        words = [str(ROOT / word) if word in SCRIPTS else word for word in arguments]
        command = [sys.executable, "-X", "importtime", *options, *words]
        environment = {"PATH": "", "PYTHONPATH": str(ROOT)} | environment
        process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
        loaded = set(re.findall(r"^import time:.* \| +([\w.]+)$", process.stderr, re.MULTILINE))
        process.stderr = re.sub(r"^import time:.*\n", "", process.stderr, flags=re.MULTILINE)
        return process, loaded

    return start


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_help_loads_nothing_slow(start, command):
    for flag in ("--help", "-h"):
        process, loaded = start([*command, flag])
        assert process.returncode == 0 and process.stdout.startswith("usage: ") and not process.stderr
        assert not loaded & SLOW


@pytest.mark.parametrize("line", [*(f"main.py {preset} --help-all" for preset in PRESETS), "lessons.py", "evaluate.py"])
def test_a_list_loads_nothing_slow(start, line):
    process, loaded = start(line.split())
    assert process.returncode == 0 and process.stdout and not process.stderr
    assert not loaded & SLOW


@pytest.mark.parametrize("task", TASKS)
def test_the_help_of_a_task_loads_nothing_slow(start, task):
    process, loaded = start(["evaluate.py", task, "--help"])
    assert process.returncode == 0 and process.stdout.startswith(f"usage: python evaluate.py {task}")
    assert not loaded & SLOW


@pytest.mark.parametrize("line, answer", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_loads_nothing_slow(start, line, answer):
    process, loaded = start(line.split())
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1 and answer in process.stderr
    assert not loaded & SLOW


@pytest.mark.parametrize(
    "line",
    [
        "main.py shapes",
        "evaluate.py retrieval --run RUN",
        "evaluate.py leaks --data-dir .",
        "inference.py dog --run RUN",
        "GAN.py shapes",
        "app.py --run RUN",
        "lessons.py loss",
        "assignment/check.py",
        "assignment/make.py nowhere",
        "Datasets/shapes.py nowhere",
        "-m utils.cache",
        "-m training.shards a b",
    ],
)
@pytest.mark.parametrize("missing", ["torch and others", "all"])
def test_a_missing_package_is_one_line_with_what_to_do(start, line, missing, tmp_path, run):
    """-S: Python without its packages. Else torch and numpy, which nearly all commands need, are not found."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCH)
    options = ["-S"] if missing == "all" else []
    arguments = [str(run) if word == "RUN" else word for word in line.split()]
    process, _ = start(arguments, *options, PYTHONPATH=f"{tmp_path}:{ROOT}")
    if line == "assignment/make.py nowhere" and not options:  # needs neither
        assert process.returncode == 0
        return
    assert process.returncode == 2, process.stderr
    assert re.fullmatch(r"error: the package \w+ is missing: pip install -r requirements.txt\n", process.stderr)


def test_a_training_on_the_sample_loads_only_what_it_needs(start, sample, tmp_path):
    flags = ["--data-dir", str(sample), "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    process, loaded = start(["main.py", "shapes", *flags, "--epochs", "1", "--batch-size", "32"])
    assert process.returncode == 0, process.stderr
    unused = {"open_clip", "peft", "accelerate", "datasets", "faiss", "starlette", "onnxruntime"}
    unused |= {"torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy"}
    assert "torch" in loaded and not loaded & unused


def test_what_is_imported_without_the_compiler_can_be_compiled():
    """The stand-in is gone after the imports, and what asks for the compiler finds the real one."""
    source = """
import sys, encoders, torch
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
from torch._dynamo.utils import is_compile_supported
from torchvision.ops import roi_align
compiled = torch.compile(lambda x: 2 * x + 1, backend="eager")
assert compiled(torch.ones(3)).tolist() == [3, 3, 3]
boxes = torch.tensor([[0.0, 0, 0, 4, 4]])
assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).shape == (1, 1, 2, 2)
"""
    process = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr
