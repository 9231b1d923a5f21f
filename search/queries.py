"""Queries to a gallery: texts and pictures to embeddings, and embeddings to matches.

What is searched has a vector, (d_e + 1,): its L2-normalised embedding and, as a last number, minus a share of its hubness
(`encoders.hubness`). So has a query, but its last number is 1 if a text looks for pictures or a picture for texts. The product
of both is the score: the cosine minus that share. A picture that looks for pictures has 0 there: the score is the cosine. In a
sum of texts the last number is the sum of the weights, divided as the embedding is: 0 for one text minus another.
"""

from dataclasses import dataclass

import numpy as np

from search.index import top_k
from search.relevance import LIKELY, NOTHING, NUM_JUDGED
from utils.errors import UserError
from utils.files import read_text
from utils.folders import is_unicode, printable
from utils.words import content_words

MAX_QUERY_LENGTH = 1000  # characters; text encoders truncate far earlier
NUM_CAPTIONS = 5  # best captions to show for a picture
NUM_SPREAD = 1000  # pictures of a gallery that say how far cosines spread


def embed_texts(model, texts):
    """m texts -> queries, (m, d_e + 1) float32. Raises UserError for a text that is empty or too long.

    model: a `search.searcher.Searcher` or a CLIPModel.
    """
    for text in texts:
        if not text.strip():
            raise UserError('the query is empty; say what the picture should show, as in python inference.py "a dog"')
        if len(text) > MAX_QUERY_LENGTH:
            raise UserError(
                f"the query has {len(text):,} characters ({text[:20]!r}...), at most {MAX_QUERY_LENGTH:,} are allowed"
            )
        if not is_unicode(text):
            raise UserError(f"the query {printable(text[:40])!r} is not UTF-8; type it again, in UTF-8")
    if hasattr(model, "embed_texts"):
        T_e = model.embed_texts(texts)
    else:
        import embedding  # only here: this import takes seconds

        T_e = embedding.embed_texts(model, texts).numpy()
    return as_queries(T_e)


def as_queries(embeddings):
    """(n, d_e) embeddings of texts that look for pictures, or of pictures that look for texts -> queries, (n, d_e + 1)."""
    return np.pad(embeddings, ((0, 0), (0, 1)), constant_values=1)


def embed_query(model, texts, minus=(), weights=()):
    """The sum of the texts' embeddings minus those of `minus` as a query, (d_e + 1,), whose embedding is L2-normalised.

    texts: what a picture should match. minus: what it should not match. weights: one per text, then one per text of minus;
    empty: all are 1. Raises UserError if the number of weights is wrong, or if the sum is zero.
    """
    weights = list(weights) or [1.0] * (len(texts) + len(minus))
    if len(weights) != len(texts) + len(minus):
        raise UserError(f"--weights: {len(weights)} numbers for {len(texts)} texts and {len(minus)} of --minus")
    signed_weights = np.array([*weights[: len(texts)], *(-weight for weight in weights[len(texts) :])], dtype=np.float32)
    return normalize(signed_weights @ embed_texts(model, [*texts, *minus]))


def normalize(total):
    """A sum of queries, (d_e + 1,), whose embedding is then L2-normalised. Raises UserError where that is zero."""
    length = np.linalg.norm(total[:-1])
    if length < 1e-6:
        raise UserError("the parts of the query cancel out: their sum is zero; change --minus or --weights")
    return total / length


def blend(gallery, embeddings):
    """One query, (d_e + 1,), of several that count the same for the order of a gallery's pictures.

    A picture's cosines with pictures are larger and spread more than those with texts, so each query is first divided by the
    standard deviation of its scores with the gallery's pictures.
    """
    if len(embeddings) == 1:
        return embeddings[0]
    rows = gallery.rows[:: max(1, len(gallery.rows) // NUM_SPREAD)]
    some = gallery.vectors[rows].astype(np.float32)
    return normalize(sum(embedding / max(np.std(some @ embedding), 1e-6) for embedding in embeddings))


@dataclass
class Query:
    """Texts that a picture should match, and texts that it should not. weights: as for `embed_query`."""

    texts: tuple
    minus: tuple = ()
    weights: tuple = ()

    def __str__(self):
        return " + ".join(self.texts) + "".join(f" - {text}" for text in self.minus)

    @property
    def text(self):
        """Its text, if it is one alone: match probabilities were learned from single texts; else empty."""
        return self.texts[0] if len(self.texts) == 1 and not self.minus and min(self.weights, default=1) > 0 else ""

    def embed(self, model):
        """Its query, (d_e + 1,)."""
        return embed_query(model, self.texts, self.minus, self.weights)


def as_vectors(embeddings, filenames, width):
    """Embeddings of N pictures, (N, d_e) or (N, d_e + 1), an array or a tensor -> the same, L2-normalised.

    width: d_e + 1. Raises UserError where they are not a row for each file, or of another model.
    """
    vectors = np.array(embeddings.detach().cpu().numpy() if hasattr(embeddings, "detach") else embeddings, dtype=np.float32)
    shape = " x ".join(map(str, vectors.shape))
    if vectors.ndim != 2 or vectors.shape[1] not in (width - 1, width):
        raise UserError(f"find_matches: {shape} embeddings; this model's are N x {width - 1}")
    if len(vectors) != len(filenames):
        raise UserError(f"find_matches: {shape} embeddings, and {len(filenames)} file names; each row needs its name")
    lengths = np.linalg.norm(vectors[:, : width - 1], axis=1, keepdims=True)
    if not np.allclose(lengths, 1, atol=1e-2):  # float16 ones, as galleries have them, stay as they are
        vectors[:, : width - 1] /= np.maximum(lengths, 1e-12)
    return vectors


def best_matches(gallery, embedding, image_filenames, n, skip=0):
    """The n best pictures for a query, (d_e + 1,), as [(filename, score)], best first. gallery: as for `index.top_k`.

    skip: leave out that many better ones. Pictures that were deleted since the gallery was opened are left out.
    """
    scores, positions = top_k(gallery, embedding, n + skip)
    scores, positions = scores[skip:], positions[skip:]
    matches = [(image_filenames[i], score) for i, score in zip(positions.tolist(), scores.tolist())]
    existing = [(name, score) for name, score in matches if name is not None]
    if matches and not existing:
        raise UserError("the pictures were deleted or embedded again meanwhile; start the search again")
    return existing


def best_captions(captions, vectors, embedding):
    """The captions that match a picture best, [(caption, score)], best first.

    captions, vectors: as `search.run_data.embed_captions` gives them. embedding: the picture's query to pictures, (d_e + 1,).
    """
    return best_matches(vectors, as_queries(embedding[None, :-1])[0], captions, NUM_CAPTIONS)


@dataclass
class Match:
    """A picture that was found. probability: that it matches, 0 to 1; None without a `Relevance`. relevant: above the floor."""

    filename: str
    score: float  # cosine, minus the hubness of what was found
    probability: float | None = None
    relevant: bool = True

    @property
    def is_likely(self):
        return self.probability is None or self.probability >= LIKELY

    def record(self):
        probability = {} if self.probability is None else {"probability": round(self.probability, 4)}
        return {"filename": self.filename, "score": self.score} | probability

    def label(self):
        return f"{self.score:7.3f}" if self.probability is None else f"{100 * self.probability:6.1f}%"


def judge(matches, searcher=None, text="", embedding=None, wrong_share=0.0):
    """[(filename, score)] of a text's query, (d_e + 1,) -> a list of `Match`.

    searcher: a `search.searcher.Searcher`. Without a text that has content words, or where its run has no `Relevance`, nothing
    is said of how probably a picture matches. wrong_share: that may get over the floor; 0: none is left out.
    """
    relevance = searcher.relevance if content_words(text) else None
    if relevance is None:
        return [Match(name, score) for name, score in matches]
    corrected = relevance.corrected_scores([score for _, score in matches], text, embedding, searcher.embed_texts)
    floor = relevance.floor(wrong_share)
    return [
        Match(name, score, float(relevance.probability(value)), bool(value >= floor))
        for (name, score), value in zip(matches, corrected)
    ]


def probably_nothing(matches):
    """Whether probably none of a list of `Match`, best first, shows what was looked for: by the nine best, or all of fewer."""
    judged = [match.probability for match in matches[:NUM_JUDGED]]
    return bool(judged) and None not in judged and np.mean(judged) < NOTHING


def classify_embedding(model, embedding, names):
    """The probability of each of c class names for a picture's query, (d_e + 1,): [(name, probability)], highest first.

    model: a CLIPModel.
    """
    logits = model.logit_scale.exp().item() * embed_texts(model, names)[:, :-1] @ embedding[:-1]  # (c,)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    return [(names[i], float(probabilities[i])) for i in np.argsort(-logits, kind="stable")]


def read_queries(path):
    """The queries in a file, one per line; blank lines are skipped. Raises UserError if there are none."""
    queries = [line.strip() for line in read_text(path, "--query-file").split("\n") if line.strip()]
    if not queries:
        raise UserError(f"--query-file {path}: empty; write one query per line")
    return queries
