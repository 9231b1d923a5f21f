"""The words of a text that say what a picture shows."""

import re
import unicodedata

# What says little of that. Other languages have no such list: all their words count. Scripts without spaces, such as Chinese,
# have a whole phrase as one word, so match probabilities mean little there.
FUNCTION_WORDS = frozenset(
    [
        "a",
        "about",
        "an",
        "and",
        "are",
        "around",
        "as",
        "at",
        "away",
        "back",
        "be",
        "being",
        "by",
        "down",
        "for",
        "from",
        "front",
        "has",
        "have",
        "he",
        "her",
        "him",
        "his",
        "in",
        "into",
        "is",
        "it",
        "its",
        "near",
        "of",
        "off",
        "on",
        "one",
        "other",
        "out",
        "over",
        "she",
        "some",
        "that",
        "the",
        "their",
        "them",
        "there",
        "they",
        "this",
        "through",
        "to",
        "towards",
        "two",
        "up",
        "very",
        "while",
        "who",
        "with",
        "image",
        "photo",
        "photograph",
        "picture",
    ]
)


def content_words(text):
    """The set of a text's words that say what a picture shows, in lower case and without a plural s."""
    text = re.sub(r"['’](s|t|re|ve|ll|d|m)\b", "", unicodedata.normalize("NFC", text.lower()))
    letters = "".join(char if unicodedata.category(char)[0] in "LM" else " " for char in text)  # M: vowel signs of Hindi
    words = {word for word in letters.split() if word not in FUNCTION_WORDS}
    return {word[:-1] if re.fullmatch(r".{2,}[^s]s", word) else word for word in words} - FUNCTION_WORDS
