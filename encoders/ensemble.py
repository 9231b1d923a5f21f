"""The parts of an ensemble: several models whose embeddings are put side by side, so that the cosine is the mean of theirs."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


class EnsembleEncoder(nn.Module):
    """The encoders of k models, for pictures or for texts, and their heads as one encoder: inputs -> (n, d) side by side.

    d is the sum of the models' d_e. Attributes: width, d; of image encoders also size and resize, as of the first.
    """

    def __init__(self, encoders, heads):
        super().__init__()
        self.encoders, self.heads = nn.ModuleList(encoders), nn.ModuleList(heads)
        self.width = sum(head.out_features for head in heads)
        self.size, self.resize = (getattr(encoders[0], name, None) for name in ("size", "resize"))

    def forward(self, *inputs):
        return project_all([encoder(*inputs) for encoder in self.encoders], self.heads)

    def pooled(self, *inputs):
        """As `forward` of text encoders, without grouping captions by length."""
        return project_all([encoder.pooled(*inputs) for encoder in self.encoders], self.heads)


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
