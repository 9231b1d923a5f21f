"""What a search says for short queries: right pictures among the nine shown, match probabilities, "probably nothing here".

    python benchmarks/search_words.py --run RUN

The run's validation pictures are searched for 60 words and pairs of words that 3 captions or more of 10 pictures or more have,
and for things that no caption names. A picture is right if one of its captions has all words.
"""

import random
import re
import sys
from collections import Counter

import numpy as np
from measure import report

from search.gallery import open_gallery
from search.queries import Query, best_matches, judge, probably_nothing
from search.run_data import read_data, validation_files
from search.searcher import Searcher
from utils.cli import run_cli
from utils.errors import run_command
from utils.words import content_words

NUM_WORDS, SHOWN, SEED = 60, 9, 0
ABSENT = (
    *("elephant", "spaceship", "penguin", "wedding cake", "telephone booth", "submarine", "giraffe", "handwriting", "piano"),
    *("noodle soup", "kangaroo", "lighthouse", "microscope", "cactus", "octopus", "volcano", "igloo", "typewriter", "zebra"),
    *("pizza oven", "windmill", "chess board", "whale", "printer", "dinosaur", "refrigerator", "toothbrush", "keyboard"),
    *("harp", "jellyfish", "moon"),
)


def common_words(captions_of):
    """Words, and pairs of words that stand side by side, that 3 captions of 10 pictures have."""
    pictures = Counter()
    for captions in captions_of.values():
        said = Counter(text for caption in captions for text in texts_of(caption))
        pictures.update(text for text, count in said.items() if count >= 3)
    return sorted(text for text, count in pictures.items() if count >= 10)


def texts_of(caption):
    words = re.findall(r"[a-z]+", caption.lower())
    pairs = [f"{one} {other}" for one, other in zip(words, words[1:]) if content_words(one) and content_words(other)]
    return {word for word in words if content_words(word)} | set(pairs)


def measure(run: str, cache_dir: str = ".cache", json_path: str = ""):
    """Searches a run's validation pictures for what they have and for what they have not.

    Args:
        run: a run folder
        cache_dir: folder of embeddings
        json_path: file for the results
    """
    searcher = Searcher(run, cache_dir=cache_dir)
    gallery = open_gallery(searcher, validation_files(run), "", 2)
    table, image_dir = read_data(run)
    captions_of = table[table["split"] == "val"].groupby("image")["caption"].apply(list).to_dict()
    words_of = {name: [content_words(caption) for caption in captions] for name, captions in captions_of.items()}

    def search(text):
        """(number of right ones, mean probability, whether nothing is said to be there)."""
        embedding = Query((text,)).embed(searcher)
        matches = judge(best_matches(gallery, embedding, gallery.paths, SHOWN), searcher, text, embedding)
        words = content_words(text)
        names = [str(match.filename).removeprefix(f"{image_dir.absolute()}/") for match in matches]
        right = sum(any(words <= said for said in words_of[name]) for name in names)
        return right, np.mean([match.probability for match in matches]), probably_nothing(matches)

    common = random.Random(SEED).sample(common_words(captions_of), NUM_WORDS)
    found = [search(text) for text in common]
    said = {word for captions in words_of.values() for words in captions for word in words}
    absent = [text for text in ABSENT if not content_words(text) <= said]
    nothing = [search(text)[2] for text in absent]
    missed = [text for text, (_, _, is_nothing) in zip(common, found) if is_nothing]
    rows = [
        [
            f"right pictures for {NUM_WORDS} words and pairs of words that are there, mean",
            f"{np.mean([f[0] for f in found]):.1f}",
        ],
        ["the same by the match probabilities", f"{SHOWN * np.mean([f[1] for f in found]):.1f}"],
        ['"probably nothing here" for them, wrongly', f"{len(missed)} of {NUM_WORDS} {' '.join(missed)}".rstrip()],
        ['"probably nothing here" for things that no caption names', f"{sum(nothing)} of {len(absent)}"],
    ]
    report("short queries", ["of the nine pictures that are shown", "measured"], rows, json_path, [SEED])


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/search_words.py", sys.argv[1:]))
