"""What people type when they search, made from captions, and which pictures are right for it by their captions.

People type a word, two words, a phrase or a sentence. Spans of captions are such texts, about as common as what they name.
"""

import numpy as np

from utils.words import content_words

LENGTHS = 1, 2, 3, 5, None  # of a span, in words; None: the whole caption
PROMPTS = "", "a ", "a photo of a "  # before a single word


def choose_spans(captions, count, rng):
    """At most count spans of captions, each with a content word.

    rng: a NumPy generator. The same span may come from several captions, as often as people say it.
    """
    texts = []
    for row in rng.integers(len(captions), size=count):
        words, length = captions[row].split(), LENGTHS[rng.integers(len(LENGTHS))]
        if length and length <= len(words):
            start = rng.integers(len(words) - length + 1)
            text = " ".join(words[start : start + length]).strip(".,;:!?\"' ").lower()
        else:
            length, text = None, captions[row].strip()
        if content_words(text):
            texts.append(PROMPTS[rng.integers(len(PROMPTS))] + text if length == 1 else text)
    return texts


def label_pairs(texts, captions, image_of_text, num_images):
    """(right, wrong): two (m, n) masks of m texts and n images. image_of_text: the index of each caption's image.

    A picture is right for a text if one of its captions has at least two thirds of the text's content words, and wrong if all
    its captions together have fewer. It is neither where it takes several captions to say what the text says.
    """
    vocabulary = {}
    asked, said = word_matrix(texts, vocabulary), word_matrix(captions, vocabulary)
    shape = len(texts), len(vocabulary)
    asked.resize(shape)  # captions had words that no text has
    enough = np.ceil(2 / 3 * asked.sum(axis=1).A1 - 1e-6)[:, None]
    in_caption = (asked @ said.T).toarray()  # (m, captions)
    in_best_caption = np.zeros((num_images, len(texts)), dtype=np.int16)
    np.maximum.at(in_best_caption, image_of_text, in_caption.T)
    said_of_image = word_matrix(captions, vocabulary, image_of_text, num_images)
    in_image = (asked @ said_of_image.T).toarray()  # (m, n)
    return enough <= in_best_caption.T, in_image < enough


def word_matrix(texts, vocabulary, rows=None, num_rows=None):
    """A sparse matrix, (texts, words), of int16: 1 where a text has a content word.

    vocabulary: {word: column}, to which new words are added. rows: of each text, where several share one; then 1 at most.
    """
    from scipy.sparse import csr_matrix  # only here: this import takes a quarter of a second

    rows = range(len(texts)) if rows is None else rows
    cells = {
        (row, vocabulary.setdefault(word, len(vocabulary))) for row, text in zip(rows, texts) for word in content_words(text)
    }
    at = np.array(sorted(cells), dtype=int).reshape(-1, 2)
    shape = (num_rows if num_rows is not None else len(texts)), len(vocabulary)
    return csr_matrix((np.ones(len(at), dtype=np.int16), (at[:, 0], at[:, 1])), shape=shape)
