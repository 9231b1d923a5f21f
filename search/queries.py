"""Queries to a gallery: embed texts and pictures, rank the matches, and find the data of a run to search in."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from captions import load_captions, read_text
from config import is_model_name, is_stream, load_run
from embedding import file_embeddings, project_and_normalize, text_features, token_ids
from search.gallery import find_pictures
from search.index import top_k
from training.stream import validation_table
from utils.cache import cache_key, cached_tensor, model_key, note_use
from utils.errors import UserError

MAX_QUERY_LENGTH = 1000  # characters; text encoders truncate far earlier
NUM_CAPTIONS = 5  # best captions to show for a picture


@torch.no_grad()
def embed_texts(model, texts):
    """m texts -> (m, d_e) L2-normalised embeddings, in fp32. Raises UserError for a text that is empty or too long."""
    for text in texts:
        if not text.strip():
            raise UserError('the query is empty; say what the picture should show, as in python inference.py "a dog"')
        if len(text) > MAX_QUERY_LENGTH:
            raise UserError(
                f"the query has {len(text):,} characters ({text[:20]!r}...), at most {MAX_QUERY_LENGTH:,} are allowed"
            )
    device = model.logit_scale.device
    T_f = text_features(model, token_ids(model.tokenizer, texts), device, torch.float32)
    return project_and_normalize(model.text_projection, T_f, device)


def embed_query(model, texts, minus=(), weights=()):
    """The sum of the texts' embeddings minus those of `minus`, (d_e,), L2-normalised.

    texts: what a picture should match. minus: what it should not match. weights: one per text, then one per text of minus;
    empty: all are 1. Raises UserError if the number of weights is wrong, or if the sum is zero.
    """
    weights = list(weights) or [1.0] * (len(texts) + len(minus))
    if len(weights) != len(texts) + len(minus):
        raise UserError(f"--weights: {len(weights)} numbers for {len(texts)} texts and {len(minus)} of --minus")
    signed_weights = torch.tensor([*weights[: len(texts)], *(-weight for weight in weights[len(texts) :])])
    total = signed_weights @ embed_texts(model, [*texts, *minus])
    if total.norm() < 1e-6:
        raise UserError("the texts of the query cancel out: their sum is zero; change --minus or --weights")
    return F.normalize(total, dim=0)


@dataclass
class Query:
    """Texts that a picture should match, and texts that it should not. weights: as for `embed_query`."""

    texts: tuple
    minus: tuple = ()
    weights: tuple = ()

    def __str__(self):
        return " + ".join(self.texts) + "".join(f" - {text}" for text in self.minus)

    def embed(self, model):
        """Its embedding, (d_e,), L2-normalised."""
        return embed_query(model, self.texts, self.minus, self.weights)


def best_matches(gallery, embedding, image_filenames, n):
    """The n pictures nearest to an embedding, (d_e,), as [(filename, cosine)], best first. gallery: as for `index.top_k`.

    Those that were deleted since the gallery was opened are left out.
    """
    scores, positions = top_k(gallery, embedding, n)
    matches = [(image_filenames[i], score) for i, score in zip(positions.tolist(), scores.tolist())]
    matches = [(name, score) for name, score in matches if name is not None]
    if len(positions) and not matches:
        raise UserError("the pictures were deleted or embedded again meanwhile; start the search again")
    return matches


def newest_run():
    """The run folder in runs/ that was trained last. Raises UserError if there is none."""
    weights = sorted(Path("runs").glob("*/model.safetensors"), key=lambda path: path.stat().st_mtime)
    if not weights:
        raise UserError("runs/ holds no trained run; train one with python main.py, or name one with --run")
    return str(weights[-1].parent)


def read_data(run):
    """(table, image_dir) of the data set that a run was trained on. Raises UserError if it is no longer there."""
    if is_model_name(run):
        raise UserError(f"--run {run}: has no pictures and captions of its own; name a folder of pictures with --images")
    config = load_run(run)["config"]
    if is_stream(config.data_dir):
        table, image_dir, _ = validation_table(config)
    else:
        table, image_dir, _ = load_captions(config.data_dir, config.image_path, config.captions_path, config.skip_bad)
    return table, image_dir


def files_to_search(run, images):
    """(files, folder), as for `open_gallery`, of the pictures in a folder or tar files, or of the run's validation pictures."""
    if images:
        return find_pictures(images), None if images.endswith(".tar") else images
    table, image_dir = read_data(run)
    paths = [os.path.abspath(image_dir / name) for name in table["image"][table["split"] == "val"].unique()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path in paths for stat in [os.stat(path)]], None


def embed_captions(model, run, cache_dir, device, dtype):
    """The distinct captions of a run's data set: (captions, embeddings), m strings and (m, d_e), L2-normalised.

    The embeddings are cached on disk. If the data set is no longer there, m is 0 and a message is printed.
    """
    width = model.text_projection.out_features
    try:
        captions = list(read_data(run)[0]["caption"].unique())
    except UserError as error:
        print(f"no captions for pictures: {error}")
        return [], torch.empty(0, width)
    path = Path(cache_dir) / f"captions-{cache_key(model_key(model), dtype, captions)}.npy"
    note_use(run, path)

    def compute():
        T_f = text_features(model, token_ids(model.tokenizer, captions), device, dtype)
        return [project_and_normalize(model.text_projection, T_f, device)]

    return captions, cached_tensor(path, (len(captions), width), torch.float32, compute)


def embed_file(model, path, device, dtype):
    """The embedding of one picture file, (d_e,), L2-normalised. Raises UserError if it cannot be read."""
    if not Path(path).is_file():
        raise UserError(f"--image {path}: no such file")
    [(_, embedding)] = file_embeddings(model, [path], device, dtype)
    if embedding is None:
        raise UserError(f"--image {path}: empty, truncated, too large or not a picture")
    return embedding


def classify_embedding(model, embedding, names):
    """The probability of each of c class names for a picture's embedding, (d_e,): [(name, probability)], highest first."""
    logits = model.logit_scale.exp().cpu() * embed_texts(model, names) @ embedding  # (c,)
    order = logits.argsort(descending=True).tolist()
    probabilities = logits.softmax(dim=0).tolist()
    return [(names[i], probabilities[i]) for i in order]


def read_queries(path):
    """The queries in a file, one per line; blank lines are skipped. Raises UserError if there are none."""
    queries = [line.strip() for line in read_text(path, "--query-file").splitlines() if line.strip()]
    if not queries:
        raise UserError(f"--query-file {path}: empty; write one query per line")
    return queries
