"""CLIP (Radford et al. 2021): two towers, two heads, a temperature, and the symmetric loss.

The lines of the paper's pseudocode (its figure 3) stand beside the code that does what they say.
"""

import math
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from config import load_run
from dataset import center_crop, resize_image
from device import pick_device
from modules import ImageEncoder, ProjectionHead, TextEncoder, load_pretrained, random_text_tower
from storage import UserError, write_whole
from tokenizer import pretrained_tokenizer, read_tokenizer, train_tokenizer

MAX_LOGIT_SCALE = math.log(100)  # the paper's bound: logits are never scaled by more than 100


class CLIPModel(nn.Module):
    """Two towers and their heads.

    image_encoder: maps (n, 3, h, w) pixels to (n, d_i) features and has the attribute width, d_i; text_encoder maps
    (n, l) token ids and their mask to (n, d_t). tokenizer: what made the ids. projection_dim: d_e.
    """

    def __init__(
        self, image_encoder, text_encoder, tokenizer, projection_dim, layers=1, dropout=0.1, image_dropout=0.0, text_dropout=0.0
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        self.image_projection = ProjectionHead(image_encoder.width, projection_dim, layers, dropout, image_dropout)
        self.text_projection = ProjectionHead(text_encoder.width, projection_dim, layers, dropout, text_dropout)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.tokenizer = tokenizer

    def image_features(self, image):
        """(n, 3, h, w) pixels or a trunk's activations -> (n, d_i). Features, (n, d_i), pass: computed before."""
        return self.image_encoder(image) if image.ndim > 2 else image

    def text_features(self, text, attention_mask=None):
        """(n, l) token ids -> (n, d_t). Features, (n, d_t), pass: a frozen tower computed them before."""
        if text.is_floating_point():
            return text
        if attention_mask is None:
            attention_mask = (text != self.tokenizer.padding["pad_id"]).long()
        return self.text_encoder(text, attention_mask)

    def encode_image(self, image):
        """Pixels or features of n images -> (n, d_e) embeddings, not normalised."""
        return self.image_projection(self.image_features(image))

    def encode_text(self, text, attention_mask=None):
        """Token ids or features of n captions -> (n, d_e) embeddings, not normalised."""
        return self.text_projection(self.text_features(text, attention_mask))

    def forward(self, image, text, attention_mask=None):
        """n images and n captions -> (logits_per_image, logits_per_text), (n, n) each."""
        # fmt: off
        # the code                                              # the paper
        I_f = self.image_features(image)                        # I_f = image_encoder(I)  # [n, d_i]
        T_f = self.text_features(text, attention_mask)          # T_f = text_encoder(T)  # [n, d_t]
        I_e = F.normalize(self.image_projection(I_f), dim=1)    # I_e = l2_normalize(np.dot(I_f, W_i), axis=1)  # [n, d_e]
        T_e = F.normalize(self.text_projection(T_f), dim=1)     # T_e = l2_normalize(np.dot(T_f, W_t), axis=1)  # [n, d_e]
        logits = self.logit_scale.exp() * I_e @ T_e.T           # logits = np.dot(I_e, T_e.T) * np.exp(t)  # [n, n]
        # fmt: on
        return logits, logits.T


def contrastive_loss(logits):
    """The symmetric cross-entropy of (n, n) logits whose diagonal holds the true pairs; ln(n) is chance."""
    # fmt: off
    # the code                                                  # the paper
    labels = torch.arange(len(logits), device=logits.device)    # labels = np.arange(n)
    loss_i = F.cross_entropy(logits, labels)                    # loss_i = cross_entropy_loss(logits, labels, axis=0)
    loss_t = F.cross_entropy(logits.T, labels)                  # loss_t = cross_entropy_loss(logits, labels, axis=1)
    return (loss_i + loss_t) / 2                                # loss   = (loss_i + loss_t)/2
    # fmt: on


# ---- models from settings, and to and from run folders -----------------------------------------------------------


def create_model(config, captions):
    """The CLIPModel that a Config describes, in fp32. captions: the training captions, for a vocabulary made here.

    Raises UserError for towers that cannot be had.
    """
    image_encoder = ImageEncoder(config.image_encoder, config.image_weights, config.size)
    if config.text_weights == "random":
        tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length)
        text_config = random_text_tower(
            config.text_encoder,
            config.text_width,
            config.text_layers,
            config.text_heads,
            tokenizer.get_vocab_size(),
            config.max_length,
        )
        text_encoder = TextEncoder(transformers.AutoModel.from_config(text_config), config.pooling)
    else:
        tokenizer = pretrained_tokenizer(config.text_encoder, config.max_length)
        text_encoder = TextEncoder(load_pretrained(transformers.AutoModel, config.text_encoder).float(), config.pooling)
        tokenizer.enable_truncation(min(config.max_length, text_encoder.max_length))
    return join_towers(config, image_encoder, text_encoder, tokenizer)


def join_towers(config, image_encoder, text_encoder, tokenizer):
    return CLIPModel(
        image_encoder,
        text_encoder,
        tokenizer,
        config.projection_dim,
        config.num_projection_layers,
        config.dropout,
        image_dropout=config.image_feature_dropout,
        text_dropout=config.text_feature_dropout,
    )


def describe_towers(model):
    """What `load` needs to rebuild the towers without their sources, as plain values."""
    return {
        "image": {"size": model.image_encoder.size},
        "text": model.text_encoder.tower.config.to_dict(),
        "pooling": model.text_encoder.pooling,
    }


def save_weights(model, run_dir):
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_whole(Path(run_dir) / "model.safetensors", lambda path: safetensors.torch.save_file(state, path))


def load_weights(model, run_dir):
    """Loads run_dir/model.safetensors, which has to fit. Raises UserError where it is missing, truncated or another's."""
    path = Path(run_dir) / "model.safetensors"
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; this run has not ended its first epoch") from None
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path}: truncated, damaged or another model's ({reason}); train the run again") from None


def load(name, device="auto", jit=False):
    """OpenAI's call: (model, preprocess) of a run folder, the model in eval mode.

    device: a torch device or its name; auto takes a GPU where there is one. jit: refused, as these towers do not script.
    preprocess maps a PIL image to the (3, size, size) pixels that model.encode_image takes, in batches.
    Raises UserError for a folder that holds no usable run.
    """
    if jit:
        raise UserError("clip.load(jit=True): these models are not scripted; use torch.compile(model)")
    run = load_run(name)
    image_encoder = ImageEncoder(run["config"].image_encoder, "random", run["towers"]["image"]["size"])
    text_tower = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**run["towers"]["text"]))
    text_encoder = TextEncoder(text_tower, run["towers"]["pooling"])
    model = join_towers(run["config"], image_encoder, text_encoder, read_tokenizer(name))
    load_weights(model, name)
    model.eval().to(pick_device(str(device)))

    def preprocess(picture):
        image = resize_image(np.asarray(picture.convert("RGB")), image_encoder.size)
        return torch.from_numpy(center_crop(image, image_encoder.size)).permute(2, 0, 1).float()

    return model, preprocess
