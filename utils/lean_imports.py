"""Load timm and transformers without parts of torch that take more than half of the time and that no run here uses.

They are the compiler behind torch.compile, which comes with sympy and triton, and the sharding of models over machines. The
libraries load them for decorators that say how to compile a function, and for code that only runs where it is asked for.
"""

import contextlib
import functools
import importlib
import sys
import types
from unittest import mock

import torch

COMPILER = "torch._dynamo", "torch._dynamo.utils"  # the front end of torch.compile, which loads the rest
DECORATORS = "disable", "allow_in_graph", "assume_constant_result"  # they say how torch.compile should treat a function
SWITCHES = (  # functions of transformers that say what is installed; it then imports that
    *("is_torch_distributed_available", "is_torch_flex_attn_available"),
    *("is_accelerate_available", "is_scipy_available"),
)


@contextlib.contextmanager
def without_compiler():
    """A context whose imports find a stand-in for torch.compile's front end, unless that is loaded already.

    Its decorators change nothing, so torch.compile sees into functions that are imported here and hidden from it. For whatever
    else is asked of the stand-in the real one is loaded.
    """
    if COMPILER[0] in sys.modules:
        yield
        return
    stand_ins = {name: types.ModuleType(name) for name in COMPILER}

    def remove():
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def load(name):
        remove()
        return importlib.import_module(name)

    def from_the_real_one(name, attribute):
        if attribute.startswith("__"):  # inspect asks every module for its __file__
            raise AttributeError(attribute)
        return getattr(load(name), attribute)

    for name, module in stand_ins.items():
        module.__getattr__ = functools.partial(from_the_real_one, name)
    package, utils = stand_ins.values()
    package.__path__ = [f"{path}/_dynamo" for path in torch.__path__]
    for name in DECORATORS:
        setattr(package, name, lambda function=None, *_, **__: function or (lambda decorated: decorated))
    # torchvision imports this function, and calls it where a model looks for objects.
    utils.is_compile_supported = lambda device: load(utils.__name__).is_compile_supported(device)
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        remove()


@contextlib.contextmanager
def without_sharding():
    """A context in which transformers imports nothing that shards a model, nor scipy, which a loss for boxes needs."""
    from transformers import utils

    with contextlib.ExitStack() as patches:
        for module in (utils, utils.import_utils):
            for name in (switch for switch in SWITCHES if hasattr(module, switch)):  # a version may lack some
                patches.enter_context(mock.patch.object(module, name, lambda: False))
        yield
