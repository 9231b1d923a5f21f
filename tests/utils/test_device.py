"""Which device and precision are taken, and what is said about GPUs that are not used."""

import sys

import pytest
import torch

import main
from config import parse_config
from training.optimization import undecorated
from utils import device
from utils.device import pick_device, pick_dtype
from utils.errors import UserError
from utils.lean_imports import SWITCHES, without_sharding


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


PASCAL, NEW = (6, 0), ["sm_70", "sm_75", "sm_80", "sm_90", "sm_120"]


def gpu_of(monkeypatch, capability, built):
    device.warn_unsupported_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # there may be no GPU here


def test_a_gpu_that_torch_was_not_built_for_is_named_in_one_line(monkeypatch, capsys):
    gpu_of(monkeypatch, PASCAL, NEW)
    for _ in range(2):
        assert pick_device("auto") == torch.device("cpu")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "sm_60" in said and "sm_70, sm_75" in said and "the CPU is used" in said
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"--device {name}: torch .* no kernels for this GPU, sm_60.*--device cpu"):
            pick_device(name)


@pytest.mark.parametrize(
    ("capability", "built"),
    [
        ((7, 0), NEW),
        ((8, 6), NEW),  # runs what was built for 8.0
        ((12, 1), NEW),
        ((10, 0), ["sm_80", "compute_90"]),  # compiled for it at the first use
        ((9, 0), ["sm_90a"]),
        ((9, 0), ["gfx90a", "gfx942"]),  # ROCm
    ],
)
def test_a_gpu_that_torch_was_built_for_is_taken(capability, built, monkeypatch, capsys):
    gpu_of(monkeypatch, capability, built)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("capability", "built"), [((8, 0), ["sm_86", "sm_90"]), ((10, 0), NEW), ((7, 0), ["compute_75"])])
def test_an_older_gpu_or_one_of_another_generation_is_not_taken(capability, built, monkeypatch):
    gpu_of(monkeypatch, capability, built)
    assert pick_device("auto") == torch.device("cpu")


def test_auto_is_fp32_where_torch_does_not_say_what_the_processor_can_do(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # torch 2.10
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32


def test_versions_of_the_libraries_that_lack_what_is_replaced(monkeypatch):
    from transformers import utils

    for name in SWITCHES:  # transformers 5.0 has not all of them in both places
        monkeypatch.delattr(utils, name, raising=False)
    with without_sharding():
        assert not utils.import_utils.is_accelerate_available()
    assert undecorated(torch.optim.SGD.step).__name__ == "step"
    assert undecorated(test_versions_of_the_libraries_that_lack_what_is_replaced).__name__.startswith("test_versions")
