"""Convolutions as fast as the processor computes them, with the results and the parameter names of the tower they stand in.

Memory, not arithmetic, holds a convolutional tower back on a CPU: a pass over all activations takes as long as a convolution.
A BatchNorm whose statistics stand still needs none, being only a scale and a shift for each channel; nor does TensorFlow's
padding, which can be a part of the kernel; and where no gradient is wanted oneDNN applies the activation as it convolves. Where
one is wanted, oneDNN's gradient of a depthwise convolution is up to a hundred times slower in bf16 than in fp32 if it strides.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding, pad_same
from torch import nn

FUSED = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0]), nn.SiLU: ("swish", [])}  # oneDNN's names and bounds


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


def same_padding(conv, weight, shape):
    """(weight, padding) that give a `Conv2dSame` of a (height, width) what `pad_same` gives, without padding the input.

    TensorFlow pads one row less at the top than at the bottom where their number is odd. With as many at the top a kernel
    with a row of zeros on top computes the same; so for columns.
    """
    rows, columns = map(get_same_padding, shape, conv.kernel_size, conv.stride, conv.dilation)
    return F.pad(weight, (columns % 2, 0, rows % 2, 0)), ((rows + 1) // 2, (columns + 1) // 2)


def convolve(conv, batch_norm, x):
    """What `conv` computes; where its BatchNorm has fixed statistics, with that taken in: (x * w) s + b = x * (w s) + b.

    What timm has as an activation behind such a BatchNorm is then taken in, too.
    """
    weight, bias, padding, activation = conv.weight, conv.bias, conv.padding, None
    if batch_norm is not None and not batch_norm.training:
        scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()  # (channels,)
        shift = -batch_norm.running_mean if bias is None else bias - batch_norm.running_mean
        weight, bias = weight * scale.view(-1, 1, 1, 1), shift * scale + batch_norm.bias
        activation = getattr(batch_norm, "act", None)
    at_once = x.device.type == "cpu" and not torch.compiler.is_compiling()  # a graph may be run elsewhere, as ONNX is
    if isinstance(conv, Conv2dSame) and at_once and conv.dilation == (1, 1):
        weight, padding = same_padding(conv, weight, x.shape[-2:])
    elif isinstance(conv, Conv2dSame):
        x, padding = pad_same(x, conv.kernel_size, conv.stride, conv.dilation), (0, 0)
    arguments = conv.stride, padding, conv.dilation
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if autocast and torch.is_grad_enabled() and conv.groups == conv.in_channels == conv.out_channels:
        bias = None if bias is None else bias.to(dtype)
        x = DepthwiseConvolution.apply(x.to(dtype), weight.to(dtype), bias, *arguments)
    elif at_once and not torch.is_grad_enabled() and type(activation) in FUSED and has_onednn(dtype):
        x, weight, bias = (value.to(dtype) for value in (x, weight, bias))
        stride, padding, dilation = map(list, arguments)
        fused = torch.ops.mkldnn._convolution_pointwise  # what torch.compile makes of a convolution and an activation
        return fused(x, weight, bias, padding, stride, dilation, conv.groups, *FUSED[type(activation)], "")
    else:
        x = F.conv2d(x, weight, bias, *arguments, conv.groups)
    return x if activation is None else activation(x)


def has_onednn(dtype):
    """Whether torch has oneDNN here, and that computes in dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def normalise(batch_norm, x):
    """What is left for a BatchNorm once `convolve` has taken it in: nothing."""
    return type(batch_norm).forward(batch_norm, x) if batch_norm.training else x


def activate(activation, x):
    """What an activation computes, in place only where gradients keep what goes in or comes out in memory.

    On Intel's processors with AMX torch's bf16 operations in place take more than twice the time of those into new memory, once
    the arrays are larger than a cache.
    """
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
