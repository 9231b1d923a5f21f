"""The optimizer's parameter groups, and the learning rate as a function of the step."""

import math

import torch


def parameter_groups(model, config):
    """AdamW's groups: a learning rate for each encoder and one for the heads; weight decay on weight matrices only.

    The grouping does not depend on the rates, so a resumed run may change them.
    """
    rates = {"image_encoder": config.image_encoder_lr, "text_encoder": config.text_encoder_lr, "heads": config.head_lr}
    backbone, groups = model.image_encoder.backbone, {}
    undecayed = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()  # a ViT's position embeddings
    undecayed = {f"image_encoder.backbone.{name}" for name in undecayed}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part, decays = name.split(".")[0], parameter.ndim > 1 and name not in undecayed
            groups.setdefault((part if part in rates else "heads", decays), []).append(parameter)
    return [
        {"params": params, "base_lr": rates[part], "lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0}
        for (part, decays), params in groups.items()
    ]


def create_optimizer(groups, device):
    return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda"))


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
