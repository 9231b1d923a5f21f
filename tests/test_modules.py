"""Encoders: pixels, pooling, weights, tokenizers."""

import json

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.layers import DropPath

from config import Config
from encoders.build import load_pretrained, random_text_config
from encoders.stages import run_from_stage, run_trunk, unfreeze_from
from encoders.tokenizer import pretrained_tokenizer, tokenize, train_tokenizer
from modules import BUCKET, ImageEncoder, ProjectionHead, TextEncoder
from utils.cache import model_key
from utils.errors import UserError

CAPTIONS = ["a red circle is left of a blue square", "two dogs run over the grass", "a dog jumps"]


def text_encoder(model_type, pooling="auto", layers=1):
    torch.manual_seed(0)
    config = random_text_config(model_type, width=32, layers=2, heads=4, vocab_size=60, max_length=16)
    return TextEncoder(transformers.AutoModel.from_config(config), pooling, layers).eval()


def test_pixels_are_normalised_as_timm_says():
    torch.manual_seed(0)
    encoder = ImageEncoder("tf_efficientnet_lite0").eval()
    data = timm.data.resolve_model_data_config(encoder.backbone)
    assert data["mean"] == (0.5, 0.5, 0.5) and encoder.size == 224  # not ImageNet's mean
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    expected = encoder.backbone((image / 255 - 0.5) / 0.5)
    torch.testing.assert_close(encoder(image), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_any_timm_encoder_gives_features_of_its_width_at_another_size(name):
    encoder = ImageEncoder(name, size=96).eval()
    assert encoder(torch.zeros(2, 3, 96, 96)).shape == (2, encoder.width)


@pytest.mark.parametrize(
    ("name", "stages", "indices"), [("test_resnet", "layer2 layer3", [2, 3]), ("test_vit", "blocks.1", [1])]
)
def test_stages_add_their_means_to_the_features(name, stages, indices):
    torch.manual_seed(0)
    encoder = ImageEncoder(name, size=96, feature_stages=tuple(stages.split())).eval()
    image = torch.randint(256, (3, 3, 96, 96), dtype=torch.uint8)
    options = {"output_fmt": "NLC", "return_prefix_tokens": True} if name == "test_vit" else {}
    pixels = (image - encoder.mean) / encoder.std
    last, outputs = encoder.backbone.forward_intermediates(pixels, indices=indices, **options)
    outputs = [torch.cat(output, 1).mT if options else output.flatten(2) for output in outputs]  # (n, channels, places)
    expected = torch.cat([encoder.backbone.forward_head(last), *(output.mean(2) for output in outputs)], 1)
    assert encoder.width == expected.shape[1] > encoder.backbone.num_features
    torch.testing.assert_close(encoder(image), expected, atol=1e-5, rtol=1e-5)
    unfreeze_from(encoder, stages.split()[0])
    torch.testing.assert_close(run_from_stage(encoder, run_trunk(encoder, image)), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="no stage layer9; there are .*" + stages.split()[0]):
        ImageEncoder(name, size=96, feature_stages=("layer9",))


@pytest.mark.parametrize("name", ["test_vit", "vit", "mixer"])
def test_stochastic_depth_skips_its_share_of_the_last_layer_s_branches(name):
    sizes = (8, 32, 4, 4) if not name.startswith("test") else None
    encoder = ImageEncoder(name, size=64, sizes=sizes, drop_path=0.4)
    *_, branch = [module for module in encoder.backbone.modules() if isinstance(module, DropPath)]
    seen = []
    branch.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].clone(), output.clone())))
    torch.manual_seed(0)
    image = torch.randint(256, (500, 3, 64, 64))
    encoder(image)
    given, left = seen[-1]
    skipped = (left == 0).flatten(1).all(1)
    assert 0.33 < skipped.float().mean() < 0.47  # three standard deviations
    torch.testing.assert_close(left[~skipped], given[~skipped] / 0.6)
    plain = ImageEncoder(name, size=64, sizes=sizes).eval()
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder.eval()(image[:4]), plain(image[:4]))


def test_stochastic_depth_of_a_encoder_without_residual_branches_is_refused():
    with pytest.raises(UserError, match="--image-drop-path 0.1: vgg11 cannot skip its layers"):
        ImageEncoder("vgg11", drop_path=0.1)


def test_feature_stages_that_give_no_map_or_lie_below_the_cut_are_refused():
    with pytest.raises(UserError, match="--image-feature-stages stages.1,head: not all give a feature map"):
        ImageEncoder("test_convnext", size=96, feature_stages=("stages.1", "head"))
    with pytest.raises(UserError, match="--image-unfreeze-from layer3 --image-feature-stages layer1: .* cannot be cut there"):
        unfreeze_from(ImageEncoder("test_resnet", size=64, feature_stages=("layer1",)), "layer3")


@pytest.mark.parametrize("model_type", ["distilbert", "gpt2", "mixer"])
def test_the_last_layers_of_a_text_encoder_stand_side_by_side(model_type):
    encoder, one = text_encoder(model_type, "mean", layers=2), text_encoder(model_type, "mean")
    input_ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = (input_ids > 0).long()
    before_last = encoder.backbone(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    by_hand = torch.stack([before_last[0].mean(0), before_last[1, :2].mean(0)])
    assert encoder.width == 64
    torch.testing.assert_close(encoder(input_ids, mask), torch.cat([one(input_ids, mask), by_hand], 1))
    with pytest.raises(UserError, match="--text-feature-layers 3: this encoder has 2"):
        text_encoder(model_type, layers=3)


@pytest.mark.parametrize("kind", ["vit", "mixer", "modified_resnet"])
def test_sized_encoders_have_the_size_asked_for(kind):
    encoder = ImageEncoder(kind, size=32, sizes=(8, 32, 2, 2)).eval()
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.width)
    assert encoder.width == (32 * 32 if kind == "modified_resnet" else 32)
    assert encoder.attention_pool == (kind == "modified_resnet")
    blocks = [name for name, _ in encoder.named_modules() if name.count(".") == (3 if kind == "modified_resnet" else 2)]
    expected = {"vit": "backbone.blocks.1", "mixer": "backbone.blocks.1", "modified_resnet": "backbone.stages.3.1"}[kind]
    assert expected in blocks and expected[:-1] + "2" not in blocks
    if kind != "modified_resnet":
        with pytest.raises(UserError, match="--patch-size 7: does not divide --size 32"):
            ImageEncoder(kind, size=32, sizes=(7, 32, 2, 2))
    else:
        with pytest.raises(UserError, match="--size 80: .* multiples of 32"):
            ImageEncoder(kind, size=80, sizes=(8, 32, 2, 2))
    with pytest.raises(UserError, match="--image-weights random"):
        ImageEncoder(kind, "pretrained", 32, (8, 32, 2, 2))


def test_a_local_weight_file_gives_timms_features(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_resnet").eval()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    image = torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8)
    for file in ("weights.safetensors", "weights.pth"):
        encoder = ImageEncoder("test_resnet", str(tmp_path / file)).eval()
        expected = source.forward_head(source.forward_features((image - encoder.mean) / encoder.std), pre_logits=True)
        torch.testing.assert_close(encoder(image), expected)


def test_unfit_weight_files_and_unknown_names_are_named(tmp_path):
    safetensors.torch.save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name, weights, expected in [
        ("test_resnet", tmp_path / "vit.safetensors", "does not fit test_resnet"),
        ("test_resnet", tmp_path / "text.safetensors", "cannot be read"),
        ("test_resnet", tmp_path / "nowhere.pth", "no such file"),
        ("resnet5000", "random", "timm has no such model"),
        ("resnet50", "pretrained", "--image-weights"),
    ]:
        with pytest.raises(UserError, match=expected):
            ImageEncoder(name, str(weights))


@pytest.mark.parametrize(
    ("model_type", "pooling"), [("distilbert", "mean"), ("bert", "mean"), ("mixer", "mean"), ("gpt2", "last"), ("clip", "last")]
)
def test_auto_pooling_fits_the_tower(model_type, pooling):
    assert text_encoder(model_type).pooling == pooling


@pytest.mark.parametrize("model_type", ["distilbert", "gpt2", "clip", "mixer"])
@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_padding_does_not_leak_into_features(model_type, pooling):
    encoder = text_encoder(model_type, pooling)
    ids = torch.tensor([[5, 6, 7]])
    padded, mask = torch.tensor([[5, 6, 7, 9, 9]]), torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(encoder(ids, torch.ones_like(ids)), encoder(padded, mask), atol=1e-5, rtol=1e-5)


def test_pooling_by_hand():
    hidden = text_encoder("distilbert").backbone(torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    for pooling, expected in {"first": hidden[0], "last": hidden[2], "mean": hidden.mean(0)}.items():
        features = text_encoder("distilbert", pooling)(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]]))
        torch.testing.assert_close(features[0], expected, atol=1e-5, rtol=1e-5)


def test_a_text_mixer_is_the_mixer_of_the_whole_context_by_hand():
    encoder = text_encoder("mixer")
    mixer, layer = encoder.backbone, encoder.backbone.layers[0]
    torch.nn.init.normal_(layer.token_in.bias)
    torch.nn.init.normal_(layer.token_out.bias)
    input_ids = torch.tensor([[5, 6, 7]])
    x = torch.randn(16, 32)  # what stands behind the third token must not matter
    x[:3] = mixer.token_embedding(input_ids)[0]
    real = torch.zeros(16, 1)
    real[:3] = 1
    for layer in mixer.layers:
        y = layer.token_norm(x) * real
        x = x + layer.token_out(F.gelu(layer.token_in(y.T))).T
        x = x + layer.channel_out(F.gelu(layer.channel_in(layer.channel_norm(x))))
    torch.testing.assert_close(encoder(input_ids, torch.ones_like(input_ids))[0], mixer.norm(x)[:3].mean(0))


def test_a_bag_of_words_is_the_mean_of_the_embeddings_in_any_order():
    encoder = text_encoder("cbow")
    assert encoder.pooling == "mean"
    mask = torch.tensor([[1, 1, 1, 0]])
    one, other = (encoder(torch.tensor([ids]), mask)[0] for ids in ([5, 6, 7, 9], [7, 5, 6, 0]))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(one, encoder.backbone.token_embedding.weight[[5, 6, 7]].mean(0))
    assert (one - encoder(torch.tensor([[5, 6, 8, 9]]), mask)[0]).abs().max() > 1e-3
    with pytest.raises(UserError, match="--text-feature-layers 2: this encoder has 1"):
        TextEncoder(encoder.backbone, layers=2)


def test_without_a_head_the_features_are_the_embedding():
    features = torch.randn(3, 6)
    assert torch.equal(ProjectionHead(6, 6, layers=0)(features), features)
    with pytest.raises(UserError, match="--projection-dim must be 6"):
        ProjectionHead(6, 4, layers=0)


def test_a_text_mixer_knows_where_a_token_stands():
    encoder = text_encoder("mixer")
    mask = torch.ones(1, 3, dtype=torch.int64)
    one, other = (encoder(torch.tensor([ids]), mask) for ids in ([5, 6, 7], [7, 6, 5]))
    assert (one - other).abs().max() > 1e-3


def test_a_causal_encoder_pooled_at_its_first_token_sees_one_word():
    a, b = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 8, 9]])
    mask = torch.ones_like(a)
    first, last = text_encoder("gpt2", "first"), text_encoder("gpt2")
    torch.testing.assert_close(first(a, mask), first(b, mask))
    assert (last(a, mask) - last(b, mask)).abs().max() > 0.1


def test_vocabulary_from_captions_is_the_same_again_and_cuts_long_texts():
    first, *others = (train_tokenizer(CAPTIONS, vocab_size=200, max_length=6) for _ in range(6))
    assert all(first.to_str() == other.to_str() for other in others)
    input_ids, mask = tokenize(first, ["A dog jumps", "two dogs run over the grass"])
    assert input_ids.shape == mask.shape == (2, 6)
    assert mask.sum(1).tolist() == [5, 6]
    assert first.decode(input_ids[0].tolist()) == "a dog jumps"


def test_a_pretrained_folder_loads_with_its_tokenizer(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=80, max_length=16)
    whole = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    whole.save_pretrained(tmp_path)
    config = random_text_config("distilbert", 32, 1, 4, tokenizer.get_vocab_size(), 16)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    loaded = pretrained_tokenizer(str(tmp_path), max_length=16)
    assert tokenize(loaded, CAPTIONS)[0].tolist() == tokenize(tokenizer, CAPTIONS)[0].tolist()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match="without a tokenizer"):
        pretrained_tokenizer(str(tmp_path), max_length=16)


def test_text_encoders_that_are_not_available_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.*local folder"):
        pretrained_tokenizer("nowhere/at-all", max_length=16)
    with pytest.raises(UserError, match="clip, mixer, cbow, distilbert, bert, gpt2"):
        text_encoder("no-such-type")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    with pytest.raises(UserError, match="--text-encoder"):
        load_pretrained(transformers.AutoModel, str(tmp_path))


@pytest.mark.parametrize(
    "name, stage", [("test_resnet", "layer3"), ("test_vit", "blocks.3"), ("test_efficientnet", "blocks.2")]
)
def test_a_encoder_goes_on_from_what_its_trunk_gave(name, stage):
    torch.manual_seed(0)
    encoder = ImageEncoder(name, size=64)
    unfreeze_from(encoder, stage)
    image = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    whole = encoder.eval()(image)
    activations = run_trunk(encoder, image)
    torch.testing.assert_close(run_from_stage(encoder, activations), whole, atol=1e-5, rtol=1e-5)
    run_from_stage(encoder, activations).sum().backward()
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    with_gradient = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert trained == with_gradient and f"backbone.{stage}" in {name[: len(f"backbone.{stage}")] for name in trained}
    below = [name for name, _ in encoder.named_parameters() if name not in trained]
    assert below and all(stage not in name for name in below)


def test_a_encoder_with_a_stage_that_more_than_its_input_leads_to_is_refused():
    class Skips(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (torch.nn.Conv2d(3, 3, 3, padding=1, stride=s) for s in (2, 1))

        def forward(self, x):
            x = self.first(x)
            return (x + self.second(x)).mean(dim=(2, 3))

    encoder = ImageEncoder("test_resnet", size=64)
    encoder.backbone = Skips()
    with pytest.raises(UserError, match="cannot be cut there"):
        unfreeze_from(encoder, "second")


def test_a_stage_behind_the_pooling_is_refused():
    encoder = ImageEncoder("test_resnet", size=64)
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    encoder.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), pool, torch.nn.Linear(8, 8))
    with pytest.raises(UserError, match="cannot be cut there"):
        unfreeze_from(encoder, "2")  # it takes vectors, which the model would take for features


def test_captions_in_buckets_give_the_same_features():
    encoder = text_encoder("distilbert")
    lengths = torch.randint(1, 16, (3 * BUCKET + 5,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < lengths[:, None]).long()
    input_ids = torch.randint(1, 60, mask.shape) * mask
    torch.testing.assert_close(encoder(input_ids, mask), encoder.pooled(input_ids, mask), atol=1e-5, rtol=1e-5)


def test_a_feature_that_hardly_varies_is_not_blown_up():
    head = ProjectionHead(3, 2)
    features = torch.tensor([[1.0, 5.0, -2.0], [3.0, 5.0, 2.0]])
    head.standardize(features)
    assert head.mean.tolist() == [2.0, 5.0, 0.0]
    deviations = [2**0.5, 0.0, 8**0.5]
    assert head.std.tolist() == pytest.approx([deviations[0], sum(deviations) / 30, deviations[2]])


def test_defaults_are_the_families_own():
    config = Config()
    assert (config.image_encoder, config.text_encoder) == ("resnet50", "distilbert-base-uncased")
    encoder = random_text_config("distilbert", config.text_width, config.text_layers, config.text_heads, 30522, 512)
    assert encoder.to_dict() == transformers.DistilBertConfig().to_dict()


def test_a_encoder_that_normalises_otherwise_has_another_cache_key():
    encoder = ImageEncoder("test_resnet")
    before = model_key(encoder)
    encoder.mean += 1
    assert model_key(encoder) != before


def test_a_pretrained_encoder_keeps_its_batchnorm_statistics(tmp_path):
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    for weights, moves in ((str(tmp_path / "weights.safetensors"), False), ("random", True)):
        encoder = ImageEncoder("test_resnet", weights).train()
        before = {name: value.clone() for name, value in encoder.named_buffers()}
        encoder(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
        assert moves == any(not torch.equal(value, before[name]) for name, value in encoder.named_buffers())
