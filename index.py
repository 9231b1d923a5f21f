"""Approximate search of large galleries: an HNSW graph (Malkov and Yashunin 2016, arXiv:1603.09320), built by faiss."""

import numpy as np
import torch

from storage import UserError, write_whole

FROM = 100_000  # pictures; in fewer, comparing with each is as fast as anyone notices
NEIGHBOURS = 32  # links of a picture in the graph
BUILD_EFFORT, SEARCH_EFFORT = 64, 128  # candidates kept while the graph is built and searched: recall against time


def open_index(path, embeddings):
    """The HNSW index of embeddings, (N, d_e) of length 1: read from `path`, or built (minutes a million) and kept there.

    Raises UserError where faiss is missing or the index cannot be written.
    """
    try:
        import faiss  # only here: few galleries are this large, and on macOS its OpenMP quarrels with torch's
    except ImportError:
        raise UserError(f"more than {FROM:,} pictures need faiss: pip install faiss-cpu, or pass --exact") from None
    try:
        index = faiss.read_index(str(path))
        if (index.ntotal, index.d) != tuple(embeddings.shape):
            raise RuntimeError("another gallery's")
    except RuntimeError:  # what faiss raises for missing and damaged files alike
        print(f"building the search index of {len(embeddings):,} pictures")
        index = faiss.IndexHNSWFlat(embeddings.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_EFFORT
        index.add(np.ascontiguousarray(embeddings.numpy()))
        write_whole(path, lambda temporary: faiss.write_index(index, str(temporary)))
    return index


def nearest(gallery, embedding, n):
    """The n best of a gallery for one embedding, (d_e,): (cosines, positions), best first.

    gallery: (N, d_e) embeddings of length 1, each of which is compared, or an index of `open_index`.
    """
    if torch.is_tensor(gallery):
        return (gallery @ embedding).topk(min(n, len(gallery)))
    gallery.hnsw.efSearch = max(SEARCH_EFFORT, n)
    scores, positions = gallery.search(embedding.numpy()[None], min(n, gallery.ntotal))
    found = positions[0] >= 0  # faiss fills up with -1 where the graph led to fewer
    return torch.from_numpy(scores[0][found]), torch.from_numpy(positions[0][found])
