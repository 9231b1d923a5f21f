"""Hubness: some pictures are near to most texts, and some texts to most pictures, whatever they show (Radovanović et al. 2010).

A model learns of this nothing that it could use, as its loss compares pairs of the training data only. So a search takes off how
near a picture is to the texts of a bank, captions of training pictures, in the manner of the inverted softmax (Smith et al. 2017,
arXiv:1702.03859) and of query banks (Bogolin et al. 2022, arXiv:2112.12777): with cosines c and the model's scale s,

    score(text, picture) = c(text, picture) - SHARE * log(mean over the bank of exp(s c(bank text, picture))) / s

which for SHARE = 1 ranks pictures by the probability that they have this text, where the plain cosine ranks them by the
probability that the text has them. Texts, for which a bank of pictures is there, are corrected in the same way.
"""

import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from config import HUBNESS_FILE
from utils.errors import UserError
from utils.files import atomic_write

BANK = 6000  # training pictures in a bank, at most
SHARE = 0.7  # of the hubness that is taken off
BLOCK = 1024  # embeddings that are compared with a bank at once


class Hubness:
    """The banks of a run, and how near embeddings are to them.

    pictures, texts: (K, d_e) embeddings of training pictures and captions, L2-normalised. scale: of the logits.
    """

    def __init__(self, pictures, texts, scale):
        self.pictures, self.texts, self.scale = pictures, texts, scale
        self.levels = self.nearness(pictures, texts).mean(), self.nearness(texts, pictures).mean()

    def nearness(self, embeddings, bank):
        """(n, d_e) and (K, d_e) -> (n,): the log-mean-exp of their scaled cosines, divided by the scale."""
        blocks = [(self.scale * block @ bank.T).logsumexp(dim=1) for block in embeddings.split(BLOCK)]
        return (torch.cat(blocks) - math.log(len(bank))) / self.scale

    def of_pictures(self, I_e):
        """(n, d_e) embeddings of pictures -> (n,) what to take off their cosines with texts; 0 is that of a usual picture."""
        return SHARE * (self.nearness(I_e, self.texts) - self.levels[0])

    def of_texts(self, T_e):
        """The same of texts: (m, d_e) -> (m,)."""
        return SHARE * (self.nearness(T_e, self.pictures) - self.levels[1])

    def save(self, run_dir):
        tensors = {"pictures": self.pictures.half(), "texts": self.texts.half(), "scale": torch.tensor(self.scale)}
        contents = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        atomic_write(Path(run_dir) / HUBNESS_FILE, lambda path: path.write_bytes(contents))


class EnsembleHubness:
    """That of an ensemble: the mean of its models'. parts: a `Hubness` of each; widths: d_e of each, as they lie side by side."""

    def __init__(self, parts, widths):
        self.parts, self.widths = parts, widths

    def of_pictures(self, I_e):
        return self.mean("of_pictures", I_e)

    def of_texts(self, T_e):
        return self.mean("of_texts", T_e)

    def mean(self, method, embeddings):
        own = [F.normalize(part, dim=1) for part in embeddings.split(self.widths, dim=1)]
        return torch.stack([getattr(hubness, method)(part) for hubness, part in zip(self.parts, own)]).mean(dim=0)


def load_hubness(run_dir):
    """The `Hubness` of a run folder; None for a run that has none. Raises UserError where it is damaged."""
    path = Path(run_dir) / HUBNESS_FILE
    if not path.exists():
        return None
    try:
        tensors = safetensors.torch.load_file(path)
        return Hubness(tensors["pictures"].float(), tensors["texts"].float(), tensors["scale"].item())
    except (SafetensorError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); delete it, or train the run again") from None
