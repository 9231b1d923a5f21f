"""How embeddings lie on the sphere: alignment and uniformity (Wang and Isola 2020)."""

import torch


def alignment(I_e, T_e):
    """The mean squared distance of n pairs' L2-normalised embeddings, (n, d_e) each: 0 where each pair coincides."""
    return (I_e - T_e).square().sum(dim=1).mean().item()


def uniformity(embeddings):
    """The log of the mean of exp(-2 ||x - y||²) over all pairs of n L2-normalised embeddings, (n, d_e): lower is more uniform.

    0 where all embeddings are the same.
    """
    return torch.pdist(embeddings).square().mul(-2).exp().mean().log().item()
