"""What programs use of OpenAI's `clip` beside the model itself: its preprocessing, tokens, `model.visual` and `clip.model`.

`clip.py` gives these their names. `docs/api.md` lists what differs.
"""

import io
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms import Compose, Normalize, ToTensor

from config import CONTEXT_LENGTH
from utils.errors import UserError
from utils.formats import decode
from utils.images import center_crop, resize_image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the pictures OpenAI trained on
OPAQUE_MODES = {"1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"}  # of Pillow; others have transparency or deeper pixels
MAX_NORMALIZED = 16  # above it are pixels of 0 to 255 only: white is 2.6 at most in what image encoders were trained on
MAX_REMEMBERED = 100_000  # rows of token ids


def transform(size, resize="shortest bicubic", mean=MEAN, std=STD):
    """OpenAI's `clip._transform`: a PIL picture -> normalised pixels, (3, size, size); its `transforms` are as many as theirs.

    resize: as for `utils.images.resize_image`, so that a picture has the pixels that a search gives the encoder.
    """
    return Compose([Resize(size, resize), CenterCrop(size), _convert_image_to_rgb, ToTensor(), Normalize(mean, std)])


def transform_of(encoder):
    """The same for an image encoder."""
    mean, std = ((values.flatten() / 255).tolist() for values in (encoder.mean, encoder.std))
    return transform(encoder.size, encoder.resize, mean, std)


class Resize:
    """A PIL picture -> RGB, upright, and resized as a search resizes it."""

    def __init__(self, size, resize):
        self.size, self.resize = size, resize

    def __call__(self, picture):
        return Image.fromarray(resize_image(as_decoded(picture), self.size, self.resize))

    def __repr__(self):
        return f"Resize({self.size}, {self.resize!r})"


class CenterCrop:
    """A PIL picture -> its centre, (size, size)."""

    def __init__(self, size):
        self.size = size

    def __call__(self, picture):
        return Image.fromarray(center_crop(np.asarray(picture), self.size))

    def __repr__(self):
        return f"CenterCrop({self.size})"


def _convert_image_to_rgb(picture):
    return picture.convert("RGB")


def as_decoded(picture):
    """A PIL picture -> (h, w, 3) uint8, as `utils.formats.decode` gives its file, upright and opaque."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode in OPAQUE_MODES and not picture.has_transparency_data:
        return np.asarray(picture.convert("RGB"))
    file, kind = io.BytesIO(), "TIFF" if picture.mode == "F" else "PNG"
    picture.save(file, kind)
    return decode(file.getvalue(), f".{kind.lower()}")


class Visual(nn.Module):
    """OpenAI's `model.visual`: normalised pixels, (n, 3, h, w) -> embeddings, (n, d_e), of an image encoder and its head.

    What it has not, such as a ResNet's `layer4` for Grad-CAM, is the encoder's backbone's.
    """

    def __init__(self, encoder, projection):
        super().__init__()
        self.encoder, self.projection = encoder, projection
        self.input_resolution, self.output_dim = encoder.size, projection.out_features

    def forward(self, image):
        return self.projection(encode_floats(self.encoder, image))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder").backbone, name)


class OpenAINames:
    """What programs ask of OpenAI's model, for a CLIPModel, and its own `tokenize`."""

    visual = cached_property(lambda self: Visual(self.image_encoder, self.image_projection))
    context_length = property(lambda self: self.tokenizer.truncation["max_length"])
    vocab_size = property(lambda self: self.tokenizer.get_vocab_size())
    dtype = property(lambda self: self.image_encoder.mean.dtype)

    def tokenize(self, texts, context_length=CONTEXT_LENGTH, truncate=False):
        """As `clip.tokenize`, in this model's vocabulary, whichever model was loaded last."""
        return tokens(self.tokenizer, texts, context_length, truncate)


def encode_floats(encoder, image):
    """Normalised pixels, (n, 3, h, w), or of 0 to 255 where one is above MAX_NORMALIZED -> an encoder's features."""
    image = image.to(encoder.mean.dtype)
    return encoder.encode_normalized(torch.where(image.amax() > MAX_NORMALIZED, encoder.normalize(image), image))


made_with = {}  # {hash of a row of token ids, without padding: the tokenizers that made it}


def tokens(tokenizer, texts, context_length, truncate):
    """What `clip.tokenize` returns, in the vocabulary of a tokenizer."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    max_length = min(context_length, tokenizer.truncation["max_length"])
    input_ids = torch.full((len(texts), context_length), tokenizer.padding["pad_id"])
    if len(made_with) > MAX_REMEMBERED:
        made_with.clear()
    for row, (text, encoding) in enumerate(zip(texts, tokenizer.encode_batch(texts))):
        ids = encoding.ids[: sum(encoding.attention_mask)]
        if len(ids) > max_length or encoding.overflowing:
            if not truncate:
                raise RuntimeError(f"Input {text} is too long for context length {max_length}")
            ids = ids[: max_length - 1] + ids[-1:]
        input_ids[row, : len(ids)] = torch.tensor(ids)
        known = made_with.setdefault(hash(tuple(ids)), [])
        if tokenizer not in known:
            known.append(tokenizer)
    return input_ids


def ids_and_mask(tokenizer, text):
    """Tokens of `tokens`, (n, l), or (n, 1, l) as loaders stack them -> (input_ids, attention_mask), cut to the longest text.

    Padding is told by its id at the end, as OpenAI pads with 0, which is also "!".
    Raises UserError for another shape or type, and for tokens of another vocabulary.
    """
    if text.ndim == 3 and text.shape[1] == 1:
        text = text[:, 0]
    if text.ndim != 2 or text.is_floating_point():
        raise UserError(
            f"tokens must be (n, length) integers, as clip.tokenize gives them; these are {tuple(text.shape)} {text.dtype}"
        )
    real = text != tokenizer.padding["pad_id"]
    attention_mask = real.flip(1).cummax(1).values.flip(1).long()
    refuse_foreign(tokenizer, text.tolist(), attention_mask.sum(1).tolist())
    longest = max(1, int(attention_mask.sum(1).max()))
    return text[:, :longest], attention_mask[:, :longest]


def refuse_foreign(tokenizer, rows, lengths):
    """Raises UserError for ids of another vocabulary: outside of this one, without its start token, or known as another's.

    rows: lists of ids; lengths: of each without padding.
    """
    other = "another model's vocabulary; call model.tokenize(texts) of the model that they are for"
    size, empty = tokenizer.get_vocab_size(), tokenizer.encode("").ids
    starts = {empty[0], tokenizer.padding["pad_id"]} if len(empty) > 1 else None
    for row, length in zip(rows, lengths):
        if max(row) >= size or min(row) < 0:
            raise UserError(f"token {max(row) if max(row) >= size else min(row)}: this model has {size:,}, so it is of {other}")
        if starts and row[0] not in starts:
            raise UserError(
                f"tokens that begin with {row[0]}, and not with this model's start token {empty[0]}, are of {other}"
            )
        makers = made_with.get(hash(tuple(row[:length])), [])
        if makers and tokenizer not in makers and all(maker.to_str() != tokenizer.to_str() for maker in makers):
            raise UserError(f"these tokens were made with {other}")


def build_model(state_dict):
    """OpenAI's call, which builds a model from its weights alone. Raises UserError, which says what to call instead."""
    raise UserError("clip.model.build_model: save the weights to FILE, and call clip.load('open_clip:ViT-B-32@FILE')")


def convert_weights(model):
    """OpenAI's call, which makes a model's weights fp16 on a GPU. Here they stay fp32: nothing is done."""
