"""Retrieval metrics of a similarity matrix: Recall@K and median rank, and the accuracy of choosing among captions.

rsum is the sum of the six recalls (R@1, R@5 and R@10 in both directions, in percent), at most 600.
"""

import numpy as np

from embedding import pair_scores, picture_vectors, text_vectors

KS = (1, 5, 10)  # the K of Recall@K


def recall(similarity, image_of_text):
    """Recall@K and median rank of retrieval in both directions.

    similarity: (m, n) array, a row for each of m captions, a column for each of n images. image_of_text: (m,) index of each
    caption's image. Images may have different numbers of captions, but at least one.

    Returns {"image_to_text": {"R@1", "R@5", "R@10", "median_rank"}, "text_to_image": {...}, "rsum"}, recalls in percent. Ranks
    start at 1. Any caption of an image counts as correct for it. Ties are broken against the model: a wrong answer with the
    same score is ranked before the correct one, so a collapsed model, which gives every pair the same score, finds nothing.
    Raises ValueError if a similarity is not finite or an image has no caption.
    """
    # BEGIN SOLUTION
    similarity, image_of_text = np.asarray(similarity), np.asarray(image_of_text)
    if not np.isfinite(similarity).all():
        raise ValueError("similarities that are not finite cannot be ranked")
    n = similarity.shape[1]
    if len(np.unique(image_of_text)) < n:
        raise ValueError("an image without a caption cannot be scored")
    correct = similarity[np.arange(len(similarity)), image_of_text]  # (m,) each caption with its image
    text_ranks = (similarity >= correct[:, None]).sum(axis=1)
    best = np.full(n, -np.inf, dtype=similarity.dtype)
    np.maximum.at(best, image_of_text, correct)  # (n,) each image with the best of its captions
    correct_at_best = np.bincount(image_of_text[correct >= best[image_of_text]], minlength=n)  # correct captions are no ties
    image_ranks = (similarity >= best).sum(axis=0) - correct_at_best + 1

    def summary(ranks):
        return {f"R@{k}": 100 * float((ranks <= k).mean()) for k in KS} | {"median_rank": float(np.median(ranks))}

    scores = {"image_to_text": summary(image_ranks), "text_to_image": summary(text_ranks)}
    return scores | {"rsum": sum(direction[f"R@{k}"] for direction in scores.values() for k in KS)}
    # END SOLUTION


def match_choices(similarity, image_of_text, choices, seed):
    """Multiple choice: which of `choices` captions belongs to an image? One is its own, the others are of other images.

    similarity: (m, n), of m captions with n images. image_of_text: (m,) index of each caption's image. seed: of the random
    choice of captions.

    Returns {"images", "choices", "accuracy", "chance", "interval"}, the last three in percent; interval is the lower and the
    upper end of Wilson's 95% confidence interval of the accuracy. A tie with a wrong caption counts as wrong.
    """
    import scipy.stats  # only here: a training does without

    n, rng, num_correct = similarity.shape[1], np.random.default_rng(seed), 0
    captions_of = [np.flatnonzero(image_of_text == image) for image in range(n)]
    for image in range(n):
        others = rng.choice(n - 1, choices - 1, replace=False)
        others += others >= image  # any image but this one
        correct, *wrong = (similarity[rng.choice(captions_of[i]), image] for i in [image, *others])
        num_correct += correct > max(wrong)
    low, high = scipy.stats.binomtest(int(num_correct), n).proportion_ci(method="wilson")
    accuracy, interval = 100 * num_correct / n, [100 * float(low), 100 * float(high)]
    return {"images": n, "choices": choices, "accuracy": accuracy, "chance": 100 / choices, "interval": interval}


def score(model, I_f, T_f, image_of_text, device):
    """`recall` of image features I_f, (n, d_i), and text features T_f, (m, d_t), after the model's projection heads."""
    return recall(similarities(model, I_f, T_f, device), image_of_text)


def similarities(model, I_f, T_f, device):
    """The (m, n) scores of m captions with n images, from their features: cosines, minus the hubness of both if it is known."""
    return pair_scores(text_vectors(model, T_f, device), picture_vectors(model, I_f, device)).numpy()


def recall_table(scores):
    """The result of `recall` as a table to print."""
    lines = [f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS) + f"{'median rank':>14}"]
    for direction in ("image_to_text", "text_to_image"):
        row = scores[direction]
        recalls = "".join(f"{row[f'R@{k}']:8.1f}" for k in KS)
        lines.append(f"{direction.replace('_', ' '):16}{recalls}{row['median_rank']:14g}")
    return "\n".join([*lines, f"rsum {scores['rsum']:.1f}"])
