"""Nearest-neighbour search: exact, or approximate for large galleries.

Approximate search uses the HNSW graph (Malkov and Yashunin 2016, arXiv:1603.09320) of the library faiss.
"""

import numpy as np
import torch

from utils.errors import UserError
from utils.files import atomic_write

HNSW_MIN_SIZE = 100_000  # pictures; for fewer, exact search takes milliseconds
HNSW_M = 32  # links per picture in the graph
EF_CONSTRUCTION, EF_SEARCH = 64, 128  # candidates while building and searching: more give a higher recall, but take longer
MAX_STALE = 0.2  # share of a graph's pictures that may have been deleted since; above it the graph is built again


class Graph:
    """An HNSW graph over N L2-normalised embeddings. ids: (N,) int64, which name them in the faiss index."""

    def __init__(self, index, ids):
        import faiss

        self.index, self.order = index, np.argsort(ids)
        self.ids = ids[self.order]
        # Deleted pictures stay in the graph, because paths to others lead through them, but are not returned.
        self.valid_ids = faiss.IDSelectorBatch(self.ids) if index.ntotal > len(ids) else None

    def top_k(self, embedding, n):
        """The same as the function `top_k`."""
        import faiss

        parameters = faiss.SearchParametersHNSW(efSearch=max(EF_SEARCH, n), sel=self.valid_ids)
        scores, ids = self.index.search(embedding.numpy()[None], min(n, len(self.ids)), params=parameters)
        is_match = ids[0] >= 0  # if faiss finds fewer than n, it fills up with -1
        positions = self.order[np.searchsorted(self.ids, ids[0][is_match])]
        return torch.from_numpy(scores[0][is_match]), torch.from_numpy(positions)


def open_graph(path, ids, embeddings):
    """The `Graph` of L2-normalised embeddings, (N, d_e): read from `path` and updated, or built and written there.

    ids: (N,) int64; an id must never be used again for another embedding. Adding a few embeddings takes seconds, building the
    graph takes minutes per million. Raises UserError if faiss is not installed or the file cannot be written.
    """
    try:
        import faiss  # optional, so imported here; also, on macOS its OpenMP library conflicts with torch's
    except ImportError:
        raise UserError(f"more than {HNSW_MIN_SIZE:,} pictures need faiss: pip install faiss-cpu, or pass --exact") from None
    try:
        index = faiss.read_index(str(path))
        known = faiss.vector_to_array(index.id_map)
        if index.d != embeddings.shape[1] or np.isin(known, ids, invert=True).mean() > MAX_STALE:
            raise RuntimeError("of another model, or too many of its pictures have been deleted")
    except RuntimeError:  # faiss raises the same for missing and for damaged files
        graph = faiss.IndexHNSWFlat(embeddings.shape[1], HNSW_M, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = EF_CONSTRUCTION
        index, known = faiss.IndexIDMap2(graph), np.empty(0, dtype=np.int64)
    new = np.isin(ids, known, invert=True)
    if new.any():
        print(f"adding {new.sum():,} pictures to the search graph")
        index.add_with_ids(np.ascontiguousarray(embeddings.numpy()[new]), ids[new])
        atomic_write(path, lambda temporary: faiss.write_index(index, str(temporary)))
    return Graph(index, ids)


def top_k(gallery, embedding, n):
    """The n nearest neighbours of an embedding, (d_e,): (cosines, positions in the gallery), nearest first.

    gallery: L2-normalised embeddings, (N, d_e), for exact search, or their `Graph` for approximate search.
    """
    if torch.is_tensor(gallery):
        return (gallery @ embedding).topk(min(n, len(gallery)))
    return gallery.top_k(embedding, n)
