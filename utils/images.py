"""Read image files, and cache the decoded images.

An image is an RGB uint8 array, (height, width, 3), whose shorter side is the image encoder's input size. It is normalised
later, in `modules.ImageEncoder`, on the encoder's device.
"""

import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.cache import cache_key, file_stats, require_space
from utils.errors import UserError
from utils.files import read_bytes, replace, temporary_path
from utils.formats import BROKEN, DECODING, PictureError, decode

MAX_ASPECT_RATIO = 3  # of the longer to the shorter side; more is cut off evenly at both ends
# How images are preprocessed for evaluation; part of cache keys.
VIEW = f"{DECODING}, shorter side resized, at most 1 to {MAX_ASPECT_RATIO}, centre crop, OpenCV {cv2.__version__}"
AREA = "shortest area"  # how images are resized for an encoder, unless it was trained on another way
PREFETCH = 256  # images decoded ahead
NUM_SHOWN = 3  # bad images listed in an error
CLOSER = 0.85  # side of a closer crop, as a share of the centre crop's
AGAIN = "decode-again"  # a file beside decoded images, where some could not be read for a reason that may pass
NUM_MEASURED = 50  # pictures whose decoded size stands for that of all

cv2.setNumThreads(0)  # its threads would compete with torch's for the cores; we use one thread per image instead


def resize_image(image, size, resize=AREA):
    """(h, w, 3) uint8 -> resized: the shorter side is `size` pixels, the longer at most MAX_ASPECT_RATIO times that.

    resize: AREA, or two words of open_clip, whose pixels it then gives: shortest or squash (to a square); bicubic or bilinear.
    """
    if resize != AREA:
        return resize_as_open_clip(image, size, *resize.split())
    height, width = image.shape[:2]
    max_side = MAX_ASPECT_RATIO * min(height, width)
    top, left = max(0, height - max_side) // 2, max(0, width - max_side) // 2
    image = image[top : top + max_side, left : left + max_side]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    # INTER_AREA avoids aliasing when shrinking, but gives visible blocks when enlarging.
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def resize_as_open_clip(image, size, mode, interpolation):
    """`resize_image` for a model that was trained on open_clip's preprocessing, which resizes with PIL."""
    height, width = image.shape[:2]
    side = min(height, width)
    shape = (size, size) if mode == "squash" else (size * width // side, size * height // side)
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    image = np.array(Image.fromarray(image).resize(shape, method))
    for axis in (0, 1):
        length = image.shape[axis]
        cut = max(0, length - MAX_ASPECT_RATIO * size) // 2
        # Its centre crop rounds the corner to even numbers, ours down; a row less in front of it makes both the same.
        shift = round((length - size) / 2) - (length - size) // 2
        image = image.swapaxes(0, axis)[cut + shift : length - cut].swapaxes(0, axis)
    return image


def center_crop(image, size):
    """The centre (size, size, 3) of an image whose shorter side is `size`."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def view_crops(image, size, views):
    """The (size, size, 3) crops that stand for an image whose shorter side is `size`.

    1: the centre crop; 2: and its mirror image; 4: and a closer centre crop and its mirror image.
    """
    crops = [center_crop(image, size)]
    if views == 4:
        crops.append(resize_image(center_crop(image, round(CLOSER * size)), size))
    return crops if views == 1 else crops + [crop[:, ::-1] for crop in crops]


def read_image(path, size, resize=AREA):
    """Reads an image file, applies its EXIF rotation and resizes it with `resize_image`.

    Raises `utils.formats.PictureError` where it cannot be decoded, OSError where it cannot be read.
    """
    return decode_image(read_bytes(path), size, resize, Path(path).suffix)  # not cv2.imread: it fails for some names on Windows


def decode_image(contents, size, resize=AREA, ending=""):
    """As `read_image`, from the bytes of an image file, whose name has this ending."""
    return resize_image(decode(contents, ending), size, resize)


def read_images(paths, size, num_workers=0, resize=AREA):
    """Yields (image, None) or (None, its `Problem`) for each path, as `read_ahead` does."""
    return read_ahead(partial(read_image, size=size, resize=resize), paths, num_workers)


class Problem(str):
    """What is wrong with a file, as a line that names it. path: of it. passing: it could not be read now, but may be later."""

    def __new__(cls, path, error):
        known = isinstance(error, OSError) and error.strerror
        problem = super().__new__(cls, f"{path}: cannot be read ({error.strerror})" if known else f"{path}: {error}")
        problem.path = str(path)
        problem.passing = error.passing if isinstance(error, PictureError) else True
        return problem


def read_ahead(read, paths, num_workers):
    """Yields (read(path), None) or (None, its `Problem`) for each path; threads read PREFETCH files ahead.

    read: raises `utils.formats.PictureError` where it cannot decode a file, OSError where it cannot read it.
    """

    def try_to_read(path):
        try:
            return read(path), None
        except MemoryError:
            return None, Problem(path, PictureError("needs more memory than there is", passing=True))
        except (ValueError, OSError) as error:
            return None, Problem(path, error)

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        pending = deque()
        for path in paths:
            pending.append(pool.submit(try_to_read, path))
            if len(pending) == PREFETCH:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


class DecodedImages:
    """Images of different shapes in one memory-mapped file: len(images), images[i] -> (h, w, 3) uint8.

    folder: holds pixels.bin and shapes.npy, (n, 2) heights and widths, 0 for an image that could not be read.
    Raises ValueError where their sizes do not match.
    """

    def __init__(self, folder):
        self.folder = folder
        self.shapes = np.load(folder / "shapes.npy")
        self.ends = np.cumsum(self.shapes[:, 0] * self.shapes[:, 1] * 3)
        if (folder / "pixels.bin").stat().st_size != self.ends[-1]:
            raise ValueError(f"{folder}: truncated")
        self.pixels = np.memmap(folder / "pixels.bin", mode="r", dtype=np.uint8)

    def __len__(self):
        return len(self.shapes)

    def __reduce__(self):  # loader workers map the file themselves instead of receiving its contents
        return DecodedImages, (self.folder,)

    def __getitem__(self, i):
        height, width = self.shapes[i]
        return self.pixels[self.ends[i] - height * width * 3 : self.ends[i]].reshape(height, width, 3)


def decode_images(paths, size, cache_dir, num_workers=0, skip_bad=False, bytes_to_come=0, resize=AREA):
    """Decodes and resizes each image once, into a cache; changed files are decoded again.

    size, resize: as for `resize_image`.
    bytes_to_come: further bytes that will be written to the cache later; the space for them is checked, too.
    Returns (images, bad): DecodedImages, and {position: what is wrong} of the unreadable images.
    Raises UserError for such an image unless skip_bad, and where the cache has too little space or cannot be written.
    """
    view = VIEW if resize == AREA else (DECODING, resize)
    folder = Path(cache_dir) / f"images-{cache_key(view, size, file_stats(paths), skip_bad)}"
    try:
        if (folder / AGAIN).exists():
            raise ValueError(f"{folder}: without pictures that may be readable now")
        images = DecodedImages(folder)
        if len(images) != len(paths):
            raise ValueError(f"{folder}: for other images")
    except (OSError, ValueError, EOFError):
        shutil.rmtree(folder, ignore_errors=True)
        num_bytes = decoded_bytes(paths, size, resize)
        require_space(cache_dir, num_bytes + bytes_to_come, "lower --size")
        print(f"decoding {len(paths):,} pictures into {cache_dir} (about {num_bytes / 1e9:.2f} GB)")
        write_decoded(folder, paths, size, num_workers, skip_bad, resize)
        images = DecodedImages(folder)
    bad = {int(i): f"{paths[i]}: {BROKEN}" for i in np.flatnonzero(images.shapes[:, 0] == 0)}
    return images, bad


def decoded_bytes(paths, size, resize=AREA):
    """About how many bytes pictures take when they are decoded, from at most NUM_MEASURED of them, evenly spaced."""
    some = read_images(paths[:: -(-len(paths) // NUM_MEASURED)], size, 0, resize)
    sizes = [image.nbytes for image, _ in some if image is not None]
    return len(paths) * sum(sizes) / max(1, len(sizes))


def write_decoded(folder, paths, size, num_workers, skip_bad, resize):
    """Writes the folder of a DecodedImages; on failure it leaves nothing behind."""
    temporary = temporary_path(folder)
    shapes, bad = [], []
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with open(temporary / "pixels.bin", "wb") as pixels:
            pictures = read_images(paths, size, num_workers, resize)
            progress = tqdm(pictures, total=len(paths), desc="decoding", leave=False, unit="img", disable=None)
            for image, problem in progress:
                shapes.append((0, 0) if image is None else image.shape[:2])
                bad += [problem] if problem else []
                pixels.write(b"" if image is None else image.tobytes())
        if bad and not skip_bad:
            more = f" and {len(bad) - NUM_SHOWN} more" if len(bad) > NUM_SHOWN else ""
            raise UserError(f"{'; '.join(bad[:NUM_SHOWN])}{more}; fix or remove it, or pass --skip-bad")
        if len(bad) == len(paths):
            raise UserError(f"{Path(paths[0]).parent}: none of its {len(paths)} pictures can be decoded")
        np.save(temporary / "shapes.npy", np.array(shapes, dtype=np.int64))
        if any(problem.passing for problem in bad):
            (temporary / AGAIN).touch()
        replace(temporary, folder)
    except OSError as error:
        if folder.is_dir():  # another process has just written the same images
            return
        raise UserError(f"--cache-dir {folder.parent}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_batch(images):
    """n images, (size, size, 3) uint8 -> (n, 3, size, size) uint8, channels last in memory: fastest for convolutions."""
    import torch  # only here: this import takes seconds, and a search that embeds no picture does without

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
