"""Canonical correlation analysis (CCA): the linear maps under which paired features correlate most, in closed form.

Linear heads on frozen encoders that start from these maps retrieve well before the first step, and learn on from there.
"""

import torch

RIDGES = 1.0, 0.3  # added to the variances of image and text features; more for images, as there are fewer of them
BLOCK = 4096  # rows that are in double precision at once
SMALL = 0.01  # what rows of the text head without a direction are multiplied by


@torch.no_grad()
def start_from_cca(model, I_f, T_f, image_of_text):
    """Sets the linear maps of a CLIPModel's heads to those of CCA, after `ProjectionHead.standardize`.

    I_f: (n, d_i) and T_f: (m, d_t), features of the training pairs. image_of_text: (m,) each caption's image. The maps are
    scaled to the norm of random weights, so that a learning rate means the same. CCA finds at most as many directions as there
    are features or images; rows of the heads that are left become 0 in the image head and stay random, but small, in the text
    head: at first they hardly change a cosine, and they can learn. The residual of two-layer heads stays random. Where nothing
    correlates, as all pictures or all captions are alike, the heads stay as they are, which is printed.
    """
    image_head, text_head = model.image_projection, model.text_projection
    W_i, W_t = image_head.projection.weight, text_head.projection.weight  # (d_e, d_i), (d_e, d_t)
    maps = canonical_maps(standardized(image_head, I_f), standardized(text_head, T_f), image_of_text, len(W_i))
    if not maps[0].shape[1]:
        return print("--head-init cca: nothing correlates, as all pictures or all captions are alike; the heads start random")
    W_i.zero_()
    W_t.mul_(SMALL)
    if image_head.projection.bias is not None:  # standardised features have mean 0
        image_head.projection.bias.zero_()
    for W, found in zip((W_i, W_t), maps):
        norm = (len(W) / 3) ** 0.5  # of random weights, uniform in +-1 / sqrt(d)
        W[: found.shape[1]] = (found * norm / found.norm()).T.to(W)


def standardized(head, features):
    return (features - head.mean.cpu()) / head.std.cpu()


def canonical_maps(X, Y, row_of_y, dim, ridges=RIDGES):
    """Maps A and B under which the features of pairs correlate most.

    X: (n, d_x) and Y: (m, d_y), features with mean 0 and variances around 1. row_of_y: (m,) the row of X that each row of Y
    belongs to. dim: how many directions, at most; those without correlation are left out. ridges: what is added to the
    variances of X and Y.

    Returns A, (d_x, k), and B, (d_y, k), of k <= dim directions, each multiplied by its correlation: cosines of X A and Y B
    then weight directions as in Gong et al. 2014 (arXiv:1212.4522), section 3.2, with p = 1.
    """
    sums = torch.zeros(len(X), Y.shape[1], dtype=torch.double).index_add_(0, row_of_y, Y.double())  # of each row's partners
    C_xy = product(X, sums) / len(Y)
    counts = torch.bincount(row_of_y, minlength=len(X)) * len(X) / len(Y)  # a row of X counts once for each of its pairs
    C_x, C_y = product(X, X * counts[:, None]) / len(X), product(Y, Y) / len(Y)
    whiten_x, whiten_y = inverse_root(C_x, ridges[0]), inverse_root(C_y, ridges[1])
    U, correlations, V = torch.linalg.svd(whiten_x @ C_xy @ whiten_y, full_matrices=False)
    found = min(dim, int((correlations > 1e-6).sum()))
    return whiten_x @ U[:, :found] * correlations[:found], whiten_y @ V.T[:, :found] * correlations[:found]


def product(X, Y):
    """X.T @ Y in double precision, (d_x, d_y)."""
    return sum(x.T.double() @ y.double() for x, y in zip(X.split(BLOCK), Y.split(BLOCK)))


def inverse_root(C, ridge):
    """(C + ridge I)^(-1/2) of a symmetric matrix (d, d)."""
    values, vectors = torch.linalg.eigh(C)
    return vectors / (values + ridge).sqrt() @ vectors.T
