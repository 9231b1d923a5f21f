"""Choose the device and the precision, and speed up torch on a CPU."""

import ctypes
import functools
import os
import re
import shutil
import sys
import warnings

import torch

from utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def pick_device(name):
    """ "auto" or a torch device name -> torch.device. Raises UserError where it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "cuda" and (problem := missing_kernels("cuda")):
            warn_unsupported_gpu(problem)
            name = "cpu"
        elif name == "cpu" and torch.version.cuda and shutil.which("nvidia-smi"):
            warn_unused_gpu()
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available() and (problem := missing_kernels(device)):
            raise UserError(f"--device {name}: {problem}; pass --device cpu, or install a torch that was built for it")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None
    return device


def missing_kernels(device):
    """What is wrong where torch was not built for a GPU, which `torch.cuda.is_available` does not see; empty: nothing is.

    A build runs on GPUs of the same major compute capability that are not older (sm_80 on 8.6). What it has as PTX
    (compute_80) is compiled for all newer ones.
    """
    capability, built = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    targets = [target for target in (re.match(r"(sm|compute)_(\d+)(\d)", name) for name in built) if target]
    for kind, major, minor in (target.groups() for target in targets):
        target = int(major), int(minor)
        if target <= capability and (kind == "compute" or target[0] == capability[0]):
            return ""
    if not targets:  # a ROCm build names its GPUs in another way
        return ""
    major, minor = capability
    return f"torch {torch.__version__} has no kernels for this GPU, sm_{major}{minor}, only for {', '.join(built)}"


@functools.cache  # once
def warn_unsupported_gpu(problem):
    print(f"{problem}; so the CPU is used, until a torch is installed that was built for the GPU")


@functools.cache  # once
def warn_unused_gpu():
    cuda = torch.version.cuda
    print(f"torch finds no GPU although nvidia-smi exists, so the CPU is used; torch's CUDA {cuda} may need a newer driver")


def pick_dtype(precision, device):
    """ "auto", "fp32", "bf16" or "fp16" -> torch dtype of matrix products; weights stay fp32.

    auto is bf16 where the processor or GPU supports it natively (emulation would be slower than fp32), fp16 on GPUs whose
    tensor cores support nothing else (compute capability 7.0 to 7.5, such as V100 and T4), and else fp32.
    """
    if precision == "auto":
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            precision = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
        else:
            features = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.11 on
            native = device.type == "cpu" and (features.get("avx512_bf16", False) or features.get("amx_bf16", False))
            precision = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def can_multiply(device, dtype):
    """Whether a device has matrix products of a dtype under `autocast`."""
    one = torch.ones(1, 1, device=device)
    try:
        with warnings.catch_warnings(action="ignore"), autocast(device, dtype):
            return (one @ one).dtype == dtype
    except RuntimeError:
        return False


def autocast(device, dtype):
    """The autocast context for the encoders and heads."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_deterministic():
    """Makes torch use deterministic operations on CUDA; an operation without such a version raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.use_deterministic_algorithms(True)


def speed_up_cpu():
    """Speeds torch up on a CPU, for the whole process: freed memory is kept, and flash attention is not used.

    The sequences here are too short for flash attention to save memory, and on processors without AMX its bf16 forward pass
    takes several times as long as plain matrix products.
    """
    keep_freed_memory()
    torch.backends.cuda.enable_flash_sdp(torch.cuda.is_available())  # this switch applies to CPU and GPU


def keep_freed_memory():
    """Lets the C library keep freed memory (Linux with glibc; elsewhere nothing happens).

    By default it returns every large block to the system at once. Allocating the next one causes a page fault per 4 kB, which
    takes as much time per training step as the arithmetic.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
