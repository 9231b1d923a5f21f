"""The parts of an ensemble: several models whose embeddings are put side by side, so that the cosine is the mean of theirs."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


class EnsembleImageEncoder(nn.Module):
    """The image encoders and heads of k models as one encoder: (n, 3, h, w) pixels -> (n, d) embeddings side by side.

    d is the sum of the models' d_e. Attributes: as of a `modules.ImageEncoder`, as far as they are needed to embed pictures.
    """

    def __init__(self, models):
        super().__init__()
        self.encoders = nn.ModuleList(model.image_encoder for model in models)
        self.heads = nn.ModuleList(model.image_projection for model in models)
        self.width = sum(head.out_features for head in self.heads)
        self.size, self.resize = models[0].image_encoder.size, models[0].image_encoder.resize

    def forward(self, image):
        return project_all([encoder(image) for encoder in self.encoders], self.heads)


class EnsembleTextEncoder(nn.Module):
    """The text encoders and heads of k models as one encoder: (n, l) token ids and mask -> (n, d) embeddings side by side."""

    def __init__(self, models):
        super().__init__()
        self.encoders = nn.ModuleList(model.text_encoder for model in models)
        self.heads = nn.ModuleList(model.text_projection for model in models)
        self.width = sum(head.out_features for head in self.heads)

    def forward(self, input_ids, attention_mask):
        return project_all([encoder(input_ids, attention_mask) for encoder in self.encoders], self.heads)

    def pooled(self, input_ids, attention_mask):
        """As `forward`, without grouping captions by length."""
        return project_all([encoder.pooled(input_ids, attention_mask) for encoder in self.encoders], self.heads)


class SideBySide(nn.Module):
    """The projection head of an ensemble: L2-normalises the embeddings of each model, and makes each count the same.

    widths: d_e of each, as they lie side by side.
    """

    def __init__(self, widths):
        super().__init__()
        self.widths, self.out_features = widths, sum(widths)

    def forward(self, embeddings):
        parts = [F.normalize(part, dim=1) for part in embeddings.split(self.widths, dim=1)]
        return torch.cat(parts, dim=1) / len(parts) ** 0.5


def project_all(features, heads):
    """k features, (n, d) each, through their projection heads, in fp32 as those of a single model: (n, the sum of the d_e)."""
    with torch.autocast(features[0].device.type, enabled=False):
        return torch.cat([head(feature.float()) for feature, head in zip(features, heads)], dim=1)


def require_same_inputs(models, names):
    """Raises UserError unless some models take the same pictures and the same token ids. names: of the models."""
    for model, name in zip(models, names):
        for what, mine, theirs in zip(("input sizes", "ways to resize", "tokenizers"), inputs(models[0]), inputs(model)):
            if mine != theirs:
                values = "" if what == "tokenizers" else f" ({mine} and {theirs})"
                raise UserError(f"--run {','.join(names)}: {names[0]} and {name} have different {what}{values}; leave one out")


def inputs(model):
    encoder, tokenizer = model.image_encoder, model.tokenizer
    return encoder.size, encoder.resize, (tokenizer.to_str(), getattr(tokenizer, "clean", None))
