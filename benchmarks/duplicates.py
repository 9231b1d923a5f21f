"""Duplicates: which made copies of real photographs are found, how many groups are false, and how long it takes.

    python benchmarks/duplicates.py [--images FOLDER] [--originals 600]

Copies of photographs are made in ten kinds, as `KINDS` says, and mirrored, which is not looked for. Each kind is searched for
among all originals by itself, and then all files at once. Bursts are pairs of different pictures that look alike:

- an object moved: an oval piece of another photograph, at two places, and a camera that moved by up to 2% at each edge;
- another object: two overlapping crops, 5% to 12% apart, with different pieces at the same place;
- bent: a part of the picture is pulled aside by 4% to 7% of its width, as a head or an arm that moves.

All frames have noise and are compressed. Of real photographs, the pairs with the nearest hashes are compared, and the pairs
with neighbouring numbers, which were uploaded together and are often of one scene.
"""

import re
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
from measure import ROOT, report

from search.duplicates import find_duplicates, group, same_photograph
from search.gallery import find_pictures
from search.hashes import Hashes, differing_bits, hash_file
from utils.cli import run_cli
from utils.errors import UserError, run_command

NUM_NEAREST = 2000  # pairs with the nearest hashes among the real photographs
NEIGHBOURING = 200  # difference of the numbers that begin the names of Flickr's photographs, if uploaded together
ALIKE_BITS = 112  # of pairs with neighbouring numbers; in unrelated photographs 128 bits of 256 differ


def jpeg(picture, quality=90):
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def resized(picture, factor):
    return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def saved_again(picture, rng):
    """As PNG or WebP."""
    if rng.random() < 0.5:
        return cv2.imencode(".png", picture)[1].tobytes()
    return cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, 75])[1].tobytes()


def cut(picture, left, top, right, bottom):
    """Without these shares of the sides."""
    height, width = picture.shape[:2]
    return picture[round(top * height) : height - round(bottom * height), round(left * width) : width - round(right * width)]


def cut_off_centre(picture, rng):
    x, y = rng.choice([0, 0.1], size=2)
    return cut(picture, x, y, 0.1 - x, 0.1 - y)


def tones(picture, rng):
    changed = (picture.astype(float) - 128) * rng.uniform(0.7, 1.3) + 128 + rng.uniform(-30, 30)
    return changed.clip(0, 255).astype(np.uint8)


def colours(picture, rng):
    if rng.random() < 0.5:
        return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
    return (picture * rng.uniform(0.75, 1.25, size=3)).clip(0, 255).astype(np.uint8)


def turned(picture, rng):
    """Stored rotated, with EXIF's orientation, which takes it back."""
    orientation, rotation = [(3, cv2.ROTATE_180), (6, cv2.ROTATE_90_COUNTERCLOCKWISE), (8, cv2.ROTATE_90_CLOCKWISE)][
        rng.integers(3)
    ]
    entry = b"\x12\x01\x03\x00\x01\x00\x00\x00" + bytes([orientation, 0, 0, 0])
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + b"\0\0\0\0"
    contents = jpeg(cv2.rotate(picture, rotation))
    return contents[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + contents[2:]


def bordered(picture, rng):
    height, width = picture.shape[:2]
    share, grey = rng.uniform(0.02, 0.05), int(rng.choice([0, 255]))
    y, x = round(share * height), round(share * width)
    return cv2.copyMakeBorder(picture, y, y, x, x, cv2.BORDER_CONSTANT, value=[grey] * 3)


def stamped(picture, rng):
    picture, (height, width) = picture.copy(), picture.shape[:2]
    place, size, colour = (round(0.58 * width), round(0.96 * height)), height / 450, (40, 140, 255)
    return cv2.putText(picture, "2019 08 17", place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, max(1, height // 200), cv2.LINE_AA)


KINDS = {  # (picture, rng) -> the bytes of a file
    "JPEG, quality 40": lambda picture, rng: jpeg(picture, 40),
    "saved again as PNG or WebP": saved_again,
    "half the size": lambda picture, rng: jpeg(resized(picture, 0.5)),
    "a quarter of the size": lambda picture, rng: jpeg(resized(picture, 0.25)),
    "cropped: 5% off each edge": lambda picture, rng: jpeg(cut(picture, 0.05, 0.05, 0.05, 0.05)),
    "cropped: 10% off two edges": lambda picture, rng: jpeg(cut_off_centre(picture, rng)),
    "cropped: 0 to 10% off each edge": lambda picture, rng: jpeg(cut(picture, *rng.uniform(0, 0.1, size=4))),
    "brightness and contrast": lambda picture, rng: jpeg(tones(picture, rng)),
    "grey, or a colour cast": lambda picture, rng: jpeg(colours(picture, rng)),
    "rotated, with EXIF orientation": turned,
    "border of 2% to 5%": lambda picture, rng: jpeg(bordered(picture, rng)),
    "date stamped in a corner": lambda picture, rng: jpeg(stamped(picture, rng)),
    "mirrored (not looked for)": lambda picture, rng: jpeg(cv2.flip(picture, 1)),
}


def pasted(picture, other, y, x, radius):
    """An oval piece of another picture's centre, at (y, x)."""
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    share = ((1.15 - np.hypot((rows - y) / (1.3 * radius), (columns - x) / radius)) / 0.3).clip(0, 1)[..., None]
    shifted = np.roll(other, (round(y - height / 2), round(x - width / 2)), (0, 1))
    return (picture * (1 - share) + shifted * share).astype(np.uint8)


def frame(picture, rng):
    """A frame of a burst: noise, compressed."""
    return jpeg((picture + rng.normal(0, 2, picture.shape)).clip(0, 255).astype(np.uint8))


def moved(picture, other, _, rng):
    height, width = picture.shape[:2]
    radius, distance, angle = rng.uniform(0.07, 0.12) * width, rng.uniform(0.06, 0.2) * width, rng.uniform(0, 2 * np.pi)
    y, x = rng.uniform(0.08, 0.92, size=2) * [height, width]
    to_y = np.clip(y + distance * np.sin(angle), 0.05 * height, 0.95 * height)
    to_x = np.clip(x + distance * np.cos(angle), 0.05 * width, 0.95 * width)
    if np.hypot(to_y - y, to_x - x) < 0.05 * width:  # an edge stopped it
        to_y, to_x = height - y, width - x
    second = cut(pasted(picture, other, to_y, to_x, radius), *rng.uniform(0, 0.02, size=4))
    return frame(pasted(picture, other, y, x, radius), rng), frame(second, rng)


def replaced(picture, other, third, rng):
    height, width = picture.shape[:2]
    shift, radius, (y, x) = rng.uniform(0.05, 0.12), rng.uniform(0.1, 0.16) * width, rng.uniform(0.2, 0.8, size=2)
    views = [cv2.resize(part, (width, height)) for part in (cut(picture, 0, 0, shift, 0), cut(picture, shift, 0, 0, 0))]
    return [frame(pasted(view, o, y * height, x * width, radius), rng) for view, o in zip(views, (other, third))]


def bent(picture, scale, rng):
    """scale: of the edges that are pulled, in shares of the width."""
    height, width = picture.shape[:2]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    grey = cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), (0, 0), scale * width)
    chance = cv2.GaussianBlur(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), (0, 0), 0.05 * width) ** 2
    margin = round(0.15 * min(height, width))
    inner = chance[margin:-margin, margin:-margin].astype(float)
    y, x = np.unravel_index(rng.choice(inner.size, p=inner.ravel() / inner.sum()), inner.shape)
    radius, pull, angle = rng.uniform(0.08, 0.12) * width, rng.uniform(0.04, 0.07) * width, rng.uniform(0, 2 * np.pi)
    weight = pull * np.exp(-((rows - y - margin) ** 2 + (columns - x - margin) ** 2) / (2 * radius**2)).astype(np.float32)
    maps = columns + weight * np.float32(np.cos(angle)), rows + weight * np.float32(np.sin(angle))
    second = cv2.remap(picture, *maps, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return frame(picture, rng), frame(cut(second, *rng.uniform(0, 0.02, size=4)), rng)


BURSTS = {  # (picture, two other ones, rng) -> the bytes of two files
    "an object moved": moved,
    "another object": replaced,
    "bent at an edge of an object": lambda picture, *_, rng: bent(picture, 0.02, rng),
    "bent at fine texture, as grass": lambda picture, *_, rng: bent(picture, 0.003, rng),
}


def files_of(paths):
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path in paths for stat in [path.stat()]]


def write_copies(originals, folder):
    """Writes the originals, and a copy of each in each kind. Returns {"original" or kind: paths}."""
    written = {name: [] for name in ["original", *KINDS]}
    for number, path in enumerate(originals):
        picture, rng = cv2.imread(str(path)), np.random.default_rng(number)
        for name in written:
            contents = path.read_bytes() if name == "original" else KINDS[name](picture, rng)
            written[name].append(folder / f"{number}-{len(written[name])}-{list(written).index(name)}.jpg")
            written[name][-1].write_bytes(contents)
    return written


def source_of(path):
    """The number of the original of a file that `write_copies` wrote."""
    return int(Path(path).name.split("-")[0])


def measure_copies(originals, folder, cache_dir):
    """Rows (kind, recall by itself, recall with all kinds at once, precision by itself)."""
    written = write_copies(originals, folder)

    def search(paths):
        groups = find_duplicates(files_of(paths), cache_dir, 2)
        place = {picture.path: number for number, group in enumerate(groups) for picture in group}
        pairs = [source_of(a.path) == source_of(b.path) for group in groups for a, b in combinations(group, 2)]
        return place, sum(pairs), len(pairs)

    def recall(place, paths):
        found = [place.get(str(a), -1) == place.get(str(b), -2) for a, b in zip(written["original"], paths)]
        return 100 * sum(found) / len(found)

    looked_for = [kind for kind in KINDS if not kind.startswith("mirrored")]
    place, true_together, together = search([path for kind in ["original", *looked_for] for path in written[kind]])
    rows, true_pairs, num_pairs = [], 0, 0
    for kind in KINDS:
        by_itself, num_true, num_found = search(written["original"] + written[kind])
        true_pairs, num_pairs = true_pairs + num_true, num_pairs + num_found
        at_once = f"{recall(place, written[kind]):.1f}" if kind in looked_for else ""
        rows.append([f"% found: {kind}", f"{recall(by_itself, written[kind]):.1f}", at_once])
    rows.append(
        ["% of the found pairs that are copies", f"{100 * true_pairs / num_pairs:.2f}", f"{100 * true_together / together:.2f}"]
    )
    rows.append(["pairs found", f"{num_pairs:,}", f"{together:,}"])
    return rows


def measure_bursts(originals, folder, cache_dir):
    """Rows (kind of burst, percent of the pairs that were grouped)."""
    pictures, rows = [cv2.imread(str(path)) for path in originals], []
    for kind, make in BURSTS.items():
        rng, paths = np.random.default_rng(1), []
        for number, picture in enumerate(pictures):
            for contents in make(picture, pictures[number - 1], pictures[number - 2], rng=rng):
                paths.append(folder / f"{number}-{len(paths)}-{kind.replace(' ', '-')}.jpg")
                paths[-1].write_bytes(contents)
        groups = find_duplicates(files_of(paths), cache_dir, 2)
        rows.append([f"% grouped, though a burst: {kind}", f"{100 * len(groups) / len(pictures):.1f}", ""])
    return rows


def measure_real_bursts(images, cache_dir):
    """Rows (what, count) on all photographs as they are. What was grouped is printed, to be looked at."""
    with Hashes(cache_dir) as hashes:
        hashes.update(find_pictures(images), 2)
        pictures = [picture for picture in hashes.pictures() if picture.codes is not None]
        equal = [[Path(picture.path).name for picture in found] for found in group(pictures, hashes.small)]
        bits = 2.0 * np.unpackbits(np.stack([picture.codes[0] for picture in pictures]), axis=1).astype(np.float32) - 1
        alike = np.triu(bits @ bits.T, 1)  # larger where fewer bits differ
        nearest = np.argsort(alike, axis=None)[-NUM_NEAREST:]
        neighbours = [(a, b) for a, b in zip(*np.unravel_index(nearest, alike.shape))]
        number = [int(re.match(r"\d+", Path(picture.path).name)[0]) for picture in pictures]
        order = np.argsort(number)
        for i, a in enumerate(order):
            near = (b for b in order[i + 1 :][:NEIGHBOURING] if number[b] - number[a] <= NEIGHBOURING)
            neighbours += [(a, b) for b in near if differing_bits(pictures[a].codes, pictures[b].codes)[0] <= ALIKE_BITS]
        pairs = [(pictures[a], pictures[b]) for a, b in neighbours if pictures[a].digest != pictures[b].digest]
        same = [(Path(a.path).name, Path(b.path).name) for a, b in pairs if same_photograph(a, b, hashes.small)]
    print(f"groups among all photographs: {equal}\nsame photograph among {len(pairs):,} alike ones: {same}", flush=True)
    return [[f"grouped, of {len(pairs):,} pairs of real photographs that are alike", str(len(same)), ""]]


def measure_speed(originals, folder, num_pictures):
    """Rows (what, seconds or milliseconds): hashing real files, and comparing many pictures, most of them drawn."""
    rng, cache_dir = np.random.default_rng(0), folder / "many"
    large = folder / "large.jpg"
    large.write_bytes(jpeg(cv2.resize(cv2.imread(str(originals[0])), (4000, 3000), interpolation=cv2.INTER_CUBIC)))
    paths = []
    for number, path in enumerate(originals):
        picture = cv2.imread(str(path))
        for name in ("JPEG, quality 40", "cropped: 5% off each edge"):
            paths.append(folder / f"{number}-{len(paths)}-speed.jpg")
            paths[-1].write_bytes(KINDS[name](picture, rng))
    with Hashes(cache_dir) as hashes:
        started = time.perf_counter()
        hashes.update(files_of(paths + originals), 1)
        hashing = 1000 * (time.perf_counter() - started) / len(paths + originals)
        started = time.perf_counter()
        hash_file(large)
        large_ms = 1000 * (time.perf_counter() - started)
        real = hashes.pictures()
        share = np.stack([np.unpackbits(picture.codes, axis=1) for picture in real if picture.codes is not None]).mean(axis=0)
        smalls = [hashes.database.execute("SELECT small FROM pictures WHERE small NOT NULL LIMIT 1").fetchone()[0]]
        drawn = [(f"/drawn/{number:09d}.jpg", 1, 1) for number in range(num_pictures - len(real))]
        for start in range(0, len(drawn), 1000):
            some = drawn[start : start + 1000]
            codes = np.packbits(rng.random((len(some), *share.shape)) < share, axis=2)
            hashes.write([(*f, rng.bytes(16), 224, 224, "", c.tobytes(), smalls[0]) for f, c in zip(some, codes)])
        hashes.update(files_of(paths + originals) + drawn, 1)
        started, processor = time.perf_counter(), time.process_time()
        groups = group(hashes.pictures(), hashes.small)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
    return [
        ["ms to hash a file of 224 x 224 pixels, of 12 megapixels", f"{hashing:.1f}, {large_ms:.0f}", ""],
        [f"s to compare {num_pictures:,} hashed pictures, {len(groups):,} groups among them", f"{seconds:.0f}", ""],
        ["the same: s of processor time, of all cores together", f"{processor:.0f}", ""],
    ]


def measure(
    images: str = str(ROOT.parent / "shared/flickr8k/Images"),
    originals: int = 600,
    pictures: int = 100_000,
    json_path: str = "",
):
    """Makes copies and bursts, searches them, and measures time.

    Args:
        images: folder of real photographs, with Flickr's names
        originals: photographs of which copies are made
        pictures: pictures to compare when time is measured
        json_path: file for the results
    """
    paths = sorted(Path(images).glob("*.jpg"))
    if len(paths) < originals:
        raise UserError(f"--images {images}: fewer than {originals} pictures there")
    chosen = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:originals]]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = measure_copies(chosen, folder, folder / "cache")
        rows += measure_bursts(chosen, folder, folder / "cache")
        rows += measure_real_bursts(images, folder / "cache")
        rows += measure_speed(paths[: pictures // 20], folder, pictures)
    columns = ["what", "each kind by itself", "all kinds at once"]
    note = f"{originals:,} photographs of Flickr8k (224 x 224 pixels) and a copy of each in each kind"
    report("Duplicates", columns, rows, json_path, [0, 1], note=note)


if __name__ == "__main__":
    run_command(lambda: run_cli(measure, "benchmarks/duplicates.py", sys.argv[1:]))
