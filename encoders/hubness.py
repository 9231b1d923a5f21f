"""Hubness: some pictures are near to most texts, and some texts to most pictures, whatever they show (Radovanović et al. 2010).

The loss cannot prevent it, as it compares pairs of the training data only. So a search takes off how near a picture is to a
bank of texts, captions of training pictures, as the inverted softmax does (Smith et al. 2017, arXiv:1702.03859) and query banks
do (Bogolin et al. 2022, arXiv:2112.12777). With cosines c, the model's scale s, and K texts in the bank:

    nearness(picture) = log(sum over the bank, without the nearest text, of exp(s c(bank text, picture)) / K) / s
    hubness(picture) = nearness(picture) - mean nearness of the bank's pictures
    score(text, picture) = c(text, picture) - SHARE * hubness(picture)

For SHARE = 1 this ranks pictures by the probability of the text given the picture; the plain cosine ranks them by that of the
picture given the text. Texts, for which there is a bank of pictures, are corrected in the same way.
"""

import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from config import HUBNESS_FILE
from utils.cache import cache_key, tensors_key
from utils.errors import UserError
from utils.files import atomic_write

BANK = 6000  # training pictures in a bank, at most
SHARE = 0.7  # of the hubness that is taken off
BLOCK = 1024  # embeddings that are compared with a bank at once


class Hubness:
    """The banks of a run, and how near embeddings are to them.

    pictures, texts: (K, d_e) embeddings of training pictures and captions, L2-normalised. scale: of the logits. levels: mean
    nearness of the bank's pictures to its texts, and the other way round; computed where they are not given.
    """

    def __init__(self, pictures, texts, scale, levels=None):
        self.pictures, self.texts, self.scale = pictures, texts, scale
        self.levels = levels or [self.nearness(a, b).mean().item() for a, b in ((pictures, texts), (texts, pictures))]

    @property
    def key(self):
        """A cache key of all that decides what is taken off."""
        return cache_key(tensors_key({"pictures": self.pictures, "texts": self.texts}), self.scale, self.levels, SHARE)

    def nearness(self, embeddings, bank):
        """(n, d_e) and (K, d_e) -> (n,): the logarithm of the sum of exp(scaled cosine), over K, divided by the scale.

        The nearest of the bank is left out of the sum: of a training picture it is mostly its own caption.
        """
        blocks = []
        for block in embeddings.split(BLOCK):
            logits = self.scale * block @ bank.T
            logits.scatter_(1, logits.argmax(dim=1, keepdim=True), -torch.inf)
            blocks.append(logits.logsumexp(dim=1))
        return (torch.cat(blocks) - math.log(len(bank))) / self.scale

    def of_pictures(self, I_e):
        """(n, d_e) embeddings of pictures -> (n,) what to take off their cosines with texts; its mean over the bank is 0."""
        return SHARE * (self.nearness(I_e, self.texts) - self.levels[0])

    def of_texts(self, T_e):
        """The same of texts: (m, d_e) -> (m,)."""
        return SHARE * (self.nearness(T_e, self.pictures) - self.levels[1])

    def save(self, run_dir):
        """Writes run_dir/hubness.safetensors."""
        numbers = torch.tensor([self.scale, *self.levels], dtype=torch.float64)
        tensors = {"pictures": self.pictures.half().contiguous(), "texts": self.texts.half().contiguous(), "numbers": numbers}
        contents = safetensors.torch.save(tensors)
        atomic_write(Path(run_dir) / HUBNESS_FILE, lambda path: path.write_bytes(contents))


class EnsembleHubness:
    """That of an ensemble: the mean of its models', which is 0 for one that has none.

    parts: a `Hubness` of each, or None; widths: d_e of each, as they lie side by side.
    """

    def __init__(self, parts, widths):
        self.parts, self.widths = parts, widths

    @property
    def key(self):
        return [part and part.key for part in self.parts]

    def of_pictures(self, I_e):
        """As of a `Hubness`."""
        return self.mean("of_pictures", I_e)

    def of_texts(self, T_e):
        """As of a `Hubness`."""
        return self.mean("of_texts", T_e)

    def mean(self, method, embeddings):
        total = torch.zeros(len(embeddings))
        for part, own in zip(self.parts, embeddings.split(self.widths, dim=1)):
            if part:
                total += getattr(part, method)(F.normalize(own, dim=1))
        return total / len(self.parts)


def load_hubness(run_dir):
    """The `Hubness` of a run folder; None for a run that has none. Raises UserError where it is damaged."""
    path = Path(run_dir) / HUBNESS_FILE
    try:
        tensors = safetensors.torch.load_file(path)
        scale, *levels = tensors["numbers"].tolist()
        return Hubness(tensors["pictures"].float(), tensors["texts"].float(), scale, levels)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, OSError, RuntimeError) as error:
        reason = type(error).__name__
        raise UserError(
            f"{path}: damaged or unreadable ({reason}); write it again with python main.py --resume --run-dir {run_dir}"
        ) from None
