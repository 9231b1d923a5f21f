"""Which device and precision are taken, and what is said about GPUs that are not used."""

import sys

import pytest
import torch

import main
from config import parse_config
from utils import device
from utils.device import pick_device, pick_dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),  # P100's kin: no tensor cores
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((9, 0), torch.bfloat16),
    ],
)
def test_auto_takes_what_a_gpus_tensor_cores_take(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert pick_dtype("auto", torch.device("cuda")) == dtype
    assert pick_dtype("fp32", torch.device("cuda")) == torch.float32


def test_a_gpu_that_torch_cannot_use_is_mentioned_once(monkeypatch, capsys):
    device.warn_unused_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert pick_device("auto") == torch.device("cpu") and capsys.readouterr().out == ""
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    for _ in range(2):
        assert pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "nvidia-smi" in said and "newer driver" in said
    device.warn_unused_gpu.cache_clear()


def test_a_machine_with_several_gpus_is_told_of_torchrun(monkeypatch, capsys):
    monkeypatch.setattr(main, "train", lambda config: None)
    monkeypatch.setattr(main, "fetch_data", lambda config, _: config)
    for count, said in ((1, 0), (4, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setattr(sys, "argv", ["main.py", "shapes", "--epochs", "2"])
        main.main(*parse_config(sys.argv[1:]))
        lines = capsys.readouterr().out.splitlines()
        assert lines.count("one of 4 GPUs is used; all: torchrun --nproc-per-node 4 main.py shapes --epochs 2") == said
