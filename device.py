"""Which device computes, and in which precision."""

import ctypes
import functools
import os
import shutil
import sys

import torch

from storage import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def pick_device(name):
    """ "auto" or a torch device name -> torch.device. Raises UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cpu" and torch.version.cuda and shutil.which("nvidia-smi"):
            say_unused_gpu()
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


@functools.cache  # once
def say_unused_gpu():
    cuda = torch.version.cuda
    print(f"nvidia-smi is here, but torch finds no GPU, so the CPU computes; torch's CUDA {cuda} may need a newer driver")


def pick_dtype(precision, device):
    """ "auto", "fp32", "bf16" or "fp16" -> torch dtype of matrix products; weights stay fp32.

    auto is bf16 where the processor or GPU multiplies it natively, as emulation would be slower than fp32, and fp16 on GPUs
    whose tensor cores take nothing else: compute capability 7.0 to 7.5, such as V100 and T4.
    """
    if precision == "auto":
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            precision = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
        else:
            features = torch.cpu.get_capabilities()
            native = device.type == "cpu" and (features.get("avx512_bf16", False) or features.get("amx_bf16", False))
            precision = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device, dtype):
    """The context in which the towers and heads compute."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def be_deterministic():
    """Makes torch choose operations that give the same bits in each run on CUDA; those that cannot raise RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.utils.deterministic.fill_uninitialized_memory = False  # would show reads of it, which nothing here does
    torch.use_deterministic_algorithms(True)


def speed_up_cpu():
    """Sets torch up for speed on a CPU, for the whole process: freed memory is kept, attention is plain matrix products.

    torch's flash attention saves memory that the short sequences of captions and pictures do not take, and its forward pass
    in bf16 costs several times the products on processors without AMX.
    """
    keep_freed_memory()
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())  # the switch is one for both devices


def keep_freed_memory():
    """Lets the C library keep memory that was freed (Linux with glibc; elsewhere nothing happens).

    By default it hands every large block back to the system at once and the next one comes in anew, a page fault for each
    4 kB, which costs a training step as much time as its arithmetic.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
