"""Occlusion maps: which parts of a picture match a text? (Zeiler and Fergus 2014)

A square of the picture's mean colour covers one part after another. Where the cosine drops most, the picture matches the text.
"""

import numpy as np
import torch

from embedding import project_and_normalize
from utils.device import autocast
from utils.images import center_crop, read_image
from utils.plots import overlay

STEPS = 8  # positions of the square per row, and per column
SQUARE = 0.25  # side of the square, as a share of the picture's side


@torch.no_grad()
def occlusion_map(model, picture, embedding, device, dtype):
    """How much each pixel of a picture contributes to its cosine with an embedding: (size, size), 0 to 1.

    picture: (size, size, 3) uint8, of the image encoder's input size. embedding: (d_e,), L2-normalised.
    A pixel's value is the mean drop of the cosine over the squares that cover it, divided by the largest such drop; it is 0
    where the cosine rises instead.
    """
    model.eval()
    size = len(picture)
    side = max(1, round(SQUARE * size))
    starts = np.linspace(0, size - side, STEPS).round().astype(int)
    squares = [(slice(top, top + side), slice(left, left + side)) for top in starts for left in starts]
    pictures = np.repeat(picture[None], len(squares) + 1, axis=0)
    for occluded, square in zip(pictures, squares):  # the last picture stays unchanged
        occluded[square] = picture.mean(axis=(0, 1))
    image = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
    with autocast(device, dtype):
        I_f = model.image_features(image).float()
    cosines = project_and_normalize(model.image_projection, I_f, device).numpy() @ embedding
    drops, counts = np.zeros((size, size)), np.zeros((size, size))
    for square, cosine in zip(squares, cosines[:-1]):
        drops[square] += cosines[-1] - cosine
        counts[square] += 1
    heat = (drops / counts).clip(min=0)
    return heat / max(heat.max(), 1e-9)


def heat_map(searcher, embedding, path, pixels):
    """The centre crop of a picture file, (pixels, pixels, 3) uint8, with a heat map over it.

    searcher: a `search.searcher.Searcher`. embedding: of the query, (d_e + 1,).
    """
    model, device, dtype = searcher.opened
    size = model.image_encoder.size
    picture = center_crop(read_image(path, size, model.image_encoder.resize), size)
    heat = occlusion_map(model, picture, embedding[:-1], device, dtype)
    return overlay(center_crop(read_image(path, pixels), pixels), heat)
