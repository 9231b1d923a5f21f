"""The encoders of an ensemble: several models whose embeddings are put side by side.

The cosine of two such embeddings is the mean of the models' cosines.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UserError


class EnsembleImageEncoder(nn.Module):
    """The image encoders and heads of k models as one encoder: (n, 3, h, w) pixels -> (n, d) features, L2-normalised.

    d is the sum of the models' d_e. Attributes: as of a `modules.ImageEncoder`, as far as they are needed to embed pictures.
    """

    def __init__(self, models):
        super().__init__()
        self.encoders = nn.ModuleList(model.image_encoder for model in models)
        self.heads = nn.ModuleList(model.image_projection for model in models)
        self.width = sum(head.out_features for head in self.heads)
        self.size, self.resize = models[0].image_encoder.size, models[0].image_encoder.resize
        self.architecture = "ensemble"

    def forward(self, image):
        return side_by_side([head(encoder(image)) for encoder, head in zip(self.encoders, self.heads)])


class EnsembleTextEncoder(nn.Module):
    """The text encoders and heads of k models as one encoder: (n, l) token ids and mask -> (n, d) features, L2-normalised.

    Attributes: as of a `modules.TextEncoder`, as far as they are needed to embed texts.
    """

    def __init__(self, models):
        super().__init__()
        self.encoders = nn.ModuleList(model.text_encoder for model in models)
        self.heads = nn.ModuleList(model.text_projection for model in models)
        self.width = sum(head.out_features for head in self.heads)
        self.architecture = "ensemble"

    def forward(self, input_ids, attention_mask):
        return side_by_side([head(encoder(input_ids, attention_mask)) for encoder, head in zip(self.encoders, self.heads)])

    def pooled(self, input_ids, attention_mask):
        """As `forward`, without grouping captions by length."""
        return side_by_side([head(encoder.pooled(input_ids, attention_mask)) for encoder, head in zip(self.encoders, self.heads)])


def side_by_side(embeddings):
    """k of (n, d_e) -> (n, k d_e), L2-normalised, in which each counts the same."""
    return torch.cat([F.normalize(embedding.float(), dim=1) for embedding in embeddings], dim=1) / len(embeddings) ** 0.5


def require_same_inputs(models, names):
    """Raises UserError unless some models take the same pictures and the same token ids. names: of the models, for the message."""
    inputs = [(m.image_encoder.size, m.image_encoder.resize, m.tokenizer.to_str()) for m in models]
    for other, name in zip(inputs, names):
        if other != inputs[0]:
            what = "tokenizers" if other[:2] == inputs[0][:2] else f"input sizes ({inputs[0][0]} and {other[0]} px)"
            raise UserError(f"--run {','.join(names)}: {names[0]} and {name} have different {what}; an ensemble needs the same")
