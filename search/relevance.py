"""How probably a picture matches a text, by what a run learned from captions: its relevance.

Cosines of different texts do not compare: some texts are near all pictures. Nor do they say whether a thing is there at all:
the best picture for a thing that no picture shows scores as high as a right one. So a text's cosines are corrected by the mean
and the spread of its cosines with reference pictures, and by how often captions say its words: what they never say is hardly
ever there. How much each counts, and the rest, `evaluation.relevance` learns from validation images and their captions.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import HUBNESS_FILE, run_names
from utils.cache import KEPT, cache_key, file_stats, write_array
from utils.errors import UserError
from utils.files import write_json
from utils.words import content_words

JSON_FILE, PICTURES_FILE, WORDS_FILE = "relevance.json", "references.npy", "reference-words.npy"  # in a run folder
MIN_IMAGES = 200  # from which it is learned: with 24, nearly all right pictures were called wrong
MAX_PROBABILITY = 0.999  # so that no picture is "100.0%" a match: all pairs with a high score were right, but they were few
NEAR = (
    0.85  # cosine from which two words mean nearly the same: canine and dog 0.92, kitten and cat 0.88, elephant and animal 0.69
)
RARE = 1e-4  # share that is added before logarithms: half a caption of 5,000
LIKELY = 0.5  # match probability from which a picture is called likely
NUM_JUDGED = 9  # best pictures that say whether anything here matches
NOTHING = 0.04  # mean match probability of these; below, probably none does. Chosen on Flickr8k


@dataclass
class References:
    """What a text is compared with, so that scores of different texts compare.

    To learn or to measure, it must not be of the pictures that are searched.
    """

    pictures: np.ndarray  # (K, d_e + 1) vectors
    word_embeddings: np.ndarray  # (L, d_e), L2-normalised
    shares: dict  # {word: share of the captions that say it}, of these L words, in their order

    def statistics(self, texts, T_q, embed):
        """m texts and their queries, (m, d_e + 1) -> (m, 4), what scores are corrected by.

        They are the mean and the spread of the scores with the pictures, and the mean log share and log number of the text's
        words. The spread is the median minus the 16th percentile. The standard deviation also grows with the number of pictures
        that match, so texts of common things would get too low scores. embed(words): their (words, d_e) embeddings.
        """
        scores = T_q @ self.pictures.T
        low, median = np.quantile(scores, (0.16, 0.5), axis=1)
        words = [sorted(content_words(text)) for text in texts]
        log_share = self.log_shares({word for of_text in words for word in of_text}, embed)
        familiarity = [np.mean([log_share[word] for word in of_text] or [0.0]) for of_text in words]
        lengths = [np.log(max(1, len(of_text))) for of_text in words]
        return np.stack([scores.mean(axis=1), median - low, familiarity, lengths], axis=1)

    def log_shares(self, words, embed):
        """{word: log share of the captions that say it}; an unknown word has that of one that means nearly the same."""
        names = list(self.shares)
        unknown = sorted(words - set(names))
        shares = {word: self.shares[word] for word in words if word in self.shares}
        if unknown and names:
            cosines = embed(unknown) @ self.word_embeddings.T
            for word, row in zip(unknown, cosines):
                shares[word] = self.shares[names[row.argmax()]] if row.max() >= NEAR else 0
        return {word: np.log(shares.get(word, 0) + RARE) for word in words}


@dataclass
class Relevance:
    """What `search.queries.judge` needs to say how probably a picture matches, all learned from validation pairs."""

    references: References
    weights: list  # of a picture's score, and of the four `References.statistics` of the text
    shares: list  # of the wrong pairs that are above a floor, falling
    floors: list  # these floors, rising
    right_above_floor: list  # shares of the right pairs that are above these floors
    scores: list  # corrected scores, rising, and
    probabilities: list  # the share of pairs with such a score that were right

    def corrected_scores(self, scores, text, embedding, embed):
        """Scores of a text, whose query is (d_e + 1,), with pictures -> scores that compare between texts.

        embed: as for `References.statistics`.
        """
        statistics = self.references.statistics([text], embedding[None], embed)[0]
        return self.weights[0] * np.asarray(scores) + statistics @ self.weights[1:]

    def floor(self, wrong_share):
        """The corrected score that this share of wrong pictures exceeds; 0: no floor."""
        if wrong_share == 0:
            return -np.inf
        return float(np.interp(-np.log(wrong_share), -np.log(self.shares), self.floors))

    def probability(self, scores):
        """Match probabilities of corrected scores."""
        return np.minimum(np.interp(scores, self.scores, self.probabilities, left=0), MAX_PROBABILITY)

    def save(self, folder):
        """Writes it into a folder."""
        write_array(Path(folder) / PICTURES_FILE, self.references.pictures.astype(np.float16))
        write_array(Path(folder) / WORDS_FILE, self.references.word_embeddings.astype(np.float16))
        learned = {name: value for name, value in vars(self).items() if name != "references"}
        write_json(Path(folder) / JSON_FILE, learned | {"words": self.references.shares})


def relevance_folder(run, cache_dir, views=1):
    """Where the `Relevance` of a run is kept: in its folder or, for several views, an ensemble or a name, in the cache."""
    names = run_names(run)
    if views == 1 and len(names) == 1:
        return Path(run) if Path(run).is_dir() else Path(cache_dir) / f"{KEPT}{cache_key(str(run))}"
    stats = file_stats(Path(name) / file for name in names for file in ("model.safetensors", HUBNESS_FILE))
    return Path(cache_dir) / f"{KEPT}{cache_key(stats, views)}"


def load_relevance(folder):
    """The `Relevance` in a folder; None if there is none, or one of an earlier version.

    An earlier version learned it from whole captions, or from fewer than MIN_IMAGES: its probabilities are not true. Raises
    UserError where it is damaged.
    """
    path = Path(folder) / JSON_FILE
    if not path.exists() or not (Path(folder) / WORDS_FILE).exists():
        return None
    try:
        pictures, word_embeddings = (np.load(Path(folder) / name).astype(np.float32) for name in (PICTURES_FILE, WORDS_FILE))
        learned = json.loads(path.read_text(encoding="utf-8"))
        references = References(pictures, word_embeddings, learned.pop("words"))
        if len(word_embeddings) != len(references.shares):
            raise ValueError("its files do not belong together")
        return Relevance(references, **learned) if len(pictures) >= MIN_IMAGES else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, EOFError) as error:
        message = f"{path}: damaged or of another version ({error}); write it again with python evaluate.py calibrate"
        raise UserError(message) from None
