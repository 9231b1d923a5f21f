"""The words of a text that say what a picture shows."""

import re

# What says little of that. Other languages have no such list here; their words all count.
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
    words = re.findall(r"[^\W\d_]+", text.lower())
    return {word[:-1] if re.fullmatch(r".{2,}[^s]s", word) else word for word in words if word not in FUNCTION_WORDS}
