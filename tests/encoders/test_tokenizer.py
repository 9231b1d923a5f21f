"""Vocabularies made from captions of any script, and captions that a given tokenizer does not know."""

import unicodedata

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from encoders.tokenizer import count_unknown, train_tokenizer


@pytest.mark.parametrize(
    ("first", "second"), [("फूल", "फल"), ("año", "ano"), ("Bär", "Bar"), ("má", "mà"), ("มา", "ม้า"), ("שָׁלוֹם", "שלום")]
)
def test_words_that_differ_in_a_mark_have_different_tokens(first, second):
    tokenizer = train_tokenizer([f"x {first}", f"x {second}"], 100, 16)
    assert tokenizer.encode(first).ids != tokenizer.encode(second).ids
    for form in ("NFC", "NFD"):  # as different keyboards and systems write them
        assert tokenizer.encode(unicodedata.normalize(form, first)).ids == tokenizer.encode(first).ids


def test_a_long_sentence_without_spaces_is_known():
    sentence = "หมาตัวหนึ่งวิ่งอยู่บนชายหาด" * 8
    assert count_unknown(train_tokenizer([sentence], 200, 64), [sentence]) == 0


def test_captions_that_are_mostly_unknown_are_counted():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "dog": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert count_unknown(tokenizer, ["a dog", "a หมา", "หมา", "a dog หมา"]) == 2
