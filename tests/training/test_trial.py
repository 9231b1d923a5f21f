"""Encoders of many architectures: each trains, is saved and loaded, or is refused in one line before a picture is decoded."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from conftest import run_script
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import clip
import main
from captions import load_captions
from config import parse_config, save_run
from encoders.build import load_pretrained
from encoders.text import max_tokens
from training import trial
from utils.errors import UserError

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
ARCHITECTURES = {
    "t5": T5,
    "mt5": T5,
    "bart": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "roberta": SIZES | {"max_position_embeddings": 14},  # of which it uses the last 12
    "mpnet": SIZES | {"max_position_embeddings": 14},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "llama": SIZES,
}


def save_text_model(folder, model_type, options, captions, vocab_size=0):
    """A tiny random model and a tokenizer of the captions' words, as save_pretrained writes them; returns the model."""
    words = sorted({word for caption in captions for word in caption.lower().split()})
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, **options, **ids)
    config.vocab_size = vocab_size or len(special + words)
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(folder)
    return model


@pytest.fixture
def text_model(sample, tmp_path):
    """text_model(model type, **options): the flag for a folder with such a model."""
    captions = load_captions(sample)[0]["caption"]

    def save(model_type, options, **others):
        save_text_model(tmp_path / "text", model_type, options, captions, **others)
        return {"text_encoder": tmp_path / "text", "text_weights": "pretrained"}

    return save


def comes_back(flags, folder):
    """Tries a model, saves it as a run does and loads it, and compares their embeddings; returns the model."""
    config, _ = parse_config(flags, "shapes")
    model = trial.create_tried_model(config, ["a red circle", "a small blue square left of a star"]).eval()
    folder.mkdir()
    save_run(folder, config, clip.describe_encoders(model))
    model.tokenizer.save(str(folder / "tokenizer.json"))
    clip.save_weights(model, folder)
    loaded, _ = clip.load(folder, device="cpu")
    text = loaded.tokenize(["a red circle", "a small blue square"], context_length=10, truncate=True)
    torch.testing.assert_close(loaded.encode_text(text), model.encode_text(text))
    return model


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_text_encoder_is_tried_saved_and_loaded(text_model, small_flags, tmp_path, model_type):
    comes_back(small_flags(**text_model(model_type, ARCHITECTURES[model_type]), max_length=60), tmp_path / "run")


def test_an_encoder_decoder_trains_and_is_evaluated(text_model, small_flags, sample, tmp_path, evaluate_here):
    main.train(parse_config(small_flags(**text_model("bart", ARCHITECTURES["bart"]), epochs=1), "shapes")[0])
    flags = ["--run", tmp_path / "run", "--data-dir", sample, "--json", tmp_path / "json"]
    evaluate_here("retrieval", *flags, "--split", "val")
    assert json.loads((tmp_path / "json").read_text())["images"] == 24


def test_an_encoder_decoder_gives_its_encoder(text_model):
    """Features are those of Hugging Face's own encoder, and no decoder is kept."""
    folder = str(text_model("t5", T5)["text_encoder"])
    whole = load_pretrained(transformers.AutoModel, folder).eval()
    encoder = clip.TextEncoder(load_pretrained(transformers.AutoModel, folder)).eval()
    ids, mask = torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    expected = whole.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask)[1], expected[1, :3].mean(dim=0))
    assert not any(name.startswith("backbone.decoder") for name in encoder.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "modernbert", "opt", "roberta", "t5", "marian", "gpt2"])
def test_random_text_encoders_take_captions_of_full_length(small_flags, tmp_path, model_type):
    flags = small_flags(text_encoder=model_type, text_weights="random", max_length=5, text_heads=4, text_layers=2)
    model = comes_back(flags, tmp_path / "run")
    assert model.text_encoder.max_length >= 5 and model.tokenizer.truncation["max_length"] == 5


def test_positions_before_the_padding_are_none():
    config = transformers.RobertaConfig(**SIZES, vocab_size=60, max_position_embeddings=14, pad_token_id=1)
    assert max_tokens(transformers.RobertaModel(config)) == 12
    config = transformers.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=14)
    assert max_tokens(transformers.BertModel(config)) == 14


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_encoder": "vit_tiny_patch16_224", "size": 8}, "--image-encoder vit_tiny_patch16_224 with --size 8: .*another"),
        ({"image_encoder": "mixer_s32_224", "size": 160}, "--image-encoder mixer_s32_224 with --size 160: .*224"),
        ({"image_encoder": "convnext_atto", "size": 16}, "--image-encoder convnext_atto with --size 16: .*--size"),
        ({"text_encoder": "vit", "text_weights": "random"}, "--text-encoder vit: .*choose another text encoder"),
        ({"text_encoder": "prophetnet", "text_weights": "random"}, "--text-encoder prophetnet .*choose another text encoder"),
    ],
)
def test_an_encoder_that_cannot_be_used_is_named_before_anything_is_written(small_flags, tmp_path, options, message):
    done = run_script("main.py", *small_flags(**options, image_weights="random"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = done.stderr.strip().splitlines()
    with pytest.raises(UserError, match=message):
        raise UserError(line)
    assert "object" not in line and not (tmp_path / "run").exists()


def test_a_tokenizer_without_special_tokens_pads_with_any(text_model, small_flags, tmp_path):
    folder = text_model("bert", SIZES)["text_encoder"]
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")).save_pretrained(folder)
    comes_back(small_flags(text_encoder=folder, text_weights="pretrained"), tmp_path / "run")


def test_a_tokenizer_that_has_no_file_of_its_own_is_named(text_model, small_flags, monkeypatch):
    flags = text_model("bert", SIZES)
    monkeypatch.setattr("encoders.tokenizer.load_pretrained", lambda *_: object())  # written in Python, without a backend
    with pytest.raises(UserError, match="--text-encoder .*: its tokenizer cannot be saved as a tokenizer.json"):
        trial.create_tried_model(parse_config(small_flags(**flags), "shapes")[0], ["a red circle"])


def test_a_tokenizer_of_another_model_is_named(text_model, small_flags):
    flags = text_model("bert", SIZES, vocab_size=8)
    with pytest.raises(UserError, match="its tokenizer makes the token [0-9]+ of a caption, and its model has 8 only"):
        main.train(parse_config(small_flags(**flags), "shapes")[0])


def test_the_trial_changes_nothing(small_flags, sample):
    """Neither weights nor BatchNorm statistics, gradients, modes or random numbers."""
    config, _ = parse_config(small_flags(image_encoder="resnet18", image_weights="random", size=32), "shapes")
    captions, states, outcomes = list(load_captions(sample)[0]["caption"]), [], []
    for create in (clip.create_model, trial.create_tried_model):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        model = create(config, captions)
        states.append(model.state_dict())
        outcomes.append([torch.rand(1).item(), random.random(), np.random.rand()])
        assert all(weight.grad is None for weight in model.parameters()) and model.training
    assert outcomes[0] == outcomes[1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_model_that_loses_what_is_saved_is_refused(small_flags, sample, monkeypatch):
    monkeypatch.setattr(trial, "describe_encoders", lambda model: {"text": {"model_type": "bert", **SIZES}})
    config, _ = parse_config(small_flags(), "shapes")
    with pytest.raises(UserError, match="--text-encoder distilbert: .*how .* is built"):
        trial.create_tried_model(config, ["a red circle"])


def test_tensors_that_share_memory_are_saved(small_flags, tmp_path):
    config, _ = parse_config(small_flags(), "shapes")
    model = clip.create_model(config, ["a red circle"])
    model.text_projection.projection.weight = model.image_projection.projection.weight
    clip.save_weights(model, tmp_path)
    clip.load_weights(model, tmp_path)
