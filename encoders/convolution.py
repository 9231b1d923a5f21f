"""Faster convolutions on a CPU, with the same results and parameter names.

On a CPU a convolutional encoder is limited by memory bandwidth: a pass over all activations takes as long as a convolution.
Three such passes are avoided. A BatchNorm with frozen statistics is a scale and a shift per channel, so it is folded into the
convolution's weights. TensorFlow's padding becomes part of the kernel. Without gradients, oneDNN fuses the activation function
with the convolution.

Besides, oneDNN's gradient of a depthwise convolution is slow in bf16, with a stride up to a hundred times slower than in fp32.
So it is computed in fp32. The gradient of its bias takes longer than that of its input, so torch sums it.
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, get_same_padding, pad_same
from torch import nn

PART = 64  # images whose gradient is computed at once, as their copies in fp32 take much memory
FUSED = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0]), nn.SiLU: ("swish", [])}  # oneDNN's names and arguments


class DepthwiseConvolution(torch.autograd.Function):
    """A depthwise F.conv2d on the CPU whose gradient is computed in fp32."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.arguments = (stride, padding, dilation)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups=len(weight))

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        mask, parts = [*ctx.needs_input_grad[:2], False], []
        for g, part in zip(gradient.split(PART), x.split(PART)):
            arguments = g.float(), part.float(), weight.float(), None, *ctx.arguments, False, [0, 0], len(weight), mask
            of_part, of_weight, _ = torch.ops.aten.convolution_backward(*arguments)
            parts.append((of_part if of_part is None else of_part.to(x.dtype), of_weight))
        of_parts, of_weights = zip(*parts)
        of_x = torch.cat(of_parts) if mask[0] else None
        of_weight = sum(of_weights).to(x.dtype) if mask[1] else None
        of_bias = gradient.sum(dim=(0, 2, 3)) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None, None


class ReLU6InPlace(torch.autograd.Function):
    """nn.ReLU6(inplace=True), whose gradient needs only its output. torch keeps a copy of its input for that."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        ctx.save_for_backward(F.relu6(x, inplace=True))
        return x

    @staticmethod
    def backward(ctx, gradient):
        (output,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, output, 0.0, 6.0)


def same_padding(conv, weight, shape):
    """(weight, padding) with which a `Conv2dSame` needs no separate padding of its input. shape: (height, width) of the input.

    Where the number of padding rows is odd, TensorFlow pads one more at the bottom than at the top. Padding both sides with
    the larger number and adding a row of zeros at the top of the kernel gives the same result. The same holds for columns.
    """
    rows, columns = map(get_same_padding, shape, conv.kernel_size, conv.stride, conv.dilation)
    return F.pad(weight, (columns % 2, 0, rows % 2, 0)), ((rows + 1) // 2, (columns + 1) // 2)


def convolve(conv, batch_norm, x):
    """The output of `conv`, with its BatchNorm folded in where that is in eval mode: (x * w) s + b = x * (w s) + b.

    An activation function that timm keeps inside the BatchNorm is then applied, too.
    """
    weight, bias, padding, activation = conv.weight, conv.bias, conv.padding, None
    if batch_norm is not None and not batch_norm.training:
        scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()  # (channels,)
        shift = -batch_norm.running_mean if bias is None else bias - batch_norm.running_mean
        weight, bias = weight * scale.view(-1, 1, 1, 1), shift * scale + batch_norm.bias
        activation = getattr(batch_norm, "act", None)
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()  # an exported graph may run on another device
    if isinstance(conv, Conv2dSame) and on_cpu and conv.dilation == (1, 1):
        weight, padding = same_padding(conv, weight, x.shape[-2:])
    elif isinstance(conv, Conv2dSame):
        x, padding = pad_same(x, conv.kernel_size, conv.stride, conv.dilation), (0, 0)
    arguments = conv.stride, padding, conv.dilation
    autocast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    # A padding such as "same", a word, is left to torch.
    depthwise = conv.groups == conv.in_channels == conv.out_channels and not isinstance(padding, str)
    if autocast and torch.is_grad_enabled() and depthwise:
        bias = None if bias is None else bias.to(dtype)
        x = DepthwiseConvolution.apply(x.to(dtype), weight.to(dtype), bias, *arguments)
    elif on_cpu and not torch.is_grad_enabled() and type(activation) in FUSED and has_onednn(dtype):
        x, weight, bias = (value.to(dtype) for value in (x, weight, bias))
        stride, padding, dilation = map(list, arguments)
        fused = torch.ops.mkldnn._convolution_pointwise  # what torch.compile uses for a convolution and an activation
        return fused(x, weight, bias, padding, stride, dilation, conv.groups, *FUSED[type(activation)], "")
    else:
        x = F.conv2d(x, weight, bias, *arguments, conv.groups)
    return x if activation is None else activation(x)


def has_onednn(dtype):
    """Whether oneDNN is available and supports dtype."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def skip_batch_norm(batch_norm, x):
    """The forward pass of a BatchNorm that `convolve` folds in: the identity in eval mode."""
    return type(batch_norm).forward(batch_norm, x) if batch_norm.training else x


def activate(activation, x):
    """The forward pass of an activation function; in place only with gradients, to save memory.

    On Intel's processors with AMX, torch's in-place bf16 operations take more than twice the time of others once the arrays
    are larger than the processor's cache.
    """
    activation.inplace = torch.is_grad_enabled()
    if activation.inplace and type(activation) is nn.ReLU6 and not torch.compiler.is_compiling():
        return ReLU6InPlace.apply(x)
    return type(activation).forward(activation, x)


@torch.no_grad()
def speed_up(encoder, size):
    """Replaces the forward passes of a timm model's convolutions, in place. size: height and width of its input in pixels.

    One forward pass shows which BatchNorm follows which convolution. Both must have the same parent module: the output of
    any other convolution may also go elsewhere (a shortcut), where it must not be normalised.
    """
    conv_outputs, pairs = {}, {}

    def record(name, module, inputs, output):
        if isinstance(module, nn.Conv2d):
            conv_outputs[id(output)] = (name, module, output)  # holding the output keeps its id unique
        elif id(inputs[0]) in conv_outputs:
            conv_name, conv, _ = conv_outputs[id(inputs[0])]
            if name.rpartition(".")[0] == conv_name.rpartition(".")[0] and module.affine and module.track_running_stats:
                pairs[conv] = module

    kinds = (nn.Conv2d, Conv2dSame, nn.BatchNorm2d, BatchNormAct2d)  # not their subclasses, which may compute something else
    hooks = [m.register_forward_hook(partial(record, name)) for name, m in encoder.named_modules() if type(m) in kinds]
    training = encoder.training
    encoder.eval()(torch.zeros(1, 3, size, size))
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    for _, conv, _ in conv_outputs.values():
        if conv.padding_mode == "zeros":
            batch_norm = pairs.get(conv)
            conv.forward = partial(convolve, conv, batch_norm)
            if batch_norm is not None:
                batch_norm.forward = partial(skip_batch_norm, batch_norm)
    for module in encoder.modules():
        if getattr(module, "inplace", False):
            module.forward = partial(activate, module)
