"""The losses that `--loss` names and the targets that `--targets` names, over rows of a batch's similarity matrix.

CLIP's own loss is `clip.contrastive_loss`, which a plain step uses. What follows computes it, and the others, for some rows at
a time, as micro-batches and several processes need it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIDES = {"softmax": (0.5, 0.5), "image": (1.0, 0.0), "text": (0.0, 1.0)}  # weights of the pictures' and the captions' rows
SMOOTHING = 0.1  # of --targets smooth: what all pairs of a row share; the right one has the rest, too


@dataclass(frozen=True)
class Objective:
    """What training minimises. loss, targets: as the settings of the same names."""

    loss: str = "softmax"
    targets: str = "pair"

    def rows_loss(self, logits_i, logits_t, targets, bias=None):
        """The summed loss of r of a batch's n pairs; all pairs together give n times the batch's loss.

        logits_i: (r, n) scaled cosines of r pictures with all captions; logits_t: (r, n), of their captions with all pictures.
        targets: as `rows_targets` gives them. bias: (), added to all logits, for the sigmoid loss.

        The sigmoid loss is that of SigLIP (Zhai et al. 2023, algorithm 1): each pair of the matrix is a right or a wrong one by
        itself. "bce" is the same without a bias, and averaged over all n² pairs instead of n.
        """
        if self.loss in SIDES:
            of_image, of_text = SIDES[self.loss]
            loss_i = F.cross_entropy(logits_i, targets, reduction="sum") if of_image else 0.0
            loss_t = F.cross_entropy(logits_t, targets, reduction="sum") if of_text else 0.0
            return of_image * loss_i + of_text * loss_t
        n = logits_i.shape[1]
        right = F.one_hot(targets, n) if targets.ndim == 1 else targets > 0
        logits = logits_i if bias is None else logits_i + bias
        loss = F.binary_cross_entropy_with_logits(logits, right.to(logits.dtype), reduction="sum")
        return loss if self.loss == "sigmoid" else loss / n

    @torch.no_grad()
    def rows_targets(self, rows, ids, I_e, T_e, logit_scale):
        """What is right in some rows of the matrix: (r,) positions, or (r, n) probabilities.

        rows: (r,) positions of pairs. ids: (n,) which picture each pair has. I_e, T_e: (n, d_e), L2-normalised.
        "soft" are the softmax of the mean cosine of two pairs' pictures and captions, after a popular reimplementation, but
        without a gradient through the targets and at the model's temperature.
        """
        if self.targets == "pair":
            return rows
        if self.targets == "image":
            same = (ids[rows, None] == ids).to(I_e.dtype)
            return same / same.sum(dim=1, keepdim=True)
        if self.targets == "smooth":
            return F.one_hot(rows, len(ids)) * (1 - SMOOTHING) + SMOOTHING / len(ids)
        return F.softmax(logit_scale.exp() * (I_e[rows] @ I_e.T + T_e[rows] @ T_e.T) / 2, dim=1)

    def batch_loss(self, I_e, T_e, logit_scale, bias=None):
        """The loss of n pairs of different images, (), from their L2-normalised embeddings, (n, d_e)."""
        rows, logits = torch.arange(len(I_e), device=I_e.device), logit_scale.exp() * I_e @ T_e.T
        return self.rows_loss(logits, logits.T, self.rows_targets(rows, rows, I_e, T_e, logit_scale), bias) / len(I_e)


CLIP = Objective()  # the paper's
