"""Nearest neighbours of an embedding: exact, or for large galleries approximate, through compressed codes of the library faiss.

Approximate search ranks the codes of some lists (product quantization; Jegou et al. 2011) and then the best CANDIDATES of them
exactly. The index file is memory-mapped, as the vectors are.
"""

import mmap

import numpy as np

from utils.errors import UserError
from utils.files import atomic_write

APPROXIMATE_FROM = 100_000  # pictures; for fewer, exact search takes milliseconds
BLOCK = 8192  # vectors that are read at once; more no longer fit in the processor's cache
DIMS_PER_CODE = 8  # a code of BITS bits for so many dimensions
BITS = 8
TRAINING_SAMPLE = 100_000  # vectors from which lists and codes are learned
CODE_SAMPLE = 16_384  # and of these for the codes and the rotation before them
LISTS_PER_ROOT = 2  # the number of lists is that times the square root of the number of vectors, rounded to a power of two
MANY_LISTS = 8192  # from here on the nearest lists are found by a graph (HNSW); comparing with all takes most of the building
PROBED = 48  # lists that a query searches
CANDIDATES = 400  # codes that are ranked again exactly
SCATTERED = 64  # of their vectors that are read at once: each takes the pages around it into memory
MAX_APPROXIMATE = 1000  # matches; for more the exact search is used


def top_k(gallery, embedding, n):
    """The n best of a gallery for a query, (d_e + 1,): (scores, positions in the gallery), two arrays, best first.

    gallery: vectors, (N, d_e + 1), or a `search.gallery.Gallery`; L2-normalised embeddings, (N, d_e), have no hubness.
    """
    if hasattr(gallery, "top_k"):
        return gallery.top_k(embedding, n)
    gallery = np.asarray(gallery, dtype=np.float32)
    return largest(gallery @ embedding[: gallery.shape[1]], n)


def largest(scores, n):
    """(the n largest of N scores, their positions), largest first."""
    n = min(n, len(scores))
    positions = np.argpartition(scores, len(scores) - n)[len(scores) - n :] if n < len(scores) else np.arange(n)
    positions = positions[np.argsort(-scores[positions], kind="stable")]
    return scores[positions], positions


def exact_top_k(vectors, rows, embedding, n, at_once=BLOCK):
    """The same as `top_k`, for some rows of memory-mapped vectors, of which so many are read at once.

    vectors: (M, d_e) float16. rows: (N,) int64; positions are among these.
    """
    scores, positions = np.empty(0, np.float32), np.empty(0, np.int64)
    for start in range(0, len(rows), at_once):
        chosen = rows[start : start + at_once]
        first, end = chosen[0], chosen[-1] + 1
        in_order = end - first == len(chosen) and (np.diff(chosen) == 1).all()
        block = (vectors[first:end] if in_order else vectors[chosen]).astype(np.float32)
        release(vectors)
        block_scores, best = largest(block @ embedding, n)
        scores, order = largest(np.concatenate([scores, block_scores]), n)
        positions = np.concatenate([positions, best + start])[order]
    return scores, positions


def release(vectors):
    """Gives back what was read of memory-mapped vectors; the operating system keeps it as long as it can."""
    mapped = getattr(vectors, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


class CompressedIndex:
    """A faiss index of the vectors of a gallery's rows. index: an `index_factory` one, whose ids are rows of `vectors`."""

    def __init__(self, index, vectors, rows):
        import faiss

        self.index, self.vectors, self.order = index, vectors, np.argsort(rows)
        self.rows = rows[self.order]
        wanted = np.zeros(max(index.ntotal, 1), dtype=bool)
        wanted[rows] = True
        self.bits = np.packbits(wanted, bitorder="little")  # what is deleted, or in another folder, is not returned
        selector = faiss.IDSelectorBitmap(self.bits)
        inner = faiss.SearchParametersIVF(sel=selector, nprobe=PROBED)
        self.parameters, self.kept = faiss.SearchParametersPreTransform(index_params=inner), (selector, inner)

    def top_k(self, embedding, n):
        """The same as the function `top_k`. Fewer than n where the lists that are searched hold fewer."""
        count = min(max(CANDIDATES, n), len(self.rows))
        _, rows = self.index.search(embedding[None], count, params=self.parameters)
        rows = np.sort(rows[0][rows[0] >= 0])  # faiss fills up with -1
        scores, best = exact_top_k(self.vectors, rows, embedding, n, SCATTERED)
        return scores, self.order[np.searchsorted(self.rows, rows[best])]


def num_lists(count):
    return 2 ** max(2, round(np.log2(LISTS_PER_ROOT * max(1, count) ** 0.5)))


def open_index(path, vectors):
    """The faiss index of all memory-mapped vectors, (M, d_e): read from `path` and extended, or built and written there.

    Raises UserError where faiss is not installed or the file cannot be written.
    """
    try:
        import faiss  # optional, so imported here; also, on macOS its OpenMP library conflicts with torch's
    except ImportError:
        message = f"more than {APPROXIMATE_FROM:,} pictures need faiss: pip install faiss-cpu, or pass --exact"
        raise UserError(message) from None
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        if index.d != vectors.shape[1] or 4 * faiss.extract_index_ivf(index).nlist <= num_lists(len(vectors)):
            raise RuntimeError("made for far fewer pictures")
        if index.ntotal == len(vectors):
            return index
        index = faiss.read_index(str(path))  # one that is mapped cannot grow
    except RuntimeError as error:  # faiss raises the same for missing files, damaged ones and those of another version
        if path.exists():
            print(f"{path}: {str(error).strip().splitlines()[-1][:120]}; it is built again")
        print(f"building the search index of {len(vectors):,} pictures", flush=True)
        index = train_index(vectors)
    breadth(index, 16)  # enough to find the one list of a vector
    for start in range(index.ntotal, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK].astype(np.float32)
        index.add_with_ids(block, np.arange(start, start + len(block)))
    breadth(index, 2 * PROBED)  # for queries

    def write(temporary):
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:  # of a full disk, for example
            raise UserError(f"{path}: cannot be written ({str(error).splitlines()[-1][:120]}); free space") from None

    atomic_write(path, write)
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP)


def breadth(index, count):
    """Sets how many lists the graph of an index with MANY_LISTS looks at; an index without a graph looks at all."""
    import faiss

    graph = getattr(faiss.downcast_index(faiss.extract_index_ivf(index).quantizer), "hnsw", None)
    if graph is not None:
        graph.efSearch = count


def train_index(vectors):
    """An empty index whose lists and codes are learned from a sample of vectors, (M, d_e)."""
    import faiss

    codes = vectors.shape[1] // DIMS_PER_CODE
    lists = num_lists(len(vectors))
    nearest_lists = "_HNSW32" if lists >= MANY_LISTS else ""
    factory = f"OPQ{codes}_{codes * DIMS_PER_CODE},IVF{lists}{nearest_lists},PQ{codes}x{BITS}"
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    # With faiss's own settings, learning from 20,000 vectors took nine minutes. Matches are ranked again, so less will do.
    rotation = faiss.downcast_VectorTransform(index.chain.at(0))
    learner = faiss.ProductQuantizer(codes * DIMS_PER_CODE, codes, BITS)
    rotation.pq, rotation.max_train_points = learner, CODE_SAMPLE
    rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = 8, 2, 8
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    ivf.do_polysemous_training = False  # orders the codes for Hamming distances, which are not used
    ivf.pq.cp.niter, ivf.pq.cp.max_points_per_centroid = 10, CODE_SAMPLE // 2**BITS
    ivf.cp.niter = 8
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(vectors), min(len(vectors), TRAINING_SAMPLE), replace=False))
    index.train(rng.permutation(vectors[chosen].astype(np.float32)))
    rotation.pq = None  # belongs to Python, which frees it
    return index
