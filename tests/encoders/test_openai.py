"""OpenAI's calls, encoders, weights and vocabulary, against open_clip's and Hugging Face's own modules."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.model import CLIP
from PIL import Image

import clip
from config import OPENAI, PRESETS, Config, resolve_defaults, validate
from encoders.openai import load_openai, text_state
from encoders.tokenizer import openai_tokenizer
from utils.errors import UserError

TEXTS = [
    "a photo of a cat.",
    "It's 2024!! Wow -- a naïve café ☕",
    "  two   spaces, don't you\n",
    "日本語 text",
    "!!!?",
    "",
    "Supercalifragilisticexpialidocious",
]
SMALL = {  # the paper's encoders, and what open_clip calls their sizes
    "vit": (
        {"patch_size": 8, "image_width": 64, "image_layers": 2, "image_heads": 1},
        {"patch_size": 8, "width": 64, "layers": 2, "head_width": 64},
    ),
    "modified_resnet": (
        {"image_width": 8, "image_layers": 2},
        {"patch_size": None, "width": 8, "layers": [2, 2, 2, 2]},
    ),
}


@pytest.fixture
def no_model_loaded(monkeypatch):
    monkeypatch.setattr(clip, "last_tokenizer", None)


def small_pair(kind, path):
    """(ours, open_clip's) small model of a kind, both with the weights of the second, which `path` keeps."""
    torch.manual_seed(0)
    ours, theirs = SMALL[kind]
    config = replace(
        PRESETS["paper"], image_encoder=kind, size=32, projection_dim=48, text_width=64, text_layers=2, text_heads=1
    )
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    reference = CLIP(48, {"image_size": 32, **theirs}, text, quick_gelu=True).eval()
    for batch_norm in (m for m in reference.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        batch_norm.running_mean.normal_(std=0.1)
        batch_norm.weight.data.uniform_(0.5, 1)
        batch_norm.bias.data.normal_(std=0.1)
    torch.save(reference.state_dict(), path)
    model = clip.create_model(replace(config, **ours), []).eval()
    load_openai(model, kind, str(path), full_model=True)
    return model, reference


def normalised(image, model):
    return (image - model.image_encoder.mean) / model.image_encoder.std


@pytest.mark.parametrize("kind", SMALL)
def test_open_clips_weights_give_open_clips_logits(kind, tmp_path, no_model_loaded):
    model, reference = small_pair(kind, tmp_path / "weights.pt")
    image, text = torch.randint(0, 256, (3, 3, 32, 32)), clip.tokenize(TEXTS)
    with torch.no_grad():
        I_e, T_e, scale = reference(normalised(image, model), text)
        per_image, per_text = model(image, text)
    torch.testing.assert_close(per_image, scale * I_e @ T_e.T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(per_text, per_image.T)


def test_hugging_faces_modules_give_our_logits(tmp_path, no_model_loaded):
    model, reference = small_pair("vit", tmp_path / "weights.pt")
    state = reference.state_dict()
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 48,
    }
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=sizes | {"eos_token_id": 49407},
            vision_config=sizes | {"image_size": 32, "patch_size": 8},
            projection_dim=48,
        )
    ).eval()
    text = {f"text_model.{name}": value for name, value in text_state(state).items()}
    layers = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.transformer")}
    vision = {f"vision_model.{name}": value for name, value in text_state(layers).items()}
    vision["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
    vision["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
    vision["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
    for kind in ("weight", "bias"):
        vision[f"vision_model.pre_layrnorm.{kind}"] = state[f"visual.ln_pre.{kind}"]
        vision[f"vision_model.post_layernorm.{kind}"] = state[f"visual.ln_post.{kind}"]
    heads = {"visual_projection.weight": state["visual.proj"].T, "text_projection.weight": state["text_projection"].T}
    theirs.load_state_dict(text | vision | heads | {"logit_scale": state["logit_scale"]})
    image, tokens = torch.randint(0, 256, (3, 3, 32, 32)), clip.tokenize(TEXTS[:3])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=normalised(image, model)).logits_per_image
        torch.testing.assert_close(model(image, tokens)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "parameters"), [("RN50", 102_007_137), ("ViT-B/32", 151_277_313)])
def test_full_size_models_have_openais_number_of_parameters(name, parameters):
    config = replace(PRESETS["paper"], image_encoder=name, size=0)
    model = clip.create_model(resolve_defaults(config), [])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", OPENAI)
def test_the_table_of_openais_sizes_is_open_clips(name):
    theirs = open_clip.get_model_config(name.replace("/", "-").replace("@", "-").removesuffix("px"))
    config = resolve_defaults(replace(PRESETS["openai"], image_encoder=name))
    text = theirs["text_cfg"]
    assert (config.projection_dim, config.max_length) == (theirs["embed_dim"], text["context_length"])
    assert (config.text_width, config.text_layers, config.text_heads) == (text["width"], text["layers"], text["heads"])


def test_weights_of_another_size_and_no_hub_are_named(tmp_path, caplog):
    small_pair("vit", tmp_path / "small.pt")
    for weights, expected in [
        (str(tmp_path / "small.pt"), "small.pt: does not fit OpenAI's ViT-B/32"),
        (str(tmp_path / "nowhere.pt"), "nowhere.pt: no such file"),
        ("pretrained", "OpenAI's weights are neither on this machine"),
    ]:
        with pytest.raises(UserError, match=expected):
            clip.create_model(resolve_defaults(replace(PRESETS["openai"], image_weights=weights)), [])
    assert not caplog.records  # open_clip's own lines on the download
    with pytest.raises(UserError, match="--text-encoder clip"):
        validate(resolve_defaults(Config(text_encoder="clip")))
    with pytest.raises(UserError, match="both random, or neither"):
        validate(resolve_defaults(replace(PRESETS["openai"], image_weights="random")))


def test_tokenize_is_openais_until_a_run_is_loaded(no_model_loaded):
    ours = clip.tokenize(TEXTS)
    assert ours.dtype == torch.int64 and ours.shape == (len(TEXTS), 77)
    assert torch.equal(ours, open_clip.tokenize(TEXTS))
    assert clip.tokenize("one text").shape == (1, 77)
    long = "a very long caption of a photo " * 20
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        clip.tokenize([TEXTS[0], long])
    assert torch.equal(clip.tokenize(long, truncate=True), open_clip.tokenize(long))
    assert torch.equal(clip.tokenize(long, 16, truncate=True), open_clip.tokenize(long, 16))
    with pytest.raises(RuntimeError, match="context length 3"):
        clip.tokenize(TEXTS[0], context_length=3)


def test_an_inner_zero_is_no_padding(tmp_path, no_model_loaded):
    model, reference = small_pair("vit", tmp_path / "weights.pt")
    text = torch.zeros(2, 77, dtype=torch.int64)
    text[0, :5] = torch.tensor([49406, 0, 0, 320, 49407])
    text[1, :3] = torch.tensor([49406, 0, 49407])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(text), reference.encode_text(text), atol=1e-5, rtol=1e-5)


def test_openais_example_runs_with_a_run_folder(run, sample):
    device = "cpu"
    model, preprocess = clip.load(str(run), device=device)
    picture = sorted((sample / "Images").iterdir())[0]
    image = preprocess(Image.open(picture)).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        logits_per_image, logits_per_text = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert image_features.shape == (1, 256) and text_features.shape == (3, 256)
    assert logits_per_image.shape == (1, 3) and torch.equal(logits_per_text, logits_per_image.T)
    assert np.isclose(probs.sum(), 1)
    cosine = torch.nn.functional.cosine_similarity(image_features, text_features)
    torch.testing.assert_close(logits_per_image[0], model.logit_scale.exp() * cosine)


def test_a_loaded_runs_texts_are_in_its_own_vocabulary_and_as_long_as_its_tower(run):
    model, _ = clip.load(str(run), device="cpu")
    text = clip.tokenize("a red circle")
    assert text.shape == (1, 77)
    assert model.tokenizer.decode(text[0].tolist()) == "a red circle"
    with torch.no_grad():
        short = model.encode_text(clip.tokenize("a red circle", context_length=12))
        torch.testing.assert_close(model.encode_text(text), short)
    long = "red " * 70  # below 77, but the encoder takes 64
    with pytest.raises(RuntimeError, match="context length 64"):
        clip.tokenize(long)
    assert model.encode_text(clip.tokenize(long, truncate=True)).isfinite().all()


def test_available_models_are_run_folders_and_openais(run, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    (tmp_path / "runs" / "unfinished").mkdir()
    monkeypatch.chdir(tmp_path)
    assert clip.available_models() == ["runs/mine", *OPENAI]
    with pytest.raises(UserError, match=r"ViT-B/33: .*runs/mine, RN50, .*ViT-L/14@336px"):
        clip.load("ViT-B/33")


def test_text_that_openai_would_cut_keeps_its_end():
    tokenizer = openai_tokenizer(8)
    ids = tokenizer.encode("a very long caption of a photo " * 3).ids
    assert len(ids) == 8 and ids[-1] == 49407
