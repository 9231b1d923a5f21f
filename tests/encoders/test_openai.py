"""Programs that were written for OpenAI's `clip`: its names, normalised pixels, and tokens of the right model."""

import multiprocessing
import pickle

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from PIL import Image

import clip
from embedding import file_features
from utils.errors import UserError


@pytest.fixture
def loaded(run):
    return clip.load(str(run), device="cpu")


def pixels_of(preprocess, picture):
    return torch.from_numpy(np.array(preprocess.transforms[1](preprocess.transforms[0](picture)))).permute(2, 0, 1)


def test_openais_modules_and_names(loaded):
    import clip.simple_tokenizer  # noqa: F401
    from clip.model import CLIP, build_model
    from clip.simple_tokenizer import SimpleTokenizer

    from clip import clip as inner

    model, preprocess = loaded
    assert inner.load is clip.load and isinstance(model, CLIP) and clip.clip._transform is clip._transform
    assert model.visual.input_resolution == model.image_encoder.size == 80
    assert (model.context_length, model.vocab_size, model.dtype) == (64, model.tokenizer.get_vocab_size(), torch.float32)
    assert [type(step).__name__ for step in clip._transform(224).transforms] == [
        "Resize", "CenterCrop", "function", "ToTensor", "Normalize"
    ]  # fmt: skip
    assert len(preprocess.transforms) == 5
    tokenizer, theirs = SimpleTokenizer(), open_clip.tokenizer.SimpleTokenizer()
    text = "A dog's naïve ☕"
    assert tokenizer.encode(text) == theirs.encode(text) and tokenizer.decode(tokenizer.encode(text)) == "a dog 's naïve ☕ "
    assert [tokenizer.encoder[f"<|{name}oftext|>"] for name in ("start", "end")] == [49406, 49407]
    with pytest.raises(UserError, match="open_clip:ViT-B-32@FILE"):
        build_model({})
    assert clip.model.convert_weights(model) is None and model.dtype == torch.float32


def test_openais_transform_gives_open_clips_pixels():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8))
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(size=64), False)
    torch.testing.assert_close(clip._transform(64)(picture), transform(picture), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["normalised", "normalised double", "uint8", "float of 0 to 255", "visual"])
def test_pixels_of_either_kind_give_the_embedding_of_a_search(kind, loaded, sample):
    model, preprocess = loaded
    paths = sorted((sample / "Images").iterdir())[:2]
    image = torch.stack([preprocess(Image.open(path)) for path in paths])
    assert image.min() < 0 and image.abs().max() < 4
    raw = torch.stack([pixels_of(preprocess, Image.open(path)) for path in paths])
    given = {"normalised double": image.double(), "uint8": raw, "float of 0 to 255": raw.float()}.get(kind, image)
    with torch.no_grad():
        found = (model.visual if kind == "visual" else model.encode_image)(given)
        expected = model.image_projection(file_features(model, paths, torch.device("cpu"), torch.float32)[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_turned_picture_is_embedded_as_its_file_is(loaded, sample, tmp_path):
    model, preprocess = loaded
    picture, exif = Image.open(sorted((sample / "Images").iterdir())[0]).convert("RGB"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    picture.convert("RGBA").save(tmp_path / "transparent.png")
    Image.fromarray((np.arange(96 * 96).reshape(96, 96) * 7).astype(np.uint16)).save(tmp_path / "deep.png")
    paths = [tmp_path / name for name in ("turned.jpg", "transparent.png", "deep.png")]
    I_f, _ = file_features(model, paths, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        found = model.image_features(torch.stack([preprocess(Image.open(path)) for path in paths]))
    torch.testing.assert_close(found, I_f, atol=2e-2, rtol=2e-2)


def test_a_gradient_reaches_the_pixels_and_grad_cam_the_layers(loaded, sample):
    model, preprocess = loaded
    image = preprocess(Image.open(sorted((sample / "Images").iterdir())[0]))[None].requires_grad_()
    seen = []
    hook = model.visual.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.encode_image(image).sum().backward()
    hook.remove()
    assert image.grad.abs().sum() > 0 and seen[0].ndim == 4
    assert model.visual is model.visual and "visual" not in dict(model.named_modules())


def test_preprocess_and_model_travel_to_other_processes(loaded, sample):
    model, preprocess = loaded
    picture = Image.open(sorted((sample / "Images").iterdir())[0])
    assert torch.equal(pickle.loads(pickle.dumps(preprocess))(picture), preprocess(picture))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert torch.equal(pool.map(preprocess, [picture])[0], preprocess(picture))


def test_tokens_as_loaders_stack_them(loaded):
    model, _ = loaded
    text = clip.tokenize(["a red circle", "a large blue star"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(text[:, None]), model.encode_text(text))
    for wrong in (text[0], text.float(), text[None, None], torch.stack([text, text])):
        with pytest.raises(UserError, match="tokens must be"):
            model.encode_text(wrong)


def test_tokens_of_another_model_are_refused(loaded, run):
    model, _ = loaded
    own = clip.tokenize(["a red circle"])
    other, _ = clip.load("open_clip:RN50@random", "cpu")
    for given, to in ((own, other), (clip.tokenize("a dog"), model)):
        with pytest.raises(UserError, match="another model's vocabulary; call model.tokenize"):
            to.encode_text(given)
    assert torch.equal(model.tokenize(["a red circle"]), own)
    again, _ = clip.load(str(run), "cpu")  # the same vocabulary
    assert again.encode_text(own).shape == model.encode_text(own).shape == (1, 256)


def test_tokens_of_another_vocabulary_of_the_same_kind_are_refused(loaded, monkeypatch):
    """The ids alone cannot tell, as both begin and end with the same two."""
    from encoders.tokenizer import train_tokenizer

    model, _ = loaded
    other = train_tokenizer(["the zebra quietly jumps over fences"] * 9, 100, 64)
    monkeypatch.setattr(clip, "last_tokenizer", other)
    with pytest.raises(UserError, match="made with another model's vocabulary"):
        model.encode_text(clip.tokenize("the zebra jumps"))


def test_jit_and_files_get_a_clear_answer(run, tmp_path):
    with pytest.raises(UserError, match=r"jit=True.*torch.compile"):
        clip.load(str(run), "cpu", jit=True)
    (tmp_path / "ViT-B-32.pt").write_bytes(b"weights")
    with pytest.raises(RuntimeError, match="is a file; write open_clip:MODEL@"):
        clip.load(str(tmp_path / "ViT-B-32.pt"))
    model, _ = clip.load(str(run), "cpu", download_root=str(tmp_path))
    assert model.run_dir == str(run) and (ROOT / "clip.py").exists()


def test_download_root_is_where_weights_go(tmp_path, monkeypatch):
    asked = []

    def download_pretrained(tag, cache_dir=None):
        asked.append(cache_dir)
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "download_pretrained", download_pretrained)
    with pytest.raises(UserError, match="neither on this machine"):
        clip.load("RN50", "cpu", download_root=str(tmp_path))
    assert set(asked) == {str(tmp_path)}
