"""The gradient of a large batch in the memory of a small one (gradient caching; Gao et al. 2021, arXiv:2101.06983).

The contrastive loss needs all embeddings of a batch at once, but the towers need not run at once: their gradient is that of
the embeddings, carried on through one micro-batch after another.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from device import autocast


@contextlib.contextmanager
def still_statistics(model):
    """In here BatchNorm layers normalise as they did, but leave their running statistics alone."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum


def embed(model, batch, device, dtype, seed):
    """A micro-batch of m pairs -> its embeddings (I_e, T_e) of length 1, (m, d_e) each. seed: of dropout."""
    torch.manual_seed(seed)
    image, text, mask = (None if value is None else value.to(device, non_blocking=True) for value in batch.values())
    with autocast(device, dtype):
        I_e, T_e = model.encode_image(image), model.encode_text(text, mask)
    return F.normalize(I_e.float(), dim=1), F.normalize(T_e.float(), dim=1)


def backward_in_rows(I_e, T_e, logit_scale, rows, scaler):
    """`clip.contrastive_loss` of n pairs, and its gradients in .grad, from `rows` rows of the (n, n) logits at a time."""
    n, total = len(I_e), 0.0
    labels = torch.arange(n, device=I_e.device)
    for row in labels.split(rows):
        loss_i = F.cross_entropy(logit_scale.exp() * I_e[row] @ T_e.T, row, reduction="sum")
        loss_t = F.cross_entropy(logit_scale.exp() * T_e[row] @ I_e.T, row, reduction="sum")
        loss = (loss_i + loss_t) / (2 * n)
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def backward(model, batches, count, device, dtype, scaler):
    """Adds the gradient of one batch to the model's .grad and returns the loss, ().

    batches: an iterator that gives the batch's `count` micro-batches, each a dict of `dataset.collate`, and then the same
    again. Both passes draw the same dropout masks. A BatchNorm that is in training mode normalises with the statistics of
    each micro-batch, in both passes alike, and counts them once.
    """
    seeds = torch.randint(2**31, (count,)).tolist()
    with torch.no_grad(), still_statistics(model):
        embedded = [embed(model, next(batches), device, dtype, seed) for seed in seeds]
    rows = len(embedded[0][0])
    I_e, T_e = (torch.cat(embeddings).requires_grad_() for embeddings in zip(*embedded))  # (n, d_e)
    loss = backward_in_rows(I_e, T_e, model.logit_scale, rows, scaler)
    for seed, *gradients in zip(seeds, I_e.grad.split(rows), T_e.grad.split(rows)):
        torch.autograd.backward(embed(model, next(batches), device, dtype, seed), gradients)
    return loss
