"""Fast convolutions against the encoders as timm has them."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from timm.models.convmixer import ConvMixer

from encoders import convolution
from encoders.convolution import DepthwiseConvolution, ReLU6InPlace, speed_up

ENCODERS = ["test_resnet", "test_efficientnet", "resnetv2_50", "mobilenetv3_small_050", "tf_efficientnet_lite0", "repvgg_a0"]


def random_tower(name):
    """A timm encoder in float64 whose BatchNorms do something."""
    torch.manual_seed(0)
    encoder = timm.create_model(name, num_classes=0)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return encoder.double()


def outputs_and_gradients(encoder, image):
    encoder.zero_grad()
    torch.manual_seed(1)
    output = encoder(image)
    (output * torch.linspace(-1, 1, output.shape[1])).sum().backward()
    return output.detach(), {
        name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_results_gradients_and_statistics_are_the_encoders_own(name, training):
    plain = random_tower(name)
    fast = copy.deepcopy(plain)
    speed_up(fast.float(), 64)
    fast = copy.deepcopy(fast).double()  # a copy computes with its own weights
    assert fast.state_dict().keys() == plain.state_dict().keys()
    image = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected, expected_gradients = outputs_and_gradients(plain.train(training), image)
    output, gradients = outputs_and_gradients(fast.train(training), image)
    torch.testing.assert_close(output, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7)
    for a, b in zip(fast.buffers(), plain.buffers()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [64, 65, 78])  # TensorFlow pads these differently
@pytest.mark.parametrize("name", [*ENCODERS, "tf_efficientnet_b0"])
def test_without_gradients_results_are_the_encoders_own(name, size):
    plain = random_tower(name).float().eval()
    fast, image = copy.deepcopy(plain), torch.randn(2, 3, size, size)
    speed_up(fast, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), plain(image), rtol=1e-3, atol=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, expected = fast(image).flatten().float(), plain(image).flatten().float()
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.999


def test_a_dilated_convolution_pads_as_it_did():
    plain = random_tower("tf_efficientnet_lite0").float().eval()
    for module in plain.modules():
        if isinstance(module, Conv2dSame):  # these stride, and so have one row more at the bottom than at the top
            module.dilation = (2, 2)
    fast, image = copy.deepcopy(plain), torch.randn(1, 3, 64, 64)
    speed_up(fast, 64)
    with torch.no_grad():
        torch.testing.assert_close(fast(image), plain(image), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_passes_of_activations_are_gone_where_no_gradient_is_wanted(monkeypatch):
    encoder = random_tower("tf_efficientnet_lite0").float().eval()
    speed_up(encoder, 64)
    monkeypatch.setattr(torch.nn.functional, "hardtanh", None)
    monkeypatch.setattr(torch.nn.functional, "relu6", None)
    with torch.no_grad():
        encoder(torch.randn(1, 3, 64, 64))
    with pytest.raises(TypeError):
        encoder(torch.randn(1, 3, 64, 64))


def test_batchnorm_passes_are_gone_where_statistics_stand_still(monkeypatch):
    encoder = random_tower("tf_efficientnet_lite0").float().eval()
    speed_up(encoder, 64)
    monkeypatch.setattr(torch.nn.functional, "batch_norm", None)
    encoder(torch.randn(1, 3, 64, 64))
    with pytest.raises(TypeError):
        encoder.train()(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_gradient_is_that_of_a_convolution(stride, monkeypatch):
    monkeypatch.setattr(convolution, "PART", 2)  # two parts, of two images and of one
    torch.manual_seed(0)
    x = torch.randn(3, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    arguments = ((stride, stride), (2, 2), (1, 1))
    upstream = torch.randn_like(torch.nn.functional.conv2d(x, weight, bias, *arguments, groups=8))
    expected = torch.autograd.grad(
        torch.nn.functional.conv2d(x, weight, bias, *arguments, groups=8), (x, weight, bias), upstream
    )
    found = torch.autograd.grad(DepthwiseConvolution.apply(x, weight, bias, *arguments), (x, weight, bias), upstream)
    for gradient, reference in zip(found, expected):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_relu6_in_place_keeps_its_output_only():
    x, kept = torch.tensor([-1.0, 0, 3, 6, 7], requires_grad=True), []
    hidden = x * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = ReLU6InPlace.apply(hidden)
    assert output.tolist() == [0, 0, 3, 6, 6]
    assert {tensor.data_ptr() for tensor in kept} == {output.data_ptr()} == {hidden.data_ptr()}
    assert torch.autograd.grad(output.sum(), x)[0].tolist() == [0, 0, 1, 0, 0]


def test_in_bf16_the_gradient_is_as_near_to_fp32s_as_the_encoders_own():
    plain = random_tower("tf_efficientnet_lite0").float().eval()
    fast, image = copy.deepcopy(plain), torch.randn(4, 3, 64, 64)
    speed_up(fast, 64)

    def gradient(encoder, dtype):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            _, gradients = outputs_and_gradients(encoder, image)
        return torch.cat([value.flatten() for value in gradients.values()])

    expected = gradient(plain, torch.float32)
    near, nearer = (
        torch.nn.functional.cosine_similarity(gradient(encoder, torch.bfloat16), expected, dim=0).item()
        for encoder in (plain, fast)
    )
    assert nearer > near - 0.01 and nearer > 0.95


def test_a_depthwise_convolution_whose_padding_is_a_word_trains_in_bf16():
    encoder = ConvMixer(8, 1, kernel_size=3, patch_size=4).train()
    speed_up(encoder, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())
