"""Whether a picture matches a text at all: the relevance floor and match probability of a run.

Cosines of different texts do not compare: some texts are near all pictures. So a text's cosines are corrected by the mean and
the spread of its cosines with fixed reference pictures, which are kept with the run. How much each of the three counts, and
the rest, `evaluation.relevance` learns from validation pairs.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from config import HUBNESS_FILE, run_names
from utils.cache import KEPT, cache_key, file_stats, write_array
from utils.errors import UserError
from utils.files import write_json

JSON_FILE, REFERENCES_FILE = "relevance.json", "references.npy"  # in a run folder
MIN_IMAGES = 200  # from which it is learned: with 24, the floor hid nearly all right pictures
MAX_PROBABILITY = 0.999  # so that no picture is "100.0%" a match: all pairs with a high score were right, but they were few


@dataclass
class Relevance:
    """What `search.queries.judge` needs to say which pictures match, all learned from validation pairs."""

    references: np.ndarray  # (K, d_e + 1) vectors of the reference pictures; (K, d_e) of a run of an earlier version
    weights: list  # of a picture's cosine, and of the two `reference_statistics`
    shares: list  # of the wrong pairs that are above a floor, falling
    floors: list  # these floors, rising
    right_above_floor: list  # shares of the right pairs that are above these floors
    scores: list  # corrected scores, rising, and
    probabilities: list  # the share of pairs with such a score that were right

    def corrected_scores(self, scores, embedding):
        """Scores of a text, whose query is (d_e + 1,), with pictures -> scores that compare between texts."""
        cosine_weight, mean_weight, spread_weight = self.weights
        mean, spread = reference_statistics(self.references @ embedding[: self.references.shape[1]])
        return cosine_weight * np.asarray(scores) + mean_weight * mean + spread_weight * spread

    def floor(self, wrong_share):
        """The score that this share of wrong pictures exceeds; 0: no floor."""
        if wrong_share == 0:
            return -np.inf
        return float(np.interp(-np.log(wrong_share), -np.log(self.shares), self.floors))

    def probability(self, scores):
        """Match probabilities of corrected scores."""
        return np.minimum(np.interp(scores, self.scores, self.probabilities, left=0), MAX_PROBABILITY)

    def save(self, folder):
        """Writes it into a folder."""
        write_array(Path(folder) / REFERENCES_FILE, self.references.astype(np.float16))
        write_json(Path(folder) / JSON_FILE, {name: value for name, value in asdict(self).items() if name != "references"})


def reference_statistics(cosines):
    """(mean, spread) of a text's cosines with the K references, (..., K).

    The spread is the median minus the 16th percentile. The standard deviation also grows with the number of pictures that
    match, so texts of common things would get too low scores.
    """
    low, median = np.quantile(cosines, (0.16, 0.5), axis=-1)
    return cosines.mean(axis=-1), median - low


def relevance_folder(run, cache_dir, views=1):
    """Where the `Relevance` of a run is kept: in its folder or, for several views, an ensemble or a name, in the cache."""
    names = run_names(run)
    if views == 1 and len(names) == 1:
        return Path(run) if Path(run).is_dir() else Path(cache_dir) / f"{KEPT}{cache_key(str(run))}"
    stats = file_stats(Path(name) / file for name in names for file in ("model.safetensors", HUBNESS_FILE))
    return Path(cache_dir) / f"{KEPT}{cache_key(stats, views)}"


def load_relevance(folder):
    """The `Relevance` in a folder; None if there is none, or one that an earlier version learned from fewer than MIN_IMAGES.

    Raises UserError where it is damaged.
    """
    path = Path(folder) / JSON_FILE
    if not path.exists():
        return None
    try:
        references = np.load(Path(folder) / REFERENCES_FILE).astype(np.float32)
        relevance = Relevance(references, **json.loads(path.read_text(encoding="utf-8")))
        return relevance if len(references) >= MIN_IMAGES else None
    except (OSError, ValueError, TypeError, EOFError) as error:
        message = f"{path}: damaged or of another version ({error}); write it again with python evaluate.py calibrate"
        raise UserError(message) from None
