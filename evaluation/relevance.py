"""Learn a run's relevance floor and match probabilities from captioned pictures: python evaluate.py calibrate --run RUN."""

from pathlib import Path

import numpy as np

from search.options import WRONG_SHARE
from search.queries import as_queries
from search.relevance import MIN_IMAGES, Relevance, reference_statistics, relevance_folder
from utils.errors import UserError
from utils.files import write_json

MAX_IMAGES = 1000  # that are compared with all their captions, and kept as references
MAX_CAPTIONS = 5000  # of them, as all are compared with each other
SHARES = 10.0 ** -np.arange(0.5, 5.01, 0.25)  # of wrong pairs, for which a floor is kept
MIN_WRONG = 10  # with fewer wrong pairs, all pairs that are not right count as wrong
MAX_WRONG = 200_000  # wrong pairs from which the weights are learned
NUM_BINS = 10  # of the reliability diagram and the calibration error


def label_pairs(T_q, image_of_text, num_images):
    """(right, wrong): two (m, n) masks. A pair is right where the caption was written for the image.

    It is neither where the image has a caption that is at least as similar to this text as two captions of one image usually
    are: such a picture shows what the text says. T_q: (m, d_e + 1) queries. image_of_text: (m,).
    """
    right = image_of_text[:, None] == np.arange(num_images)
    similarity, similarities_within_image = T_q @ T_q.T, []
    nearest_caption = np.empty(right.shape, dtype=np.float32)
    for image in range(num_images):
        captions = np.flatnonzero(image_of_text == image)
        nearest_caption[:, image] = similarity[:, captions].max(axis=1)
        similarities_within_image += [similarity[a, b] for a, b in zip(captions, captions[1:])]
    usual = np.median(similarities_within_image) if similarities_within_image else np.inf
    return right, ~right & (nearest_caption < usual)


def fit_relevance(I_v, T_q, image_of_text):
    """The `Relevance` of n images and m captions: vectors, (n, d_e + 1), and queries, (m, d_e + 1), as in `search.queries`.

    image_of_text: (m,) the index of each caption's image. The images become the references.
    """
    from sklearn.isotonic import IsotonicRegression  # only here: this import takes a second

    cosines = T_q @ I_v.T  # (m, n)
    right, wrong = label_pairs(T_q, image_of_text, len(I_v))
    if wrong.sum() < MIN_WRONG:  # nearly all captions are alike
        wrong = ~right
    mean, spread = reference_statistics(cosines)
    # Searched pictures are not among the references, so a caption's own image does not count in its mean.
    mean = (len(I_v) * mean - cosines[np.arange(len(cosines)), image_of_text]) / (len(I_v) - 1)
    weights = fit_weights(cosines, mean, spread, right, wrong)
    scores = weights[0] * cosines + (weights[1] * mean + weights[2] * spread)[:, None]
    shares = [share for share in SHARES if share * wrong.sum() >= 1]
    floors = np.quantile(scores[wrong], 1 - np.array(shares))
    pairs = (right | wrong) & (scores >= scores[right].min())  # below, the probability is 0
    isotonic = IsotonicRegression(y_min=0, y_max=1).fit(scores[pairs], right[pairs])  # Zadrozny and Elkan 2002
    return Relevance(
        references=I_v,
        weights=plain(weights),
        shares=plain(shares),
        floors=plain(floors),
        right_above_floor=plain((scores[right] >= floor).mean() for floor in floors),
        scores=plain(isotonic.X_thresholds_),
        probabilities=plain(isotonic.y_thresholds_),
    )


def fit_weights(cosines, mean, spread, right, wrong):
    """How much a cosine, the mean and the spread count, (3,), by a logistic regression that tells right pairs from wrong ones.

    cosines, right, wrong: (m, n). mean, spread: (m,).
    """
    from sklearn.linear_model import LogisticRegression  # only here: this import takes a second

    used = np.concatenate([np.flatnonzero(right), evenly(np.flatnonzero(wrong), MAX_WRONG)])
    rows = used // cosines.shape[1]
    features = np.stack([cosines.flat[used], mean[rows], spread[rows]], axis=1)
    scale = features.std(axis=0) + 1e-9
    fitted = LogisticRegression().fit((features - features.mean(axis=0)) / scale, right.flat[used])
    weights = fitted.coef_[0] / scale  # of the features before they were standardised
    return weights if weights[0] > 0 else np.array([1.0, 0, 0])  # else the model has learned nothing yet


def plain(values):
    return [round(float(value), 6) for value in values]


def evenly(values, count):
    """At most count of the values, evenly spaced."""
    return values[:: max(1, -(-len(values) // count))]


def measure_relevance(relevance, I_v, T_q, image_of_text):
    """How a `Relevance` does on pairs that it was not learned from; the arguments are those of `fit_relevance`.

    Returns {"images", "captions", "wrong_above_floor", "right_above_floor", "calibration_error", "bins"}. The two in the middle
    are percentages of the wrong and of the right pairs. calibration_error is the expected one (Guo et al. 2017), in points, of
    the pairs above the floor; bins are [mean probability, share of right pairs, number of pairs] of these.
    """
    right, wrong = label_pairs(T_q, image_of_text, len(I_v))
    scores = np.stack([relevance.corrected_scores(cosines, text) for cosines, text in zip(T_q @ I_v.T, T_q)])
    above = scores >= relevance.floor(WRONG_SHARE)
    shown = above & (right | wrong)
    probabilities, correct = relevance.probability(scores[shown]), right[shown]
    number = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = [
        [float(probabilities[number == i].mean()), float(correct[number == i].mean()), int((number == i).sum())]
        for i in np.unique(number)
    ]
    error = sum(count * abs(expected - found) for expected, found, count in bins) / max(1, len(correct))
    return {
        "images": len(I_v),
        "captions": len(T_q),
        "wrong_above_floor": 100 * float(above[wrong].mean()) if wrong.any() else 0.0,
        "right_above_floor": 100 * float(above[right].mean()),
        "calibration_error": 100 * error,
        "bins": bins,
    }


def write_relevance(folder, I_v, T_q, image_of_text, seed=0):
    """Learns a `Relevance` and writes it into a folder with relevance.png. Arguments: as for `fit_relevance`.

    Returns what `measure_relevance` finds on one half of the images after learning from the other half; what is written is
    learned from both. Raises UserError where there are fewer than MIN_IMAGES images.
    """
    from utils.plots import draw_relevance

    if len(I_v) < MIN_IMAGES:
        raise UserError(f"{len(I_v)} images with captions: a relevance floor needs {MIN_IMAGES} or more")
    order = np.random.default_rng(seed).permutation(len(I_v))[:MAX_IMAGES]
    by_image = np.argsort(image_of_text, kind="stable")
    number = np.arange(len(T_q)) - np.searchsorted(image_of_text[by_image], image_of_text[by_image])  # within an image
    chosen = np.sort(by_image[number < MAX_CAPTIONS // len(order)])
    T_q, image_of_text = T_q[chosen], image_of_text[chosen]

    def part(images):
        place = np.full(len(I_v), -1)
        place[images] = np.arange(len(images))
        rows = place[image_of_text] >= 0
        return I_v[images], T_q[rows], place[image_of_text[rows]]

    half = len(order) // 2
    unseen = measure_relevance(fit_relevance(*part(order[:half])), *part(order[half:]))
    relevance = fit_relevance(*part(order))
    relevance.save(folder)
    draw_relevance(relevance, unseen["bins"], WRONG_SHARE, Path(folder) / "relevance.png")
    return unseen


def relevance_line(unseen):
    """A message with what `write_relevance` measured."""
    wrong, right = unseen["wrong_above_floor"], unseen["right_above_floor"]
    return (
        f"relevance floor: on {unseen['images']:,} images that it was not learned from, "
        f"{wrong:.2f}% of the wrong pictures and {right:.1f}% of the right ones are above it; "
        f"calibration error {unseen['calibration_error']:.1f} points"
    )


def calibrate(options):
    """Learns what a run's scores mean, for searches to come: from which score on a picture matches, and how probably."""
    from embedding import open_model
    from evaluation.splits import embed_pairs, select_rows

    data_paths = options.data_dir, options.image_path, options.captions_path
    rows = select_rows(options.run, data_paths, options.split, options.skip_bad)
    opened = open_model(options.run, options.device, options.precision, options.views)
    I_v, T_v, image_of_text, _, _ = embed_pairs(opened, rows, options.skip_bad, options.num_workers)
    folder = relevance_folder(options.run, options.cache_dir, options.views)
    unseen = write_relevance(folder, I_v, as_queries(T_v[:, :-1]), image_of_text)
    print(f"{relevance_line(unseen)}\nwritten to {folder}")
    if options.json:
        write_json(options.json, unseen)
