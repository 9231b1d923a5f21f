"""The gradient of a large batch in the memory of a small one (gradient caching; Gao et al. 2021, arXiv:2101.06983).

The contrastive loss needs all embeddings of a batch at once, but the towers need not run at once: their gradient is that of
the embeddings, carried on through one micro-batch after another.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

import distributed
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
    """A micro-batch of m images, k captions each -> (I_e, T_e) of length 1, (m, d_e) and (k m, d_e). seed: of dropout."""
    torch.manual_seed(seed)
    image, text, mask = (None if value is None else value.to(device, non_blocking=True) for value in batch.values())
    with autocast(device, dtype):
        I_e, T_e = model.encode_image(image), model.encode_text(text, mask)
    return F.normalize(I_e.float(), dim=1), F.normalize(T_e.float(), dim=1)


def loss_and_gradients(I_e, T_e, logit_scale, rows, scaler):
    """`clip.loss_over_captions` of the n images of all ranks, and the gradients of this rank's embeddings.

    I_e, T_e: this rank's, (m, d_e) and (k m, d_e), and so the gradients. Each rank has its own rows of the (n, n) logits of
    each of the k rounds, `rows` at a time. Adds its share to logit_scale.grad.
    """
    own, k = len(I_e), len(T_e) // len(I_e)
    start = sum(distributed.counts(own)[: distributed.rank()])
    I_e, T_e = (distributed.gather(embeddings).requires_grad_() for embeddings in (I_e, T_e))
    n, total = len(I_e), torch.zeros((), device=I_e.device)
    for row in torch.arange(start, start + own, device=I_e.device).split(rows):
        for T_k in T_e.unflatten(0, (n, k)).unbind(1):  # (n, d_e)
            loss_i = F.cross_entropy(logit_scale.exp() * I_e[row] @ T_k.T, row, reduction="sum")
            loss_t = F.cross_entropy(logit_scale.exp() * T_k[row] @ I_e.T, row, reduction="sum")
            loss = (loss_i + loss_t) / (2 * n * k)
            scaler.scale(loss).backward()
            total = total + loss.detach()
    gradient_i = distributed.summed(I_e.grad)[start : start + own]
    gradient_t = distributed.summed(T_e.grad)[k * start : k * (start + own)]
    return distributed.summed(total), gradient_i, gradient_t


def backward(model, batches, seeds, device, dtype, scaler):
    """Adds the gradient of one batch to the model's .grad and returns the loss, ().

    batches: an iterator that gives this rank's micro-batches of the batch, each a dict of `dataset.collate`, and then the same
    again, unless there is only one. seeds: of the dropout of each. Both passes draw the same dropout masks. A BatchNorm that is
    in training mode normalises with the statistics of each micro-batch, in both passes alike, and counts them once.
    """
    if len(seeds) == 1:
        embedded = [embed(model, next(batches), device, dtype, seeds[0])]
    else:
        with torch.no_grad(), still_statistics(model):
            embedded = [embed(model, next(batches), device, dtype, seed) for seed in seeds]
    rows = max(len(I_e) for I_e, _ in embedded)
    I_e, T_e = (torch.cat(embeddings).detach() for embeddings in zip(*embedded))
    loss, gradient_i, gradient_t = loss_and_gradients(I_e, T_e, model.logit_scale, rows, scaler)
    if len(seeds) == 1:
        torch.autograd.backward(embedded[0], [gradient_i, gradient_t])
    else:
        k = len(T_e) // len(I_e)
        for seed, *parts in zip(seeds, gradient_i.split(rows), gradient_t.split(k * rows)):
            torch.autograd.backward(embed(model, next(batches), device, dtype, seed), parts)
    return loss
