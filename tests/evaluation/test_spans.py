"""Spans of captions as people type them, and which pictures are right for them, by tables worked by hand."""

import numpy as np

from evaluation.spans import LENGTHS, PROMPTS, choose_spans, label_pairs
from utils.words import content_words


def test_content_words_are_those_that_say_what_is_seen():
    assert content_words("Two dogs run through the snow .") == {"dog", "run", "snow"}
    assert content_words("a photo of a bus") == {"bus"} and content_words("a glass dress") == {"glass", "dress"}
    assert content_words("Año nuevo, ein Bär") == {"año", "nuevo", "ein", "bär"}
    assert content_words("photos of dogs") == content_words("a dog's pictures") == {"dog"}
    assert content_words("दो कुत्ते") == {"दो", "कुत्ते"} and content_words("cafe\u0301") == content_words("café")
    assert content_words("of the") == content_words("2021 🐶") == set()


def test_spans_are_parts_of_captions_in_each_length():
    captions = ["Brown dogs chase white cats over fences .", "Hat"]
    spans = choose_spans(captions, 600, np.random.default_rng(0))
    assert {prompt + "dogs" for prompt in PROMPTS} <= set(spans) and "a over" not in spans
    assert {*captions, "hat", "a hat"} <= set(spans)  # whole captions as they are written; one of one word is a word, too
    for text in set(spans) - set(captions):
        bare = text.removeprefix(PROMPTS[2]).removeprefix(PROMPTS[1])
        assert bare in " ".join(captions).lower() and (bare == text or " " not in bare)
    assert {length for length in LENGTHS if length} <= {len(text.split()) for text in spans if text in captions[0].lower()}
    assert choose_spans(["of the"], 20, np.random.default_rng(0)) == []


def test_a_picture_is_right_by_one_caption_wrong_by_all_and_else_neither():
    captions = ["A black dog runs .", "A dog in the snow .", "A boy with a red hat .", "Snow ."]
    image_of_text = np.array([0, 0, 1, 2])
    texts = ["dogs", "a photo of snow", "black snow", "boy in red hats", "boy red shoes", "elephant", "dog boy"]
    right, wrong = label_pairs(texts, captions, image_of_text, 3)
    expected = ["R--", "R-R", "?--", "-R-", "-R-", "---", "---"]  # right, wrong (-), or neither (?)
    assert right.tolist() == [[mark == "R" for mark in row] for row in expected]
    assert wrong.tolist() == [[mark == "-" for mark in row] for row in expected]
