"""The gradient of a large batch in the memory of a small one (gradient caching; Gao et al. 2021, arXiv:2101.06983).

The contrastive loss needs all embeddings of a batch at once, but the encoders need not run on all pairs at once: the
gradient with respect to the embeddings is backpropagated through one micro-batch after another.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from training import distributed
from utils.device import autocast


@contextlib.contextmanager
def frozen_batch_norm_statistics(model):
    """A context in which BatchNorm layers do not update their running statistics; they normalise as before."""
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
    """A micro-batch of m images, k captions each -> L2-normalised (I_e, T_e), (m, d_e) and (k m, d_e). seed: of dropout."""
    torch.manual_seed(seed)
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    with autocast(device, dtype):
        I_f, T_f = model.features(batch)
        I_e, T_e = model.image_projection(I_f), model.text_projection(T_f)
    return F.normalize(I_e.float(), dim=1), F.normalize(T_e.float(), dim=1)


def loss_and_gradients(I_e, T_e, logit_scale, rows, scaler):
    """`clip.loss_over_captions` of the n images of all ranks, and the gradients of this rank's embeddings.

    I_e, T_e: this rank's, (m, d_e) and (k m, d_e), like the gradients. For each of the k captions, a rank computes its own
    rows of the (n, n) logits, `rows` at a time. Adds the rank's part to logit_scale.grad.
    """
    num_local, k = len(I_e), len(T_e) // len(I_e)
    start = sum(distributed.gather_counts(num_local)[: distributed.rank()])
    I_e, T_e = (distributed.all_gather(embeddings).requires_grad_() for embeddings in (I_e, T_e))
    n, total = len(I_e), torch.zeros((), device=I_e.device)
    for row in torch.arange(start, start + num_local, device=I_e.device).split(rows):
        for T_k in T_e.unflatten(0, (n, k)).unbind(1):  # (n, d_e)
            loss_i = F.cross_entropy(logit_scale.exp() * I_e[row] @ T_k.T, row, reduction="sum")
            loss_t = F.cross_entropy(logit_scale.exp() * T_k[row] @ I_e.T, row, reduction="sum")
            loss = (loss_i + loss_t) / (2 * n * k)
            scaler.scale(loss).backward()
            total = total + loss.detach()
    gradient_i = distributed.all_reduce_sum(I_e.grad)[start : start + num_local]
    gradient_t = distributed.all_reduce_sum(T_e.grad)[k * start : k * (start + num_local)]
    return distributed.all_reduce_sum(total), gradient_i, gradient_t


def backward(model, batches, seeds, device, dtype, scaler):
    """Adds the gradient of one batch to the model's .grad and returns the loss, ().

    batches: an iterator over this rank's micro-batches, each a dict of `dataset.collate`. Unless there is only one, all are
    given twice: for a forward pass without gradients, and for one with. seeds: of dropout, one per micro-batch, so that both
    passes draw the same masks. BatchNorm layers in training mode normalise each micro-batch with its own statistics in both
    passes, and update their running statistics once.
    """
    if len(seeds) == 1:
        embedded = [embed(model, next(batches), device, dtype, seeds[0])]
    else:
        with torch.no_grad(), frozen_batch_norm_statistics(model):
            embedded = [embed(model, next(batches), device, dtype, seed) for seed in seeds]
    rows = max(len(I_e) for I_e, _ in embedded)
    I_e, T_e = (torch.cat(embeddings).detach() for embeddings in zip(*embedded))
    loss, gradient_i, gradient_t = loss_and_gradients(I_e, T_e, model.logit_scale, rows, scaler)
    if len(seeds) == 1:
        torch.autograd.backward(embedded[0], [gradient_i, gradient_t])
    else:
        k = len(T_e) // len(I_e)
        for seed, *gradients in zip(seeds, gradient_i.split(rows), gradient_t.split(k * rows)):
            torch.autograd.backward(embed(model, next(batches), device, dtype, seed), gradients)
    return loss
