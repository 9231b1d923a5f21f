"""Convolutions as fast as the processor computes them, with the results and the parameter names of the tower they stand in.

Three things hold a convolutional tower back on a CPU. A BatchNorm whose statistics stand still is only a scale and a shift
for each channel, yet passes over all activations take as long as the convolutions themselves. oneDNN's gradient of a depthwise
convolution is up to a hundred times slower in bf16 than in fp32 when it strides. And torch's bf16 activations in place take
more than twice the time of those into new memory on Intel's processors with AMX, once the arrays are larger than a cache.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, pad_same
from torch import nn


class DepthwiseConvolution(torch.autograd.Function):
    """F.conv2d of the CPU whose gradient is computed in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.arguments = (stride, padding, dilation)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wanted = [*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]]
        gradients = torch.ops.aten.convolution_backward(
            gradient.float(), x.float(), weight.float(), [len(weight)], *ctx.arguments, False, [0, 0], len(weight), wanted
        )
        return *(None if g is None else g.to(x.dtype) for g in gradients), None, None, None


def convolve(conv, batch_norm, x):
    """What `conv` computes; where its BatchNorm has fixed statistics, with that taken in: (x * w) s + b = x * (w s) + b."""
    weight, bias = conv.weight, conv.bias
    if batch_norm is not None and not batch_norm.training:
        scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()  # (channels,)
        shift = -batch_norm.running_mean if bias is None else bias - batch_norm.running_mean
        weight, bias = weight * scale.view(-1, 1, 1, 1), shift * scale + batch_norm.bias
    padding = conv.padding
    if isinstance(conv, Conv2dSame):
        x, padding = pad_same(x, conv.kernel_size, conv.stride, conv.dilation), (0, 0)
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    if depthwise and x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu")
        bias = None if bias is None else bias.to(dtype)
        return DepthwiseConvolution.apply(x.to(dtype), weight.to(dtype), bias, conv.stride, padding, conv.dilation)
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def normalise(batch_norm, x):
    """What is left for a BatchNorm once `convolve` has taken it in: nothing, or timm's activation behind it."""
    if batch_norm.training:
        return type(batch_norm).forward(batch_norm, x)
    return batch_norm.act(batch_norm.drop(x)) if isinstance(batch_norm, BatchNormAct2d) else x


def activate(activation, x):
    """What an activation computes, in place only where gradients keep what goes in or comes out in memory."""
    activation.inplace = torch.is_grad_enabled()
    return type(activation).forward(activation, x)


@torch.no_grad()
def speed_up(tower, size):
    """Makes the convolutions of a timm tower fast, in place. size: height and width of its input in pixels.

    Which BatchNorm takes which convolution's output is seen in one forward pass. Only a pair under one parent counts, as
    the output of another convolution may also go elsewhere (a shortcut), where it must not be normalised.
    """
    made, pairs = {}, {}

    def look(name, module, inputs, output):
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (name, module, output)  # holding the output keeps its id from being given away
        elif id(inputs[0]) in made:
            conv_name, conv, _ = made[id(inputs[0])]
            if name.rpartition(".")[0] == conv_name.rpartition(".")[0] and module.affine and module.track_running_stats:
                pairs[conv] = module

    kinds = (nn.Conv2d, Conv2dSame, nn.BatchNorm2d, BatchNormAct2d)  # not their subclasses, which may compute anything
    hooks = [m.register_forward_hook(partial(look, name)) for name, m in tower.named_modules() if type(m) in kinds]
    training = tower.training
    tower.eval()(torch.zeros(1, 3, size, size))
    tower.train(training)
    for hook in hooks:
        hook.remove()
    for _, conv, _ in made.values():
        if conv.padding_mode == "zeros":
            batch_norm = pairs.get(conv)
            conv.forward = partial(convolve, conv, batch_norm)
            if batch_norm is not None:
                batch_norm.forward = partial(normalise, batch_norm)
    for module in tower.modules():
        if getattr(module, "inplace", False):
            module.forward = partial(activate, module)
