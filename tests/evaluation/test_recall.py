"""Recall against tables worked by hand."""

import numpy as np
import pytest

from evaluation.retrieval import match_choices, recall


def test_uneven_numbers_of_captions():
    # Three images; the first has one caption, the second three, the third two.
    image_of_text = [0, 1, 1, 1, 2, 2]
    similarity = np.array(
        [
            [0.9, 0.1, 0.2],  # caption of image 0, which ranks 1st
            [0.8, 0.5, 0.3],  # of image 1: 2nd
            [0.7, 0.6, 0.8],  # of image 1: 3rd
            [0.1, 0.4, 0.2],  # of image 1: 1st
            [0.3, 0.7, 0.1],  # of image 2: 3rd
            [0.2, 0.1, 0.6],  # of image 2: 1st
        ]
    )
    scores = recall(similarity, image_of_text)
    assert scores["text_to_image"]["R@1"] == pytest.approx(100 * 3 / 6)
    assert scores["text_to_image"]["median_rank"] == 1.5
    # Image 0: its caption leads its column. Image 1: best caption 0.6, behind 0.7: 2nd. Image 2: 0.6, behind 0.8: 2nd.
    assert scores["image_to_text"]["R@1"] == pytest.approx(100 / 3)
    assert scores["image_to_text"]["median_rank"] == 2
    assert scores["image_to_text"]["R@5"] == scores["text_to_image"]["R@10"] == 100
    assert scores["rsum"] == pytest.approx(50 + 100 / 3 + 4 * 100)


def test_order_of_captions_does_not_matter():
    rng = np.random.default_rng(0)
    similarity, image_of_text = rng.normal(size=(40, 12)), np.r_[np.arange(12), rng.integers(12, size=28)]
    order = rng.permutation(40)
    assert recall(similarity, image_of_text) == recall(similarity[order], image_of_text[order])


def test_agrees_with_sorting():
    rng = np.random.default_rng(1)
    similarity, image_of_text = rng.normal(size=(100, 20)), np.repeat(np.arange(20), 5)
    text_hits = [image_of_text[m] in np.argsort(-similarity[m])[:5] for m in range(100)]
    image_hits = [n in image_of_text[np.argsort(-similarity[:, n])[:5]] for n in range(20)]
    scores = recall(similarity, image_of_text)
    assert scores["text_to_image"]["R@5"] == pytest.approx(100 * np.mean(text_hits))
    assert scores["image_to_text"]["R@5"] == pytest.approx(100 * np.mean(image_hits))


def test_a_collapsed_model_scores_nothing():
    scores = recall(np.ones((60, 12)), np.repeat(np.arange(12), 5))
    assert scores["rsum"] == 0


def test_tied_captions_of_one_image_do_not_count_against_it():
    similarity = np.array([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]])
    assert recall(similarity, [0, 0, 1])["image_to_text"]["R@1"] == 100


def test_nan_and_images_without_captions_are_refused():
    with pytest.raises(ValueError, match="finite"):
        recall(np.array([[np.nan, 1.0], [0.0, 1.0]]), [0, 1])
    with pytest.raises(ValueError, match="without a caption"):
        recall(np.eye(2), [0, 0])


def test_choices_that_are_all_right_all_wrong_or_all_alike():
    image_of_text = np.repeat(np.arange(20), 2)
    right = image_of_text[:, None] == np.arange(20)
    scores = match_choices(right.astype(float), image_of_text, choices=4, seed=0)
    assert scores == {"images": 20, "choices": 4, "accuracy": 100, "chance": 25, "interval": scores["interval"]}
    # Wilson's interval of 20 out of 20 at z = 1.96: from n / (n + z^2) to 1.
    assert scores["interval"] == pytest.approx([100 * 20 / (20 + 1.96**2), 100], abs=0.01)
    assert match_choices(-right.astype(float), image_of_text, 4, 0)["accuracy"] == 0
    assert match_choices(np.zeros((40, 20)), image_of_text, 4, 0)["accuracy"] == 0


def test_choices_by_chance():
    image_of_text = np.repeat(np.arange(2000), 2)
    similarity = np.random.default_rng(0).normal(size=(4000, 2000))
    scores = match_choices(similarity, image_of_text, choices=5, seed=0)
    assert scores["chance"] == 20 and scores["interval"][0] < 20 < scores["interval"][1]
    assert scores == match_choices(similarity, image_of_text, 5, 0) != match_choices(similarity, image_of_text, 5, 1)


def test_all_captions_of_an_image_are_its_own():
    # Image 0 goes with texts 0 and 1; with two images the other caption is text 2 or 3, of image 1.
    similarity = np.array([[0.9, 0.0], [0.8, 0.0], [0.85, 0.5], [0.1, 0.6]])
    accuracies = {match_choices(similarity, np.array([0, 0, 1, 1]), 2, seed)["accuracy"] for seed in range(40)}
    assert accuracies == {50, 100}  # image 0 fails where text 1 meets text 2
