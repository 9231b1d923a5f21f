"""The gradient of a large batch in the memory of a small one (gradient caching; Gao et al. 2021, arXiv:2101.06983).

The contrastive loss needs all embeddings of a batch at once, but the encoders need not run on all pairs at once: the
gradient with respect to the embeddings is backpropagated through one micro-batch after another.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from training import distributed
from training.losses import CLIP
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


class Embedder(nn.Module):
    """A model's encoders and heads without its temperature: what `distributed.data_parallel` wraps."""

    def __init__(self, model):
        super().__init__()
        self.encoders = nn.ModuleList([model.image_encoder, model.text_encoder])
        self.image_projection, self.text_projection = model.image_projection, model.text_projection
        self.features = model.features

    def forward(self, batch):
        """A micro-batch of m images, k captions each -> L2-normalised (I_e, T_e), (m, d_e) and (k m, d_e)."""
        I_f, T_f = self.features(batch)
        I_e, T_e = self.image_projection(I_f), self.text_projection(T_f)
        return F.normalize(I_e.float(), dim=1), F.normalize(T_e.float(), dim=1)


def embed(embedder, batch, device, dtype, seed):
    """What `Embedder` makes of a batch. seed: of dropout."""
    torch.manual_seed(seed)
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    with autocast(device, dtype):
        return embedder(batch)


def loss_and_gradients(I_e, T_e, ids, model, objective, rows, scaler):
    """The loss of the n images of all ranks, and the gradients of this rank's embeddings.

    I_e, T_e, ids: this rank's, (m, d_e), (k m, d_e) and (m,); the gradients are like the first two. objective: with the default
    it is `clip.loss_over_captions`. For each of the k captions, a rank computes its own rows of the (n, n) logits, `rows` at a
    time. Adds the rank's part to the .grad of the model's logit_scale and logit_bias.
    """
    num_local, k = len(I_e), len(T_e) // len(I_e)
    start = sum(distributed.gather_counts(num_local)[: distributed.rank()])
    I_e, T_e = (distributed.all_gather(embeddings).requires_grad_() for embeddings in (I_e, T_e))
    ids, scale = distributed.all_gather(ids), model.logit_scale
    n, total = len(I_e), torch.zeros((), device=I_e.device)
    for row in torch.arange(start, start + num_local, device=I_e.device).split(rows):
        for T_k in T_e.unflatten(0, (n, k)).unbind(1):  # (n, d_e)
            targets = objective.rows_targets(row, ids, I_e, T_k, scale)
            logits_i, logits_t = scale.exp() * I_e[row] @ T_k.T, scale.exp() * T_k[row] @ I_e.T
            loss = objective.rows_loss(logits_i, logits_t, targets, model.logit_bias) / (n * k)
            scaler.scale(loss).backward()
            total = total + loss.detach()
    gradient_i = distributed.all_reduce_sum(I_e.grad)[start : start + num_local]
    gradient_t = distributed.all_reduce_sum(T_e.grad)[k * start : k * (start + num_local)]
    return distributed.all_reduce_sum(total), gradient_i, gradient_t


def backward(model, embedder, batches, seeds, device, dtype, scaler, objective=CLIP):
    """Adds the gradient of one batch, of all ranks, to the model's .grad and returns the loss, ().

    embedder: the model's `Embedder`, or its `distributed.data_parallel`. batches: an iterator over this rank's micro-batches,
    each a dict of `dataset.collate`. Unless there is only one, all are given twice: for a forward pass without gradients, and
    for one with. seeds: of dropout, one per micro-batch, so that both passes draw the same masks. BatchNorm layers in training
    mode normalise each micro-batch with its own statistics in both passes, and update their running statistics once.
    """
    embedded, ids, once = [], [], len(seeds) == 1
    with contextlib.ExitStack() as stack:
        if not once:
            stack.enter_context(torch.no_grad())
            stack.enter_context(frozen_batch_norm_statistics(model))
        for seed, batch in zip(seeds, batches):
            embedded.append(embed(embedder, batch, device, dtype, seed))
            ids.append(batch["image_id"])
    sizes, rows = [len(I_e) for I_e, _ in embedded], max(len(I_e) for I_e, _ in embedded)
    I_e, T_e = (torch.cat(embeddings).detach() for embeddings in zip(*embedded))
    ids, k = torch.cat(ids).to(I_e.device), len(T_e) // len(I_e)
    loss, *gradients = loss_and_gradients(I_e, T_e, ids, model, objective, rows, scaler)
    distributed.all_reduce_gradients([model.logit_scale, model.logit_bias])
    # data_parallel takes the mean over the ranks; the gradient is the sum.
    gradient_i, gradient_t = (gradient * distributed.size() for gradient in gradients)
    if once:
        torch.autograd.backward(embedded[0], [gradient_i, gradient_t])
        return loss
    parts = zip(seeds, gradient_i.split(sizes), gradient_t.split([k * m for m in sizes]))
    for number, (seed, *part_gradients) in enumerate(parts, start=1):
        last = number == len(seeds)
        with contextlib.nullcontext() if last else distributed.gradients_stay_here(embedder):
            torch.autograd.backward(embed(embedder, next(batches), device, dtype, seed), part_gradients)
    return loss
