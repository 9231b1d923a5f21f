"""Task recall. Recall@K and median rank in both directions, from a matrix of similarities."""

import numpy as np

KS = (1, 5, 10)


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
    raise NotImplementedError("your code")
    # END SOLUTION
