"""Approximate search of large galleries: an HNSW graph (Malkov and Yashunin 2016, arXiv:1603.09320), built by faiss."""

import numpy as np
import torch

from storage import UserError, write_whole

FROM = 100_000  # pictures; in fewer, comparing with each is as fast as anyone notices
NEIGHBOURS = 32  # links of a picture in the graph
BUILD_EFFORT, SEARCH_EFFORT = 64, 128  # candidates kept while the graph is built and searched: recall against time
MOST_DEAD = 0.2  # share of a graph that may be pictures that are gone; with more it is built anew


class Graph:
    """An HNSW graph over embeddings, (N, d_e) of length 1, whose ids, (N,) int64, name them in the file."""

    def __init__(self, index, ids):
        import faiss

        self.index, self.order = index, np.argsort(ids)
        self.ids = ids[self.order]
        # Pictures that are gone stay in the graph as ways to others, but are no answers.
        self.alive = faiss.IDSelectorBatch(self.ids) if index.ntotal > len(ids) else None

    def nearest(self, embedding, n):
        """As `nearest`."""
        import faiss

        effort = faiss.SearchParametersHNSW(efSearch=max(SEARCH_EFFORT, n), sel=self.alive)
        scores, found = self.index.search(embedding.numpy()[None], min(n, len(self.ids)), params=effort)
        kept = found[0] >= 0  # faiss fills up with -1 where the graph led to fewer
        positions = self.order[np.searchsorted(self.ids, found[0][kept])]
        return torch.from_numpy(scores[0][kept]), torch.from_numpy(positions)


def open_graph(path, ids, embeddings):
    """The `Graph` of embeddings, (N, d_e) of length 1: read from `path` and brought up to date, or built there.

    ids: (N,) int64, one for each embedding that never names another. New ones are added to the graph in seconds; building
    takes minutes a million. Raises UserError where faiss is missing or the file cannot be written.
    """
    try:
        import faiss  # only here: few galleries are this large, and on macOS its OpenMP quarrels with torch's
    except ImportError:
        raise UserError(f"more than {FROM:,} pictures need faiss: pip install faiss-cpu, or pass --exact") from None
    try:
        index = faiss.read_index(str(path))
        known = faiss.vector_to_array(index.id_map)
        if index.d != embeddings.shape[1] or np.isin(known, ids, invert=True).mean() > MOST_DEAD:
            raise RuntimeError("another model's, or mostly of pictures that are gone")
    except RuntimeError:  # what faiss raises for missing and damaged files alike
        graph = faiss.IndexHNSWFlat(embeddings.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = BUILD_EFFORT
        index, known = faiss.IndexIDMap2(graph), np.empty(0, dtype=np.int64)
    new = np.isin(ids, known, invert=True)
    if new.any():
        print(f"adding {new.sum():,} pictures to the search graph")
        index.add_with_ids(np.ascontiguousarray(embeddings.numpy()[new]), ids[new])
        write_whole(path, lambda temporary: faiss.write_index(index, str(temporary)))
    return Graph(index, ids)


def nearest(gallery, embedding, n):
    """The n best of a gallery for one embedding, (d_e,): (cosines, positions), best first.

    gallery: (N, d_e) embeddings of length 1, each of which is compared, or their `Graph`.
    """
    if torch.is_tensor(gallery):
        return (gallery @ embedding).topk(min(n, len(gallery)))
    return gallery.nearest(embedding, n)
