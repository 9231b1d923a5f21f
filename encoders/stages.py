"""Cut an image encoder at one of its stages, and take features from several stages.

The layers below the cut, the trunk, are frozen: they run once per crop and their outputs, the activations, are cached. Hooks
are used because timm's `forward_intermediates` cannot continue from a stage's output, and not every model has it. They hang on
the model, so another thread's forward pass would call them, too: passes with hooks take turns.
"""

import threading

import torch
from torch import nn

from utils.errors import UserError

HOOKED = threading.RLock()  # held during a forward pass with hooks; one for all, as models are copied and locks cannot be


class StopForward(Exception):
    """Stops a forward pass at a stage; holds the input of that stage."""


def stage_names(backbone):
    """The names of the stages that a timm model can be cut at: its modules with weights, and their children."""
    modules = {name: module for name, module in backbone.named_modules() if 0 < len(name.split(".")) <= 2 and name}
    containers = (nn.Sequential, nn.ModuleList)
    return [
        name
        for name, module in modules.items()
        if not isinstance(module, (nn.ModuleList, nn.modules.batchnorm._BatchNorm))
        and next(module.parameters(), None) is not None
        and ("." not in name or isinstance(modules[name.partition(".")[0]], containers))
    ]


def multi_stage_features(backbone, stages, image):
    """Normalised pixels, (n, 3, h, w) -> a timm model's features, then the mean outputs of `stages`, concatenated: (n, d_i)."""
    if not stages:
        return backbone(image)
    outputs = []
    with HOOKED:
        hooks = [
            backbone.get_submodule(stage).register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for stage in stages
        ]
        try:
            features = backbone(image)
        finally:
            for hook in hooks:
                hook.remove()
    channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    positions = {4: (1, 2) if channels_last else (2, 3), 3: (1,)}  # dimensions to average: height and width, or tokens
    return torch.cat([features, *(output.mean(dim=positions[output.ndim]) for output in outputs)], dim=1)


def multi_stage_width(encoder):
    """The number of features d_i of an ImageEncoder with feature stages. Raises UserError where a stage has no features."""
    stages, known = encoder.feature_stages, stage_names(encoder.backbone)
    flag = f"--image-feature-stages {','.join(stages)}"
    unknown = sorted(set(stages) - set(known))
    if unknown:
        raise UserError(f"{flag}: no stage {unknown[0]}; there are {', '.join(known)}")
    encoder.eval()  # else BatchNorm would update its statistics
    try:
        with torch.no_grad():
            return multi_stage_features(encoder.backbone, stages, torch.zeros(2, 3, encoder.size, encoder.size)).shape[1]
    except (AttributeError, KeyError):
        raise UserError(f"{flag}: not all give a feature map or tokens to average; there are {', '.join(known)}") from None
    finally:
        encoder.train()


@torch.no_grad()
def run_trunk(encoder, image):
    """(n, 3, h, w) pixels -> activations, (n, ...): the input of the stage at which the ImageEncoder is cut."""

    def stop(module, inputs):
        raise StopForward(inputs[0])

    with HOOKED:
        hook = encoder.backbone.get_submodule(encoder.stage).register_forward_pre_hook(stop)
        try:
            encoder.backbone(encoder.normalize(image))
        except StopForward as stopped:
            return stopped.args[0]
        finally:
            hook.remove()


def run_from_stage(encoder, activations):
    """Activations of `run_trunk`, (n, ...) -> (n, d_i) features, through the rest of the ImageEncoder."""

    def replace(module, inputs):
        grey = inputs[0]  # those of the grey image, in the dtype and the order in memory of a whole forward pass
        order = [0, *sorted(range(1, grey.ndim), key=grey.stride, reverse=True)]
        own = activations.to(grey.dtype).permute(order).contiguous()
        return own.permute([order.index(dim) for dim in range(grey.ndim)]), *inputs[1:]

    # The model runs on one grey image; at the stage its activations are replaced.
    stage = encoder.backbone.get_submodule(encoder.stage)
    with HOOKED:
        hook = stage.register_forward_pre_hook(replace)
        try:
            grey = torch.zeros(1, 3, encoder.size, encoder.size, device=activations.device)
            return multi_stage_features(encoder.backbone, encoder.feature_stages, grey)
        finally:
            hook.remove()


def unfreeze_from(encoder, stage):
    """Cuts an ImageEncoder at a stage and freezes the layers below it.

    Raises UserError for a stage that does not exist, or where later layers need more than the stage's input.
    """
    flag, known = f"--image-unfreeze-from {stage}", ", ".join(stage_names(encoder.backbone))
    if stage not in stage_names(encoder.backbone):
        raise UserError(f"{flag}: no such stage; there are {known}")
    encoder.eval()
    encoder.stage = stage
    image = torch.randint(256, (2, 3, encoder.size, encoder.size), generator=torch.Generator().manual_seed(0))
    image = image.to(encoder.mean.device)
    try:
        activations = run_trunk(encoder, image)
        if activations.shape == image.shape:
            raise UserError(f"{flag}: there are no layers below it; leave the flag out to train all")
        encoder.activation_shape = activations.shape[1:]
        resumed = run_from_stage(encoder, activations)
        matches = torch.allclose(resumed, encoder(image), rtol=1e-3, atol=1e-4)
        matches = matches and activations.ndim > 2  # a vector is already the encoder's output
    except (AttributeError, IndexError, RuntimeError):
        matches = False
    if not matches:
        if encoder.feature_stages:  # those below the cut are not computed again
            flag += f" --image-feature-stages {','.join(encoder.feature_stages)}"
        raise UserError(f"{flag}: this encoder cannot be cut there; there are {known}")
    parameters = list(encoder.backbone.parameters())
    gradients = torch.autograd.grad(resumed.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)
