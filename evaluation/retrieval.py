"""Retrieval metrics of a similarity matrix: Recall@K and median rank, and the accuracy of choosing among captions.

rsum is the sum of the six recalls (R@1, R@5 and R@10 in both directions, in percent), at most 600.
"""

import numpy as np

from embedding import pair_scores, picture_vectors, text_vectors
from utils.errors import UserError

KS = (1, 5, 10)  # the K of Recall@K
COMPARABLE, FEW = 1000, 200  # images: most published figures are over so many; among fewer than FEW, chance decides much
MANY_REPEATED = 0.05  # share of the captions that other images have, too, above which a line says so
FULL_STOPS = " .\u3002\u0964"  # at the end of a caption; the last two are those of Chinese, Japanese and Hindi


def number_captions(captions):
    """(m,) numbers of m captions, from 0: equal where they differ in case, spaces or a full stop at the end only."""
    plain = [" ".join(caption.casefold().split()).rstrip(FULL_STOPS) for caption in captions]
    return np.unique(plain, return_inverse=True)[1]


def right_pairs(image_of_text, caption_ids, n):
    """(m, n) mask of what is correct: a caption for its image, and for all others that have an equal one.

    image_of_text, caption_ids: (m,) index of each caption's image, and its number of `number_captions`. n: images.
    """
    has_caption = np.zeros((np.max(caption_ids) + 1, n), dtype=bool)
    has_caption[caption_ids, image_of_text] = True
    return has_caption[caption_ids]


def recall(similarity, image_of_text, right=None):
    """Recall@K and median rank of retrieval in both directions.

    similarity: (m, n) array, a row for each of m captions, a column for each of n images. image_of_text: (m,) index of each
    caption's image. Images may have different numbers of captions, but at least one. right: (m, n) mask of the
    pairs that are correct, for captions that several images have (`right_pairs`); None: each caption with its image.

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
    if right is None:
        right = image_of_text[:, None] == np.arange(n)
    correct = np.where(right, similarity, -np.inf)
    text_ranks = 1 + (~right & (similarity >= correct.max(axis=1)[:, None])).sum(axis=1)  # of each text's best correct image
    image_ranks = 1 + (~right & (similarity >= correct.max(axis=0))).sum(axis=0)  # of each image's best correct caption

    def summary(ranks):
        return {f"R@{k}": 100 * float((ranks <= k).mean()) for k in KS} | {"median_rank": float(np.median(ranks))}

    scores = {"image_to_text": summary(image_ranks), "text_to_image": summary(text_ranks)}
    return scores | {"rsum": sum(direction[f"R@{k}"] for direction in scores.values() for k in KS)}
    # END SOLUTION


def match_choices(similarity, image_of_text, choices, seed, caption_ids=None):
    """Multiple choice: which of `choices` captions belongs to an image? One is its own, the others are of other images.

    similarity: (m, n), of m captions with n images. image_of_text, caption_ids: (m,), as for `recall`; no two of the captions
    to choose from are equal. seed: of the random choice of captions.

    Returns {"images", "choices", "accuracy", "chance", "interval"}, the last three in percent; interval is the lower and the
    upper end of Wilson's 95% confidence interval of the accuracy. A tie with a wrong caption counts as wrong.
    Raises UserError where an image has fewer than choices - 1 wrong captions that differ.
    """
    import scipy.stats  # only here: a training does without

    n, rng, num_correct = similarity.shape[1], np.random.default_rng(seed), 0
    ids = np.arange(len(similarity)) if caption_ids is None else caption_ids
    right = right_pairs(image_of_text, ids, n)
    captions_of = [np.flatnonzero(image_of_text == image) for image in range(n)]
    for image in range(n):
        others = np.flatnonzero(~right[captions_of[image]].any(axis=0))  # images without any of its captions
        enough = len(others) >= choices - 1
        drawn = others[rng.choice(len(others), choices - 1, replace=False)] if enough else []
        rows = [rng.choice(captions_of[i]) for i in [image, *drawn]]
        if len(set(ids[rows])) < choices:  # the same caption twice: draw from those that differ
            _, wrong = np.unique(np.where(right[:, image], -1, ids), return_index=True)
            wrong = wrong[~right[wrong, image]]
            if len(wrong) < choices - 1:
                raise UserError(f"--choices {choices}: an image has only {len(wrong)} wrong captions that differ; lower it")
            rows = [rows[0], *rng.choice(wrong, choices - 1, replace=False)]
        correct, *others = similarity[rows, image]
        num_correct += correct > max(others)
    low, high = scipy.stats.binomtest(int(num_correct), n).proportion_ci(method="wilson")
    accuracy, interval = 100 * num_correct / n, [100 * float(low), 100 * float(high)]
    return {"images": n, "choices": choices, "accuracy": accuracy, "chance": 100 / choices, "interval": interval}


def score(model, I_f, T_f, image_of_text, captions, device):
    """`recall` of image features I_f, (n, d_i), and text features T_f, (m, d_t), after the model's projection heads.

    captions: m texts; equal ones are correct for each other's images.
    """
    right = right_pairs(image_of_text, number_captions(captions), len(I_f))
    return recall(similarities(model, I_f, T_f, device), image_of_text, right)


def similarities(model, I_f, T_f, device):
    """The (m, n) scores of m captions with n images, from their features: cosines, minus the hubness of both if it is known."""
    return pair_scores(text_vectors(model, T_f, device), picture_vectors(model, I_f, device)).numpy()


def recall_table(scores, num_images):
    """The result of `recall` over so many images as a table to print."""
    lines = [f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS) + f"{'median rank':>14}"]
    for direction in ("image_to_text", "text_to_image"):
        row = scores[direction]
        recalls = "".join(f"{row[f'R@{k}']:8.1f}" for k in KS)
        lines.append(f"{direction.replace('_', ' '):16}{recalls}{row['median_rank']:14g}")
    return "\n".join([*lines, f"rsum {scores['rsum']:.1f}{few_note(num_images)}"])


def few_note(num_images):
    """What stands behind an rsum over so many images; "" where they are not few."""
    return f" over {num_images} images; not comparable with figures over {COMPARABLE:,}" if num_images < FEW else ""


def repeats_line(captions, image_of_text):
    """What to print where many captions are those of several images; else "". captions: m texts; image_of_text: (m,)."""
    ids = number_captions(captions)
    pairs = np.unique(np.stack([ids, image_of_text]), axis=1)  # (2, k): which images have which captions
    repeated = int((np.bincount(pairs[0])[ids] > 1).sum())
    if repeated <= MANY_REPEATED * len(ids):
        return ""
    return (
        f"{repeated:,} of {len(ids):,} captions are those of other images, too, and count as correct for all of them; "
        f"there are {ids.max() + 1:,} different captions: if they are names of classes, python evaluate.py zeroshot scores them"
    )
