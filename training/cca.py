"""Canonical correlation analysis (CCA): the linear maps under which paired features correlate most, in closed form.

Heads on frozen encoders that start from these maps retrieve well before the first step, and learn on from there.
"""

import torch

IMAGE_RIDGE, TEXT_RIDGE = 1.0, 0.3  # added to the variance of each feature: fewer images than captions, so more


@torch.no_grad()
def start_from_cca(model, I_f, T_f, image_of_text):
    """Sets the linear maps of a CLIPModel's heads to those of CCA, for features of the training pairs that heads standardise.

    I_f: (n, d_i). T_f: (m, d_t). image_of_text: (m,) each caption's image. The maps are as long as random weights would be, so
    that a learning rate means the same. Where d_e is larger than d_i or d_t, rows that are left stay random in one head, and
    become 0 in the other: they change nothing at first.
    """
    image_head, text_head = model.image_projection, model.text_projection
    W_i, W_t = image_head.projection.weight, text_head.projection.weight  # (d_e, d_i), (d_e, d_t)
    W_i.zero_()
    maps = canonical_maps(standardized(image_head, I_f), standardized(text_head, T_f), image_of_text, len(W_i))
    for W, found in zip((W_i, W_t), maps):
        length = (len(W) / 3) ** 0.5  # of random weights, uniform in +-1 / sqrt(d)
        W[: found.shape[1]] = (found * length / found.norm()).T.to(W)


def standardized(head, features):
    return (features - head.mean.cpu()) / head.std.cpu()


def canonical_maps(X, Y, row_of_y, dim, ridges=(IMAGE_RIDGE, TEXT_RIDGE)):
    """Maps A and B under which the features of pairs correlate most.

    X: (n, d_x) and Y: (m, d_y), centred features, of variances around 1. row_of_y: (m,) the row of X that each row of Y belongs
    to. dim: directions, at most min(d_x, d_y) are found. ridges: what is added to the variances of X and Y.

    Returns A, (d_x, dim), and B, (d_y, dim), each direction multiplied by its correlation: cosines of X A and Y B then weight
    directions as in Gong et al. 2014 (arXiv:1212.4522), section 3.2, with p = 1.
    """
    C_x, C_y = (Z.T.double() @ Z.double() / len(Z) for Z in (X, Y))
    C_xy = X[row_of_y].T.double() @ Y.double() / len(Y)
    whiten_x, whiten_y = (inverse_root(C, ridge) for C, ridge in zip((C_x, C_y), ridges))
    U, correlations, V = torch.linalg.svd(whiten_x @ C_xy @ whiten_y, full_matrices=False)
    return whiten_x @ U[:, :dim] * correlations[:dim], whiten_y @ V.T[:, :dim] * correlations[:dim]


def inverse_root(C, ridge):
    """(C + ridge I)^(-1/2) of a symmetric matrix (d, d)."""
    values, vectors = torch.linalg.eigh(C)
    return vectors / (values + ridge).sqrt() @ vectors.T
