"""Which parts of a picture answer a text: the score's fall as a grey square moves over it (Zeiler and Fergus 2014)."""

import numpy as np
import torch

from device import autocast
from embedding import project

STEPS = 8  # places of the square in a row, and in a column
SQUARE = 0.25  # its side, as a share of the picture's


@torch.no_grad()
def occlusion_map(model, picture, embedding, device, dtype):
    """How much each part of a picture speaks for an embedding, (size, size), 0 to 1.

    picture: (size, size, 3) uint8, as the image tower takes it. embedding: (d_e,) of length 1.
    A pixel's value is the mean fall of the cosine over the squares that cover it; what does not speak for it is 0.
    """
    model.eval()
    size = len(picture)
    side = max(1, round(SQUARE * size))
    starts = np.linspace(0, size - side, STEPS).round().astype(int)
    places = [(slice(top, top + side), slice(left, left + side)) for top in starts for left in starts]
    pictures = np.repeat(picture[None], len(places) + 1, axis=0)
    for covered, place in zip(pictures, places):  # the last one stays as it is
        covered[place] = picture.mean(axis=(0, 1))
    image = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
    with autocast(device, dtype):
        I_f = model.image_features(image).float()
    cosines = (project(model.image_projection, I_f, device) @ embedding).numpy()
    falls, counts = np.zeros((size, size)), np.zeros((size, size))
    for place, cosine in zip(places, cosines[:-1]):
        falls[place] += cosines[-1] - cosine
        counts[place] += 1
    heat = (falls / counts).clip(min=0)
    return heat / max(heat.max(), 1e-9)
