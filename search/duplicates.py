"""Files that are the same photograph: equal bytes, or saved again, resized, lightly cropped, recoloured.

Perceptual hashes (`search.hashes`) propose pairs. One picture of a pair is then moved and scaled onto the other, and their
pixels are compared: in two pictures of a burst something has moved, which a hash does not see.
"""

import functools
import os
from collections import defaultdict, deque
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from search.hashes import BITS, BOXES, MIN_SPREAD, SIDE, TINY, Hashes, differing_bits
from utils import plots
from utils.folders import NUM_NAMED, printable
from utils.images import read_image

MAX_BITS = 76  # differing bits of a pair that is found; among photographs, one pair in some ten million is as close by chance
MAX_BITS_IN_GROUP = 96  # differing bits to the best copy, if a picture was found through another one of its group
TABLES, TABLE_BITS = 4, 18  # two hashes are compared where one of TABLES runs of TABLE_BITS bits differs in one bit at most
MAX_NEIGHBOURS = 32  # pictures whose pixels one is compared with, the nearest: drawings and scans can all have near hashes
QUERIES = 256  # pictures whose neighbours are looked for at once
MIN_CORRELATION = 0.5  # of pixels at CORRELATED_SIDE, below which a small shift does not make two pictures the same
CORRELATED_SIDE = 32  # pixels
COLOURED = 20  # chroma in CIELAB from which on a colour has a hue
GREY = 30  # chroma which grey and sepia pictures stay below
MAX_CHROMA, MAX_TURN, MIN_TURNED = (
    45,
    np.pi / 3,
    25,
)  # differences that are another colour: of chroma; of hue, and then of chroma
MAX_LIGHTNESS = 12  # mean difference of a picture to its grey version
MAX_RECOLOURED = 0.02  # share of the picture that may have another colour
DETAIL = 0.85  # of the smaller side of the smaller picture: the resolution at which pixels are compared
REGISTERED_SIDE = 64  # pixels; registration is accurate to a small part of a pixel
MAX_INNER = 0.68  # difference at any place, relative to the contrast there, which copies stay below
MIN_CONTRAST = 0.2  # that is counted, so that noise in an even sky is no difference; of the contrast of the whole picture
FRAME = 0.14  # of the sides: in this frame a date may be stamped, or a border be left
MAX_OUTER = 0.4  # difference there, relative to the whole picture's contrast, above which an area counts as changed
MAX_OUTER_SHARE = 0.035  # of the picture, that may be changed
MAX_SHEAR = 0.02  # of the registration: copies are not rotated
MIN_COMMON = 0.15  # share of the picture that both have, and where neither is clipped
DARK, BRIGHT = 5, 250  # grey levels from which on a picture may be clipped
NUM_DRAWN, NUM_COLUMNS = 6, 4  # groups, and files of each, in the drawing
DRAWN_PIXELS, NAME_LENGTH = 240, 28
BEST, EQUAL, SAME = "best copy", "equal bytes", "same photograph"


def find_duplicates(files, cache_dir, num_workers=0, verbose=False):
    """The groups of files that are the same photograph, the largest first.

    files: (path, bytes, modification time in ns) of each. cache_dir: folder where hashes are kept; None: they are not.
    Returns lists of `search.hashes.Picture`, the best copy first: most pixels, then most bytes per pixel, then oldest. Each
    of the others is compared with the best one; relation says how it matches. Pictures that cannot be read are left out and
    printed: some of them or, if verbose, all with the reasons.
    Raises UserError where cache_dir cannot be used.
    """
    with Hashes(cache_dir) as hashes:
        problems = hashes.update(files, num_workers)
        if problems:
            names = ", ".join(printable(os.path.basename(problem.path)) for problem in problems[:NUM_NAMED])
            more = ", ..." if len(problems) > NUM_NAMED else ""
            print(f"left out {len(problems):,} pictures that cannot be decoded" + ("" if verbose else f": {names}{more}"))
            for problem in problems if verbose else ():
                print(f"  {printable(problem)}")
        return group(hashes.pictures(), hashes.small)


def group(pictures, read_small):
    """As `find_duplicates`, for `search.hashes.Picture`s. read_small: path -> small grey version, (SIDE, SIDE) uint8."""
    pictures = sorted(pictures, key=lambda p: (-p.width * p.height, -p.bytes / (p.width * p.height), p.date, p.path))
    equal = defaultdict(list)
    for picture in pictures:
        equal[picture.digest].append(picture)
    firsts = [copies[0] for copies in equal.values()]
    read_small, groups = functools.lru_cache(maxsize=4096)(read_small), []
    for matches in matching(firsts, read_small):
        best, *others = (picture for first in matches for picture in equal[first.digest])
        if others:
            best.relation = BEST
            for picture in others:
                picture.relation = EQUAL if picture.digest == best.digest else SAME
            groups.append([best, *sorted(others, key=lambda picture: picture.relation != EQUAL)])
    return sorted(groups, key=len, reverse=True)


def matching(pictures, read_small):
    """Yields each picture that is the best of its copies, best first, with its copies: a list of lists.

    Pictures that are near a copy in turn are compared, too, but always with the best: else a burst would become one chain.
    """
    neighbours, grouped = near_pairs(pictures), set()
    for i, best in enumerate(tqdm(pictures, desc="comparing", leave=False, unit="img", disable=None)):
        if i in grouped:
            continue
        found, seen, pending = [best], {i}, deque([i])
        while pending:
            for j in neighbours[pending.popleft()]:
                if j < i or j in seen or j in grouped:  # those before i are the best of groups of their own
                    continue
                seen.add(j)
                if same_photograph(best, pictures[j], read_small):
                    found.append(pictures[j])
                    grouped.add(j)
                    pending.append(j)
        yield found


def near_pairs(pictures):
    """{position: positions of pictures with a hash that differs in at most MAX_BITS bits}, in both directions.

    Of each picture the MAX_NEIGHBOURS nearest, and those of which it is one. Found with faiss's multi-index hashing (Norouzi et
    al. 2012).
    """
    import faiss

    rows = np.array([i for i, picture in enumerate(pictures) if picture.codes is not None], dtype=np.int64)
    neighbours = defaultdict(set)
    if len(rows) < 2:
        return neighbours
    codes = np.stack([pictures[i].codes for i in rows])  # (n, len(BOXES), BITS / 8)
    index = faiss.IndexBinaryMultiHash(BITS, TABLES, TABLE_BITS)
    index.nflip = 1
    index.add(np.ascontiguousarray(codes[:, 0]))
    for start in tqdm(range(0, len(rows), QUERIES), desc="near hashes", leave=False, disable=None):
        bits_of = [{} for _ in rows[start : start + QUERIES]]  # {row: fewest differing bits} for each of them
        for box in range(len(BOXES)):
            ends, bits, found = index.range_search(np.ascontiguousarray(codes[start : start + QUERIES, box]), MAX_BITS + 1)
            for query, (first, end) in enumerate(zip(ends[:-1].astype(int), ends[1:].astype(int))):
                nearest = np.argsort(bits[first:end], kind="stable")[: MAX_NEIGHBOURS + 1] + first  # one is itself
                for row, count in zip(found[nearest].tolist(), bits[nearest].tolist()):
                    bits_of[query][row] = min(count, bits_of[query].get(row, BITS))
        for query, others in enumerate(bits_of):
            others.pop(start + query, None)
            for other in sorted(others, key=lambda row: (others[row], row))[:MAX_NEIGHBOURS]:
                i, j = int(rows[start + query]), int(rows[other])
                neighbours[i].add(j)
                neighbours[j].add(i)
    return neighbours


def same_photograph(a, b, read_small):
    """Whether two `search.hashes.Picture`s that have a hash are the same photograph, by their small grey versions."""
    bits, box, a_is_cropped = differing_bits(a.codes, b.codes)
    if bits > MAX_BITS_IN_GROUP:
        return False
    if not a_is_cropped:
        a, b = b, a
    if a.colours is not None and b.colours is not None and recoloured(a.colours, b.colours, BOXES[box]):
        return False
    side = min(SIDE, int(DETAIL * min(a.width, a.height, b.width, b.height)))
    a, b = (read_small(picture.path) for picture in (a, b))
    if correlation(a, b, BOXES[box]) < MIN_CORRELATION:
        return False
    a, b = (reduce(picture, side) for picture in (a, b))
    warp = box_warp(BOXES[box], side)
    if no_difference(a, b, warp):  # most copies are not cropped, or just so, and need no registration
        return True
    warp = register(a, b, warp)
    return warp is not None and no_difference(a, b, warp)


def recoloured(a, b, box):
    """Whether parts of two pictures have another colour, as two icons may: red and blue. Grey and sepia copies have not.

    a, b: `Picture.colours`; b shows a box of a.
    """
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    a = cv2.warpAffine(a, box_warp(box, TINY), (TINY, TINY), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    (light_a, *a), (light_b, *b) = (cv2.split(cv2.cvtColor(c.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)) for c in (a, b))
    a, b = (x + 1j * y for x, y in (a, b))  # the angle of these is the hue, their length the chroma
    grey_a, grey_b = (np.quantile(np.abs(chroma), 1 - MAX_RECOLOURED) < GREY for chroma in (a, b))
    if grey_a != grey_b:
        return bool(np.abs(light_a - light_b).mean() > MAX_LIGHTNESS)
    difference, turn = np.abs(a - b), np.abs(np.angle(a * b.conj()))
    both = np.minimum(np.abs(a), np.abs(b)) > COLOURED
    other = (difference > MAX_CHROMA) | both & (turn > MAX_TURN) & (difference > MIN_TURNED)
    return bool(other.mean() > MAX_RECOLOURED)


def correlation(a, b, box):
    """Of two small grey pictures' pixels at CORRELATED_SIDE, where b shows a box of a."""
    side = CORRELATED_SIDE
    a, b = (cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) for picture in (a, b))
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    a = cv2.warpAffine(a, box_warp(box, side), (side, side), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-6))


def reduce(small, side):
    """A small grey picture at a lower resolution, (side, side) uint8, smoothed, as copies may be a part of a pixel apart."""
    small = small if side == len(small) else cv2.resize(small, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(small, (0, 0), 1.2)


def box_warp(box, side):
    """The matrix, (2, 3), that maps a pixel (x, y, 1) of a picture to that of another one, of which it shows only a box."""
    left, top, right, bottom = box
    scale = np.array([right - left, bottom - top])
    shift = np.array([left, top]) * side + (scale - 1) / 2  # the centre of the first pixel is at 0, not at a half
    return np.column_stack([np.diag(scale), shift]).astype(np.float32)


def register(a, b, warp):
    """Improves a warp of b's pixels to a's by maximising their correlation (ECC; Evangelidis and Psarakis 2008).

    a, b: (side, side) uint8. First at a low resolution. Returns None where that does not converge.
    """
    low = min(REGISTERED_SIDE, len(a))
    try:
        for side, steps in ((low, 40), (len(a), 8)):
            small_a, small_b = (cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) for picture in (a, b))
            warp = scale_warp(warp, side / (len(a) if side == low else low))
            stop = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, steps, 1e-4)
            _, warp = cv2.findTransformECC(small_b, small_a, warp, cv2.MOTION_AFFINE, stop, not_clipped(small_a), 3)
    except cv2.error:
        return None
    return warp if max(abs(warp[0, 1]), abs(warp[1, 0])) <= MAX_SHEAR else None


def scale_warp(warp, factor):
    """The same warp of pictures that are `factor` times as large."""
    offset = np.full(2, (factor - 1) / 2)
    shift = factor * warp[:, 2] + offset - warp[:, :2] @ offset
    return np.column_stack([warp[:, :2], shift]).astype(np.float32)


def not_clipped(picture):
    """1 where a picture and the pixels beside are neither black nor white, else 0: (side, side) uint8."""
    return cv2.erode(cv2.inRange(picture, DARK, BRIGHT) // 255, np.ones((3, 3)), borderType=cv2.BORDER_REPLICATE)


def no_difference(a, b, warp):
    """Whether b has what the warp takes from a at each place, up to a change of tones. a, b: (side, side) uint8.

    Near the edges a small part may differ: a date, a signature, what is left of a border.
    """
    rest = remaining(a, b, warp)
    if rest is None:
        return False
    tones = b / max(b[not_clipped(b) > 0].std(), MIN_SPREAD)
    contrast = np.maximum(local_mean(tones**2) - local_mean(tones) ** 2, 0)
    differences = np.maximum(local_mean(rest**2), 0)
    frame = round(FRAME * len(a))
    inner = (slice(frame, -frame), slice(frame, -frame))
    large = differences > MAX_OUTER**2
    outer_share = (large.sum() - large[inner].sum()) / large.size
    relative = differences / (contrast + MIN_CONTRAST**2)
    return bool(relative[inner].max() <= MAX_INNER**2 and outer_share <= MAX_OUTER_SHARE)


def local_mean(values):
    """The mean around each place of an array, (side, side), over a twelfth of the sides."""
    width = max(3, round(len(values) / 12))
    return cv2.blur(values, (width, width), borderType=cv2.BORDER_REFLECT)


def remaining(a, b, warp):
    """What b differs from a by: (side, side) float32 in standard deviations; None where they have too little in common.

    A cubic polynomial takes the tones of one to those of the other, as brightness, contrast and gamma do.
    """
    side, flags = len(a), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(a.astype(np.float32), warp, (side, side), flags=flags)
    inside = cv2.warpAffine(not_clipped(a).astype(np.float32), warp, (side, side), flags=flags) > 0.999
    inside &= not_clipped(b) > 0
    if inside.mean() < MIN_COMMON:
        return None
    x, y = moved[inside], b[inside].astype(np.float32)
    if x.std() < y.std():
        x, y = y, x  # the picture with more contrast predicts the other
    x, y = ((values - values.mean()) / max(values.std(), MIN_SPREAD) for values in (x, y))
    powers = np.stack([np.ones_like(x), x, x * x, x * x * x])
    weights = np.linalg.lstsq(powers @ powers.T, powers @ y, rcond=None)[0]  # least squares by the normal equations
    rest = np.zeros((side, side), dtype=np.float32)
    rest[inside] = weights @ powers - y
    return rest


def as_records(groups):
    """Groups as plain values, for JSON."""
    names = ("path", "width", "height", "bytes", "date", "relation")
    return [[{name: getattr(picture, name) for name in names} for picture in copies] for copies in groups]


def draw_duplicates(groups, output):
    """Draws the first copies of the first groups into a PNG, a row each, the best copy at the left. groups: one at least."""
    groups = groups[:NUM_DRAWN]
    columns = min(NUM_COLUMNS, max(map(len, groups)))
    figure = plt.figure(figsize=(2.3 * columns, 3.1 * len(groups)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # inches, between the lines of text
    for subfigure, copies in zip(figure.subfigures(len(groups), 1, squeeze=False).flat, groups):
        shown = copies[:columns]
        hidden = f", {len(copies) - columns} more not shown" if len(copies) > columns else ""
        subfigure.suptitle(f"{len(copies)} files{hidden}", fontsize=10, x=0.01, ha="left")
        titles = ["\n".join([Path(p.path).name[-NAME_LENGTH:], *p.label().rsplit(", ", 1)]) for p in shown]
        pictures = [read_image(picture.path, DRAWN_PIXELS) for picture in shown]
        plots.draw_row(subfigure.subplots(1, columns, squeeze=False)[0], pictures, titles, correct=0)
    plots.save(figure, output)
