"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685) in both encoders, through peft: --lora-rank."""

import copy
import warnings

import torch
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError

PARTS = ("image_encoder", "text_encoder")
ALPHA = 2  # an adapter's output is scaled by ALPHA, whatever its rank


def add_adapters(model, rank):
    """Adds an adapter to each linear layer and attention of both encoders; their own weights are frozen.

    Raises UserError for an encoder that has none.
    """
    import peft  # only here: hardly any run needs it
    import torch.distributed.tensor  # noqa: F401  some versions of peft use it without importing it

    for part in PARTS:
        encoder = getattr(model, part)
        layers = layers_to_adapt(encoder.backbone)
        if not layers:
            raise UserError(f"--lora-rank {rank}: the {part.replace('_', ' ')} has no linear layers; leave the flag out")
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHA * rank, target_modules=layers)
        encoder.pretrained = True  # so that BatchNorm statistics, which are not saved, stay as they are
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # peft asks transformers for an older attribute
            encoder.backbone = peft.get_peft_model(encoder.backbone, config)


def layers_to_adapt(backbone):
    """The names of the linear layers and attentions of a module; what is inside an attention belongs to it.

    Left out are layers whose weights open_clip reads without calling them, as an adapter would have no effect there, and
    attentions whose keys have another width than their queries, which peft does not support.
    """
    modules = dict(backbone.named_modules())
    attentions = [name for name, module in modules.items() if isinstance(module, torch.nn.MultiheadAttention)]
    pools = [name for name, module in modules.items() if type(module).__module__ == "open_clip.modified_resnet"]
    inside = tuple(f"{name}." for name in (*attentions, *pools) if name)
    attentions = [name for name in attentions if modules[name]._qkv_same_embed_dim]
    linear = [name for name, module in modules.items() if isinstance(module, (torch.nn.Linear, Conv1D))]
    return attentions + [name for name in linear if not name.startswith(inside) and name != "text_projection"]


def merged(model):
    """The model itself, or where it has adapters a copy whose weights are those with the adapters added."""
    if not has_adapters(model):
        return model
    model = copy.deepcopy(model)
    merge_adapters(model)
    return model


def merge_adapters(model):
    """Adds the adapters to the weights of a model, which then has none."""
    for part in PARTS:
        encoder = getattr(model, part)
        if is_adapted(encoder):
            encoder.backbone = encoder.backbone.merge_and_unload()


def has_adapters(model):
    return any(is_adapted(getattr(model, part)) for part in PARTS)


def is_adapted(encoder):
    return hasattr(encoder.backbone, "merge_and_unload")  # a peft.PeftModel


def describe_adapters(model, rank):
    """A line on how many parameters train, and the memory that AdamW takes for them."""
    total = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" not in name)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return (
        f"adapters of rank {rank}: {trained / 1e6:.2f} of {total / 1e6:.1f} million parameters are trained; AdamW keeps "
        f"{8 * trained / 1e6:.0f} MB for them instead of {8 * total / 1e6:,.0f}"
    )
