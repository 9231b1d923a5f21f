"""The optimizer's parameter groups, and the learning rate as a function of the step."""

import math

import torch

from training import distributed


def parameter_groups(model, config):
    """AdamW's groups: a learning rate for each encoder and one for the heads; weight decay on weight matrices only.

    With --layer-decay an encoder's layers have a group each, whose rate is that of the layer above times the decay (Clark et
    al. 2020, arXiv:2003.10555). The grouping does not depend on the rates, so a resumed run may change them.
    """
    rates = {"image_encoder": config.image_encoder_lr, "text_encoder": config.text_encoder_lr, "heads": config.head_lr}
    groups, undecayed, heights = {}, set(), {}
    for part in ("image_encoder", "text_encoder"):
        backbone = getattr(model, part).backbone
        if config.layer_decay < 1:
            heights |= layers_above(backbone, f"{part}.backbone.")
        names = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # a ViT's position embeddings
        undecayed |= {f"{part}.backbone.{name}" for name in names}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, decays = name.split(".")[0], parameter.ndim > 1 and name not in undecayed
            height = heights.get(name, 0)
            groups.setdefault((part if part in rates else "heads", height, decays), []).append(parameter)
    rows = [(rates[part] * config.layer_decay**height, decays, params) for (part, height, decays), params in groups.items()]
    return [
        {"params": params, "base_lr": rate, "lr": rate, "weight_decay": config.weight_decay if decays else 0.0}
        for rate, decays, params in rows
    ]


def layers_above(encoder, prefix):
    """{name: how many layers of an encoder are above that of the parameter}. prefix: of the names.

    A parameter's layer is its name up to the first part that ends in a digit: blocks.3.mlp.fc1.weight is in blocks.3, and conv1
    is a layer, too. What comes before the first one is another layer, and so is what comes behind the last one, with the
    projection that open_clip names first.
    """
    layers, layer_of, position = [], {}, 0
    for name, _ in encoder.named_parameters():
        parts = name.split(".")
        numbered = next((i for i, part in enumerate(parts) if part[-1].isdigit()), None)
        layer = ".".join(parts[: numbered + 1]) if numbered is not None else None
        if layer and layer not in layers:
            layers.append(layer)
        if layer:
            position = layers.index(layer) + 1
        elif position:
            position = len(layers) + 1
        layer_of[name] = None if parts[-1] in ("proj", "text_projection") else position
    top = len(layers) + 1
    return {f"{prefix}{name}": top - (top if layer is None else layer) for name, layer in layer_of.items()}


def undecorated(method):
    """A method without its outermost decorator; as it is in a version of torch that does not decorate it."""
    return getattr(method, "__wrapped__", method)


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with its methods as they are before torch hides them from torch.compile, which loads it: two seconds."""

    step = torch.no_grad()(undecorated(torch.optim.AdamW.step))
    zero_grad = undecorated(torch.optim.AdamW.zero_grad)
    add_param_group = undecorated(torch.optim.AdamW.add_param_group)
    state_dict = undecorated(torch.optim.AdamW.state_dict)
    load_state_dict = undecorated(torch.optim.AdamW.load_state_dict)


def create_optimizer(groups, device, sharded=False):
    """AdamW. sharded: each of several processes keeps the two averages of its share of the parameters only."""
    if sharded and distributed.size() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # only here: this import takes a second

        # What is loaded into it has its steps on the CPU, which fused steps on a GPU refuse.
        return ZeroRedundancyOptimizer(groups, optimizer_class=torch.optim.AdamW, fused=device.type == "cpu")
    return AdamW(groups, fused=device.type in ("cpu", "cuda"))


def is_stale(rsums, start_rsum, epochs):
    """Whether the last `epochs` epochs were no better than before. start_rsum: before the first. epochs: 0 never is."""
    best = max([start_rsum, *rsums[: len(rsums) - epochs]])
    return 0 < epochs <= len(rsums) and max(rsums[-epochs:]) <= best


def plateau_factor(rsums, patience, factor):
    """The factor of the learning rates after epochs with these sums of six recalls, as in torch's ReduceLROnPlateau."""
    best, num_bad_epochs, product = -math.inf, 0, 1.0
    for rsum in rsums:
        num_bad_epochs = 0 if rsum > best else num_bad_epochs + 1
        best = max(best, rsum)
        if num_bad_epochs > patience:
            product, num_bad_epochs = product * factor, 0
    return product


def lr_scale(step, steps, config, rsums):
    """The factor of the base learning rates at a step of `steps`: linear warmup, then cosine decay or `plateau_factor`."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "plateau":
        return plateau_factor(rsums, config.patience, config.factor)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
