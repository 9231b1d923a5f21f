"""open_clip's models under their names, and OpenAI's calls, against open_clip's own modules, tokenizers and preprocessing."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import transformers
from conftest import run_script
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

import clip
import inference
import main
from captions import load_captions
from config import OPENAI, PRESETS, SUGGESTED, load_run, parse_config, resolve_defaults, validate
from embedding import file_features, text_features, token_ids
from encoders.openclip import build_open_clip, split_name
from encoders.tokenizer import openai_tokenizer, train_tokenizer
from search.export import export_onnx
from search.options import read_search
from training.adapters import add_adapters, merged
from utils.cache import model_key
from utils.errors import UserError
from utils.images import center_crop, read_image, resize_image

TEXTS = [
    "a photo of a cat.",
    "It's 2024!! Wow -- a naïve café ☕",
    "  two   spaces, don't you\n",
    "日本語 text",
    "!!!?",
    "",
    "Supercalifragilisticexpialidocious",
]
SHORT = ["A red_circle, left of a star!", "two rings"]
CAPTIONS = ["A red_circle, left of a star!", "Tom &amp; Jerry   run", "caf\u00e9", "a " * 90]
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}


def timm(name, **options):
    return {"image_size": 32, "timm_model_name": name, "timm_model_pretrained": False} | options


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """{family: a checkpoint} of a small model of each of open_clip's families, which it then knows as small-FAMILY.

    Vocabulary and configuration of those that would come from a model hub are made here.
    """
    folder = tmp_path_factory.mktemp("open_clip")
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    tokenizer = train_tokenizer(CAPTIONS * 3, 200, 64)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "words")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    roberta = transformers.RobertaConfig(vocab_size=200, max_position_embeddings=90, pad_token_id=0, **sizes)
    roberta.save_pretrained(folder / "roberta")
    words = {"vocab_size": 200, "hf_tokenizer_name": str(folder / "words")}
    siglip = TEXT | words | {"context_length": 64, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    coca = {"embed_cls": True, "output_tokens": True, "context_length": 76}
    decoder = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    hugging_face = words | {"hf_model_name": str(folder / "roberta"), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    configurations = {
        "clip": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
        "resnet": {"vision_cfg": VIT | {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None}, "text_cfg": TEXT},
        "siglip": {
            "vision_cfg": timm("test_vit", timm_pool="map", timm_proj="none"),
            "text_cfg": siglip | {"width": 64, "tokenizer_kwargs": {"clean": "canonicalize"}},
            "init_logit_bias": -10,
            "custom_text": True,
            "embed_dim": 64,
        },
        "coca": {
            "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "text_cfg": TEXT | coca,
            "multimodal_cfg": decoder,
            "custom_text": True,
        },
        "hugging-face": {"vision_cfg": VIT, "text_cfg": hugging_face},
        "timm": {"vision_cfg": timm("test_resnet", timm_pool="", timm_proj="linear"), "text_cfg": TEXT},
        "mobile": {
            "vision_cfg": timm("fastvit_t8", timm_pool="avg", timm_proj=None),
            "text_cfg": TEXT | {"no_causal_mask": True},
            "custom_text": True,
        },
        "clipa": {
            "vision_cfg": VIT,
            "text_cfg": siglip | {"context_length": 32, "proj_bias": False, "tokenizer_kwargs": {"strip_sep_token": True}},
        },
    }
    checkpoints = {}
    for family, configuration in configurations.items():
        (folder / f"small-{family}.json").write_text(json.dumps({"embed_dim": 48} | configuration))
    open_clip.add_model_config(folder)
    for family in configurations:
        checkpoints[family] = folder / f"{family}.pt"
        torch.save(open_clips(family).state_dict(), checkpoints[family])
    return checkpoints


def open_clips(family):
    """open_clip's own small model of a family, with weights and statistics that make every part of it matter."""
    torch.manual_seed(0)
    model = open_clip.create_model(f"small-{family}", pretrained_text=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.02 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def name_of(families, family):
    return f"open_clip:small-{family}@{families[family]}"


@pytest.fixture
def no_model_loaded(monkeypatch):
    monkeypatch.setattr(clip, "last_tokenizer", None)


FAMILIES = ["clip", "resnet", "siglip", "coca", "hugging-face", "timm", "mobile", "clipa"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_open_clips_embeddings_and_tokens(family, families, sample, no_model_loaded):
    model, preprocess = clip.load(name_of(families, family), "cpu")
    theirs, tokenizer = open_clips(family), open_clip.get_tokenizer(f"small-{family}")
    options = {"normalize": False} if family == "coca" else {}
    paths = sorted((sample / "Images").iterdir())[:3]
    transform = image_transform_v2(PreprocessCfg(**model.open_clip["preprocess"] | {"size": model.image_encoder.size}), False)
    ids = tokenizer(CAPTIONS)
    with torch.no_grad():
        expected = theirs.encode_image(torch.stack([transform(Image.open(path)) for path in paths]), **options)
        found, _ = file_features(model, paths, torch.device("cpu"), torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        pixels = torch.stack([preprocess(Image.open(path)) for path in paths])
        torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-5, rtol=1e-5)
        expected = theirs.encode_text(ids, **options)
        found = text_features(model, token_ids(model.tokenizer, CAPTIONS), torch.device("cpu"), torch.float32)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(clip.tokenize(CAPTIONS, ids.shape[1], truncate=True), ids)
        torch.testing.assert_close(model.encode_text(ids), expected, atol=1e-5, rtol=1e-5)
        short = text_features(model, token_ids(model.tokenizer, SHORT), torch.device("cpu"), torch.float32)
        torch.testing.assert_close(short, theirs.encode_text(tokenizer(SHORT), **options), atol=1e-5, rtol=1e-5)
    assert model.logit_scale == theirs.logit_scale
    assert (model.logit_bias is None) == (theirs.logit_bias is None)


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (200, 201), (97, 300), (64, 64)])
@pytest.mark.parametrize("mode", ["shortest bicubic", "shortest bilinear", "squash bicubic", "squash bilinear"])
def test_pixels_are_those_of_open_clips_transform(mode, size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    resize_mode, interpolation = mode.split()
    settings = PreprocessCfg(size=64, resize_mode=resize_mode, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = image_transform_v2(settings, False)(Image.fromarray(picture))
    found = torch.from_numpy(center_crop(resize_image(picture, 64, mode), 64)).permute(2, 0, 1) / 255
    torch.testing.assert_close(found, expected)


def test_pixels_of_real_photographs_are_open_clips(real_photographs):
    transform = image_transform_v2(PreprocessCfg(), False)
    _, image_dir, _ = load_captions(str(real_photographs / "flickr8k"))
    for path in sorted(image_dir.iterdir())[:20]:
        found = torch.from_numpy(center_crop(read_image(path, 224, "shortest bicubic"), 224)).permute(2, 0, 1)
        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (PreprocessCfg().mean, PreprocessCfg().std))
        torch.testing.assert_close((found - mean) / std, transform(Image.open(path)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["clip", "siglip", "coca", "hugging-face", "mobile"])
def test_each_adapter_of_a_family_matters_and_merges(family, families):
    model, _ = clip.load(name_of(families, family), "cpu")
    size, text = model.image_encoder.size, clip.tokenize(SHORT)
    image = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(image, text)[0]
        add_adapters(model, 2)
        torch.testing.assert_close(model.eval()(image, text)[0], before, atol=1e-5, rtol=1e-5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    logits = model(image, text)[0]
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_" in name)
    torch.testing.assert_close(merged(model)(image, text)[0], logits, atol=1e-3, rtol=1e-3)


def test_openais_resnet_has_nothing_to_adapt(families):
    model, _ = clip.load(name_of(families, "resnet"), "cpu")
    with pytest.raises(UserError, match="the image encoder has no linear layers"):
        add_adapters(model, 2)


@pytest.fixture
def tuned(families, sample, tmp_path):
    """tuned(family, *flags): the folder of a run that fine-tuned a family's model for an epoch."""

    def tune(family, *flags):
        places = ["--data-dir", str(sample), "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
        sizes = ["--batch-size", "32", "--epochs", "1", "--num-workers", "0", "--device", "cpu", "--precision", "fp32"]
        words = ["open_clip", "--model", name_of(families, family), *places, *sizes, *flags]
        main.train(parse_config(words, "open_clip")[0])
        return tmp_path / "run"

    return tune


RATES = [word for part in ("image-encoder", "text-encoder", "head") for word in (f"--{part}-lr", "1e-3")]


def test_weights_of_a_causal_model_can_be_averaged(tuned):
    model, _ = clip.load(tuned("clip", *RATES, "--ema-decay", "0.5", "--epochs", "2"), "cpu")
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_models_of_other_activations_have_other_cache_keys(families):
    model, _ = clip.load(name_of(families, "clip"), "cpu")
    keys = set()
    for quick_gelu in (True, False):
        architecture = deepcopy(model.open_clip)
        architecture["model"]["quick_gelu"] = quick_gelu
        other = clip.open_clip_model(build_open_clip(architecture), model.tokenizer, architecture)
        other.load_state_dict(model.state_dict())
        keys |= {model_key(other.image_encoder), model_key(other.text_encoder)}
    assert len(keys) == 4  # the weights are the same


@pytest.mark.parametrize("family", ["siglip", "coca", "hugging-face"])
def test_a_fine_tuned_run_is_complete(family, tuned, families, sample, capsys):
    run = tuned(family, *RATES)
    assert "before the first step: image to text" in capsys.readouterr().out
    saved = load_run(run)
    assert saved["config"].loss == ("sigmoid" if family == "siglip" else "softmax")
    folder = families[family].parent
    folder.rename(folder.with_suffix(".away"))  # checkpoint, vocabulary and configuration: only the run folder is needed
    try:
        model, _ = clip.load(run, "cpu")
    finally:
        folder.with_suffix(".away").rename(folder)
    paths = sorted((sample / "Images").iterdir())[:4]
    I_f, _ = file_features(model, paths, torch.device("cpu"), torch.float32)
    before, _ = clip.load(name_of(families, family), "cpu")
    start, _ = file_features(before, paths, torch.device("cpu"), torch.float32)
    model.save_pretrained(folder.parent / f"{family}-saved")  # what a model hub would get
    copy = clip.CLIPModel.from_pretrained(folder.parent / f"{family}-saved")
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in model.state_dict().items())
    assert str(folder) not in (folder.parent / f"{family}-saved" / "config.json").read_text()
    assert I_f.isfinite().all() and (model.logit_bias is not None) == (family == "siglip")
    history = (run / "history.csv").read_text()
    assert "epoch" in history and I_f.shape == start.shape


def test_frozen_encoders_get_heads_that_change_nothing_at_first(families, tuned, sample):
    config = resolve_defaults(replace(PRESETS["open_clip"], model=name_of(families, "clip"), freeze="both"))
    model = clip.create_model(config, []).eval()
    alone, _ = clip.load(name_of(families, "clip"), "cpu")
    image = torch.randint(0, 256, (2, 3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), alone.encode_image(image))
    run = tuned("clip", "--freeze", "both", *RATES)
    weights, _ = clip.load(run, "cpu")
    again = resolve_defaults(replace(PRESETS["open_clip"], model=str(run), freeze="both"))
    assert clip.create_model(again, []).image_projection.projection.weight.shape == (48, 48)
    for name, value in alone.image_encoder.state_dict().items():
        assert torch.equal(weights.image_encoder.state_dict()[name], value), name


def test_a_run_can_be_resumed_with_the_same_weights(tuned, families, sample, tmp_path):
    run = tuned("siglip", *RATES, "--epochs", "2", "--layer-decay", "0.7")
    whole = clip.load(run, "cpu")[0].state_dict()
    last = torch.load(run / "last.pt", weights_only=True)["model"]
    run.rename(tmp_path / "whole")
    tuned("siglip", *RATES, "--epochs", "1", "--layer-decay", "0.7", "--steps", "3")
    tmp_path.joinpath("run").rename(tmp_path / "short")
    config = parse_config(["open_clip", "--resume", "--run-dir", str(tmp_path / "whole")], "open_clip")[0]
    main.train(config)
    again = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, again[name]) for name, value in last.items())
    assert all(torch.equal(value, clip.load(tmp_path / "whole", "cpu")[0].state_dict()[name]) for name, value in whole.items())


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_onnx_file_gives_the_embeddings(family, families, tmp_path):
    model, _ = clip.load(name_of(families, family), "cpu")
    paths = export_onnx(model, tmp_path)
    size = model.image_encoder.size
    image = torch.randint(0, 256, (3, 3, size, size)).float()
    ids = torch.tensor(token_ids(model.tokenizer, ["a red circle"]))
    with torch.no_grad():
        expected = [torch.nn.functional.normalize(e, dim=1) for e in (model.encode_image(image), model.encode_text(ids))]
    inputs = [{"image": image.numpy()}, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}]
    for path, given, wanted in zip(paths, inputs, expected):
        [found] = onnxruntime.InferenceSession(path).run(None, given)
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-5)


def test_a_name_is_searched_with(families, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    query = ["a red circle", "--run", name_of(families, "siglip"), "--device", "cpu"]
    inference.search(read_search([*query, "--images", str(sample / "Images"), "--n", "2"]))
    assert (tmp_path / "matches.png").exists() and "144 pictures" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no pictures and captions of its own; name a folder"):
        inference.search(read_search(query))


def test_names_and_checkpoints_that_do_not_fit_are_named(families, tmp_path):
    for name, expected in [
        ("open_clip:ViT-B-23@openai", "no model 'ViT-B-23'; the nearest are ViT-B-"),
        ("open_clip:ViT-B-32@laion2b", "no weights 'laion2b', and no such file; for ViT-B-32 there are laion"),
        ("open_clip:ViT-B-32", "no weights are named; add @WEIGHTS"),
        (f"open_clip:small-timm@{families['clip']}", "the checkpoint is not of this model .*visual"),
        ("open_clip:small-siglip@" + str(tmp_path), "no checkpoint in this folder"),
    ]:
        with pytest.raises(UserError, match=expected):
            clip.load(name, "cpu")
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="open_clip_config.json: damaged"):
        clip.load(f"open_clip:small-siglip@{tmp_path}", "cpu")


def test_no_network_is_one_line():
    for name in ("open_clip:ViT-B-16-SigLIP2@webli", "ViT-B/32", "open_clip:roberta-ViT-B-32@laion2b_s12b_b32k"):
        with pytest.raises(UserError, match="neither on this machine nor available from a model hub"):
            clip.load(name, "cpu")


def test_openais_names_stand_for_open_clips(no_model_loaded):
    for name in OPENAI:
        model, weights = split_name(name)
        assert weights == "openai" and open_clip.get_model_config(model)["quick_gelu"]
    for name in SUGGESTED:
        split_name(name)


@pytest.mark.parametrize(("name", "parameters"), [("RN50", 102_007_137), ("ViT-B-32", 151_277_313)])
def test_full_size_models_have_openais_number_of_parameters(name, parameters):
    model, _ = clip.load(f"open_clip:{name}@random", "cpu")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_openais_own_archives_are_read(families, tmp_path):
    """They are TorchScript, which open_clip does not read as a checkpoint."""
    state, archive = torch.load(families["clip"]), torch.nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        module = archive
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(value))
    archive.register_buffer("input_resolution", torch.tensor(32))  # which OpenAI's archives hold, too
    torch.jit.save(torch.jit.script(archive), tmp_path / "archive.pt")
    loaded, _ = clip.load(f"open_clip:small-clip@{tmp_path / 'archive.pt'}", "cpu")
    assert loaded.open_clip["model"]["quick_gelu"]  # whatever the model is called
    expected, _ = clip.load(name_of(families, "clip"), "cpu")
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_settings_that_do_not_go_with_a_whole_model():
    for changes, expected in [
        ({"image_feature_stages": "blocks.5"}, "brings both encoders"),
        ({"lora_rank": 8, "freeze": "image"}, "trains both encoders"),
        ({"wise_ft": True}, "name what to keep"),
        ({"keep_folder": "a", "keep_data": "b"}, "one score is watched"),
    ]:
        with pytest.raises(UserError, match=expected):
            validate(resolve_defaults(replace(PRESETS["open_clip"], **changes)))
    with pytest.raises(UserError, match="are for a whole model"):
        validate(resolve_defaults(replace(PRESETS["shapes"], lora_rank=8)))
    with pytest.raises(UserError, match="--text-encoder clip: has no weights of its own"):
        validate(resolve_defaults(replace(PRESETS["flickr8k"], text_encoder="clip")))


def test_long_captions_are_counted(sample, tmp_path, small_flags, capsys):
    main.train(parse_config(small_flags(max_length=8, epochs=1), "shapes")[0])
    assert "captions are longer than 8 tokens, and are cut there" in capsys.readouterr().out


def test_help_names_models_for_a_laptop_and_a_gpu():
    text = run_script("main.py", "open_clip", "--help").stdout
    assert all(name in text for name in SUGGESTED) and "a laptop" in text and "open_clip.list_pretrained()" in text


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


def test_available_models_are_run_folders_and_names(run, monkeypatch, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    (tmp_path / "runs" / "unfinished").mkdir()
    monkeypatch.chdir(tmp_path)
    assert clip.available_models() == ["runs/mine", *SUGGESTED, *OPENAI]
    with pytest.raises(UserError, match=r"ViT-B/33: .*runs/mine, .*ViT-L/14@336px"):
        clip.load("ViT-B/33")


def test_text_that_openai_would_cut_keeps_its_end():
    tokenizer = openai_tokenizer(8)
    ids = tokenizer.encode("a very long caption of a photo " * 3).ids
    assert len(ids) == 8 and ids[-1] == 49407


def test_a_generator_trains_with_a_model_of_another_width(families, small_flags):
    flags = small_flags(
        model=f"open_clip:small-clip@{families['clip']}", gan="joint", epochs=1, projection_dim=24, batch_size=16
    )
    model = main.train(parse_config(flags, "open_clip")[0])
    assert model.image_projection.out_features == 48
