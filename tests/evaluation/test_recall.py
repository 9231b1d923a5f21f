"""Recall against tables worked by hand."""

import json

import numpy as np
import pytest

from evaluation.retrieval import match_choices, number_captions, recall, recall_table, repeats_line, right_pairs
from utils.errors import UserError


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


def test_captions_are_equal_but_for_case_spaces_and_a_full_stop():
    captions = ["A dog .", "a  dog", "A DOG. ", "a dog runs", "a dog, runs", "\u72d7\u3002", "\u72d7"]
    assert number_captions(captions).tolist() == [0, 0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("captions", [["a circle", "a square"], ["Red .", "red square", "blue", "green", "grey"]])
def test_a_perfect_classifier_recalls_everything(captions):
    """Twenty images for each caption: each image is near its own caption, and as near to the equal ones of other images."""
    classes = np.repeat(np.arange(len(captions)), 20)
    similarity, texts = (classes[:, None] == classes).astype(float), [captions[i] for i in classes]
    right = right_pairs(np.arange(len(classes)), number_captions(texts), len(classes))
    assert recall(similarity, np.arange(len(classes)), right)["rsum"] == 600
    assert recall(-similarity, np.arange(len(classes)), right)["rsum"] == 0
    assert recall(0 * similarity, np.arange(len(classes)), right)["rsum"] == 0  # a collapsed model


def test_an_equal_caption_is_a_right_answer_in_both_directions():
    # Captions 0 and 2, of images 0 and 1, are equal; images 0 and 1 have a caption of their own each, image 2 has one.
    image_of_text, captions = [0, 0, 1, 1, 2], ["A dog .", "a black dog", "a dog", "two dogs", "a cat"]
    similarity = np.array(
        [
            [0.2, 0.9, 0.1],  # finds image 1, which has the same caption: 1st
            [0.3, 0.8, 0.4],  # finds its image 0 behind images 1 and 2: 3rd
            [0.9, 0.2, 0.5],  # finds image 0: 1st
            [0.8, 0.1, 0.3],  # finds its image 1 behind two: 3rd
            [0.7, 0.6, 0.5],  # finds image 2 behind two: 3rd
        ]
    )
    scores = recall(similarity, image_of_text, right_pairs(image_of_text, number_captions(captions), 3))
    assert scores["text_to_image"] == {"R@1": 40, "R@5": 100, "R@10": 100, "median_rank": 3}
    # Image 0 finds caption 2, image 1 finds caption 0; image 2 finds caption 2 (0.5) as near as its own: 2nd.
    assert scores["image_to_text"] == {"R@1": pytest.approx(200 / 3), "R@5": 100, "R@10": 100, "median_rank": 1}
    assert recall(similarity, image_of_text)["text_to_image"]["R@1"] == 0  # where equal captions were different ones


def test_choices_are_captions_that_differ():
    classes = np.repeat(np.arange(4), 10)
    similarity, captions = (classes[:, None] == classes).astype(float), np.array(list("abcd"))[classes]
    scores = match_choices(similarity, np.arange(40), 4, 0, number_captions(captions))
    assert scores["accuracy"] == 100 and scores["chance"] == 25
    with pytest.raises(UserError, match="--choices 5: an image has only 3 wrong captions that differ; lower it"):
        match_choices(similarity, np.arange(40), 5, 0, number_captions(captions))


def test_repeated_captions_are_counted_where_they_are_many():
    captions = [*["A dog", "a cat ."] * 3, "a bird", "a fish", "a fish"]
    line = repeats_line(captions, np.array([0, 1, 2, 3, 4, 5, 6, 7, 7]))  # image 7 has its caption twice
    assert line.startswith("6 of 9 captions are those of other images, too") and "4 different captions" in line
    assert "evaluate.py zeroshot" in line
    assert repeats_line(["a dog", "a dog", *map(str, range(98))], np.arange(100)) == ""  # 2%, as in photographs


def test_recall_over_few_images_says_that_it_compares_with_nothing():
    scores = recall(np.eye(3), [0, 1, 2])
    assert recall_table(scores, 48).endswith("rsum 600.0 over 48 images; not comparable with figures over 1,000")
    assert recall_table(scores, 200).endswith("rsum 600.0")


def test_equal_captions_are_right_where_a_run_is_scored(run, sample, tmp_path, evaluate_here, capsys):
    """Two captions for all images: an image finds the right one first, or all wrong ones before it."""
    folder = tmp_path / "two"
    (folder / "Images").mkdir(parents=True)
    for i, path in enumerate(sorted((sample / "Images").iterdir())[:40]):
        (folder / "Images" / f"{i}.png").write_bytes(path.read_bytes())
    rows = "".join(f"{i}.png,{'a red circle' if i % 2 else 'A blue square .'}\n" for i in range(40))
    (folder / "captions.txt").write_text(f"image,caption\n{rows}")
    flags = "--run", run, "--data-dir", folder, "--split", "all", "--device", "cpu", "--precision", "fp32"
    evaluate_here("retrieval", *flags, "--json", tmp_path / "f.json")
    scores, shown = json.loads((tmp_path / "f.json").read_text()), capsys.readouterr().out
    found = scores["image_to_text"]
    assert found["R@1"] == found["R@5"] == found["R@10"] > 0
    assert "40 of 40 captions are those of other images, too" in shown and "over 40 images; not comparable" in shown
    evaluate_here("match", *flags, "--choices", "2", "--output", tmp_path / "match.png", "--json", tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["accuracy"] == found["R@1"]
