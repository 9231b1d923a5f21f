"""The parts of an ensemble: several models whose embeddings are put side by side, so that the cosine is the mean of theirs."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


class EnsembleEncoder(nn.Module):
    """The encoders of k models, for pictures or for texts, as one: inputs -> (n, d), their features side by side.

    Attributes: widths, of their features; width, d, the sum; of image encoders also size and resize, as of the first.
    """

    def __init__(self, encoders):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.widths = [encoder.width for encoder in encoders]
        self.width = sum(self.widths)
        self.size, self.resize = (getattr(encoders[0], name, None) for name in ("size", "resize"))

    def forward(self, *inputs):
        return torch.cat([encoder(*inputs) for encoder in self.encoders], dim=1)

    def pooled(self, *inputs):
        """As `forward` of text encoders, without grouping captions by length."""
        return torch.cat([encoder.pooled(*inputs) for encoder in self.encoders], dim=1)


class EnsembleHead(nn.Module):
    """The projection heads of k models as one: features side by side, (n, d), -> embeddings side by side, (n, d_e).

    The embeddings of each model are L2-normalised and divided by sqrt(k), so that each model counts the same.

    heads: the models' heads. widths: of their features. Attributes: out_features, d_e, the sum of theirs.
    """

    def __init__(self, heads, widths):
        super().__init__()
        self.heads, self.widths = nn.ModuleList(heads), widths
        self.out_features = sum(head.out_features for head in heads)

    def forward(self, features):
        parts = [F.normalize(head(part), dim=1) for head, part in zip(self.heads, features.split(self.widths, dim=1))]
        return torch.cat(parts, dim=1) / len(parts) ** 0.5


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
