"""Learn how probably a picture matches a text, from captioned pictures: python evaluate.py calibrate --run RUN.

What is learned is tried on pictures that it was not learned from. So the images are halved: pictures of one half are searched
with spans of all captions, and a text's usual scores and the words that captions say come from the other half.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.spans import choose_spans, label_pairs
from search.options import WRONG_SHARE
from search.queries import as_queries
from search.relevance import MIN_IMAGES, NOTHING, NUM_JUDGED, References, Relevance, relevance_folder
from utils.errors import UserError
from utils.files import write_json
from utils.words import content_words

MAX_IMAGES = 1000  # that are searched, and kept as references
MAX_CAPTIONS = 5000  # of them
NUM_ASKED = 2500  # texts that the pictures are searched with
MIN_SAID = 2  # captions that have a word which is kept as a reference; the words of one are often misspelt
AT_ONCE = 256  # texts that are embedded
SHARES = 10.0 ** -np.arange(0.5, 5.01, 0.25)  # of wrong pairs, for which a floor is kept
MIN_PAIRS = 10  # right ones and wrong ones, in each half
MAX_WRONG = 200_000  # wrong pairs from which the weights are learned
COMMON = 0.01  # share of the pictures that are right for a text that is certainly there
NUM_BINS = 10  # of the reliability diagram and the calibration error


@dataclass
class Searches:
    """m texts that n pictures were searched with."""

    scores: np.ndarray  # (m, n)
    statistics: np.ndarray  # (m, 4), as `References.statistics` gives them
    right: np.ndarray  # (m, n) masks; a pair may be neither
    wrong: np.ndarray

    def corrected(self, weights):
        """Scores that compare between texts, (m, n). weights: as of `Relevance`."""
        return weights[0] * self.scores + (self.statistics @ weights[1:])[:, None]


def make_references(I_v, captions, embed):
    """`References` of pictures' vectors and of the words of captions. embed: as for `write_relevance`."""
    said = Counter(word for caption in captions for word in content_words(caption))
    words = sorted(word for word, count in said.items() if count >= MIN_SAID)
    return References(I_v, embed(words), {word: said[word] / len(captions) for word in words})


def fit_relevance(references, searches):
    """The `Relevance` that a list of `Searches` teaches, to go with `References`."""
    from sklearn.isotonic import IsotonicRegression  # only here: this import takes a second

    weights = fit_weights(searches)
    corrected = [part.corrected(weights) for part in searches]
    right, wrong = (np.concatenate([s[mask] for s, mask in zip(corrected, masks)])
                    for masks in ([part.right for part in searches], [part.wrong for part in searches]))  # fmt: skip
    shares = [share for share in SHARES if share * len(wrong) >= 1]
    floors = np.quantile(wrong, 1 - np.array(shares))
    near = wrong[wrong >= right.min()]  # below, the probability is 0
    pairs, found = np.concatenate([right, near]), np.repeat([1, 0], [len(right), len(near)])
    isotonic = IsotonicRegression(y_min=0, y_max=1).fit(pairs, found)  # Zadrozny and Elkan 2002
    return Relevance(
        references=references,
        weights=plain(weights),
        shares=plain(shares),
        floors=plain(floors),
        right_above_floor=plain((right >= floor).mean() for floor in floors),
        scores=plain(isotonic.X_thresholds_),
        probabilities=plain(isotonic.y_thresholds_),
    )


def fit_weights(searches):
    """How much a score and its text's statistics count, (5,): a logistic regression that tells right pairs from wrong ones."""
    from sklearn.linear_model import LogisticRegression  # only here: this import takes a second

    features, found = [], []
    for part in searches:
        used = np.concatenate([np.flatnonzero(part.right), evenly(np.flatnonzero(part.wrong), MAX_WRONG)])
        features.append(np.column_stack([part.scores.flat[used], part.statistics[used // part.scores.shape[1]]]))
        found.append(part.right.flat[used])
    features, found = np.concatenate(features), np.concatenate(found)
    scale = features.std(axis=0) + 1e-9
    fitted = LogisticRegression().fit((features - features.mean(axis=0)) / scale, found)
    weights = fitted.coef_[0] / scale  # of the features before they were standardised
    return weights if weights[0] > 0 else np.array([1.0, 0, 0, 0, 0])  # else the model has learned nothing yet


def plain(values):
    return [round(float(value), 6) for value in values]


def evenly(values, count):
    """At most count of the values, evenly spaced."""
    return values[:: max(1, -(-len(values) // count))]


def measure_relevance(relevance, searches):
    """How a `Relevance` does on `Searches` that it was not learned from.

    Returns {"images", "texts", "wrong_above_floor", "right_above_floor", "calibration_error", "nothing_wrongly",
    "nothing_rightly", "bins"}. All but the counts and the bins are percentages. The two above the floor are of the wrong and of
    the right pairs. calibration_error is the expected one (Guo et al. 2017), in points, of the pictures that are shown, the
    best nine of each text; bins are [mean probability, share of right pairs, number of pairs] of these. Of the texts for which
    COMMON or more pictures are right, and of those for which none is, the last two say how many get "probably nothing here".
    """
    corrected = searches.corrected(np.array(relevance.weights))
    above = corrected >= relevance.floor(WRONG_SHARE)
    best = np.argsort(-corrected, axis=1, kind="stable")[:, :NUM_JUDGED]
    corrected, right, wrong = (np.take_along_axis(of, best, axis=1) for of in (corrected, searches.right, searches.wrong))
    nothing = relevance.probability(corrected).mean(axis=1) < NOTHING
    common, absent = searches.right.mean(axis=1) >= COMMON, ~searches.right.any(axis=1)
    probabilities, correct = relevance.probability(corrected[right | wrong]), right[right | wrong]
    number = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = [
        [float(probabilities[number == i].mean()), float(correct[number == i].mean()), int((number == i).sum())]
        for i in np.unique(number)
    ]
    error = sum(count * abs(expected - found) for expected, found, count in bins) / max(1, len(correct))
    return {
        "images": searches.scores.shape[1],
        "texts": len(searches.scores),
        "wrong_above_floor": percentage(above[searches.wrong]),
        "right_above_floor": percentage(above[searches.right]),
        "calibration_error": 100 * error,
        "nothing_wrongly": percentage(nothing[common]),
        "nothing_rightly": percentage(nothing[absent]),
        "bins": bins,
    }


def percentage(mask):
    return 100 * float(mask.mean()) if mask.size else 0.0


def write_relevance(folder, I_v, captions, image_of_text, embed, seed=0):
    """Learns a `Relevance` and writes it into a folder with relevance.png.

    I_v: (n, d_e + 1) vectors of the images. image_of_text: (m,) the index of each caption's image. embed(texts): their
    (texts, d_e) L2-normalised embeddings. Returns what `measure_relevance` finds on one half of the images after learning from
    the other; what is written is learned from both. Raises UserError where there are fewer than MIN_IMAGES images.
    """
    from utils.plots import draw_relevance

    if len(I_v) < MIN_IMAGES:
        raise UserError(f"{len(I_v)} images with captions: match probabilities need {MIN_IMAGES} or more")
    rng = np.random.default_rng(seed)
    I_v, captions, image_of_text = sample(I_v, captions, image_of_text, rng)
    asked = choose_spans(captions, NUM_ASKED, rng)
    if not asked:
        raise UserError("the captions have no words that say what is seen, so no match probabilities can be learned")
    words = {word for text in (*asked, *captions) for word in content_words(text)}
    texts = sorted({*asked, *words}, key=lambda text: (len(text), text))  # as a batch is as long as its longest
    T_e = np.concatenate([embed(texts[start : start + AT_ONCE]) for start in range(0, len(texts), AT_ONCE)])
    place = {text: position for position, text in enumerate(texts)}

    def look_up(texts):
        return T_e[np.array([place[text] for text in texts], dtype=int)]

    T_q = as_queries(look_up(asked))
    right, wrong = label_pairs(asked, captions, image_of_text, len(I_v))
    half, searches = np.arange(len(I_v)) < len(I_v) // 2, []
    for part in (half, ~half):
        others = [caption for caption, image in zip(captions, image_of_text) if not part[image]]
        statistics = make_references(I_v[~part], others, look_up).statistics(asked, T_q, look_up)
        searches.append(Searches(T_q @ I_v[part].T, statistics, right[:, part], wrong[:, part]))
    if min(pairs.sum() for part in searches for pairs in (part.right, part.wrong)) < MIN_PAIRS:
        raise UserError("the captions say nearly the same of all images, so no match probabilities can be learned")
    references = make_references(I_v, captions, look_up)
    unseen = measure_relevance(fit_relevance(references, searches[:1]), searches[1])
    relevance = fit_relevance(references, searches)
    relevance.save(folder)
    draw_relevance(relevance, unseen["bins"], WRONG_SHARE, Path(folder) / "relevance.png")
    return unseen


def sample(I_v, captions, image_of_text, rng):
    """At most MAX_IMAGES of the images, in random order, and MAX_CAPTIONS of their captions, evenly over the images."""
    order = rng.permutation(len(I_v))[:MAX_IMAGES]
    place = np.full(len(I_v), -1)
    place[order] = np.arange(len(order))
    image_of_text = place[image_of_text]
    by_image = np.argsort(image_of_text, kind="stable")
    number = np.arange(len(by_image)) - np.searchsorted(image_of_text[by_image], image_of_text[by_image])  # within an image
    chosen = by_image[(number < MAX_CAPTIONS // len(order)) & (image_of_text[by_image] >= 0)]
    return I_v[order], [captions[row] for row in chosen], image_of_text[chosen]


def relevance_line(unseen):
    """A message with what `write_relevance` measured."""
    return (
        f"match probabilities: on {unseen['images']:,} images that they were not learned from, off by "
        f"{unseen['calibration_error']:.1f} points; 'probably nothing here' for {unseen['nothing_rightly']:.0f}% of the texts "
        f"that no image matches, and for {unseen['nothing_wrongly']:.1f}% of those that 1 in 100 images or more match"
    )


def calibrate(options):
    """Learns what a run's scores mean, for searches to come: how probably a picture matches."""
    from embedding import embed_texts, open_model
    from evaluation.splits import embed_pairs, select_rows

    data_paths = options.data_dir, options.image_path, options.captions_path
    columns = options.image_column, options.caption_column
    rows = select_rows(options.run, data_paths, options.split, options.skip_bad, columns)
    opened = open_model(options.run, options.device, options.precision, options.views)
    I_v, _, image_of_text, captions, _ = embed_pairs(opened, rows, options.skip_bad, options.num_workers)
    folder = relevance_folder(options.run, options.cache_dir, options.views)
    unseen = write_relevance(folder, I_v, captions, image_of_text, lambda texts: embed_texts(opened[0], texts).numpy())
    print(f"{relevance_line(unseen)}\nwritten to {folder}")
    if options.json:
        write_json(options.json, unseen)
