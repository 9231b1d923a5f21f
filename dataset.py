"""Pictures from files to batches: reading and resizing, the cache of decoded pictures, crops, and pairs.

Pictures are RGB uint8 arrays, (height, width, 3), whose shorter side is the image tower's input size. Normalisation
is the image tower's own affair (`modules.ImageEncoder`) and happens on its device.
"""

import itertools
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it asks the network for its newest version
MOST_PIXELS = 200_000_000  # what declares more is not decoded: memory is not endless
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MOST_PIXELS)

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from storage import UserError, file_facts, key_of, replace, require_space, unfinished

HEIC_ENDINGS = {".heic", ".heif"}
PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"} | HEIC_ENDINGS
MOST_ELONGATED = 3  # width to height, or height to width; what a picture has beyond is cut off evenly at both ends
VIEW = f"shorter side resized, at most 1 to {MOST_ELONGATED}, middle square, OpenCV {cv2.__version__}"  # scored; of cache keys
CROPS = f"random crops, albumentations {A.__version__}"  # trained on; a part of cache keys
READ_AHEAD = 256  # pictures decoded before the first of them is used
SHOWN = 3  # bad pictures that an error names

cv2.setNumThreads(0)  # its threads would wait for work beside torch's, on the same cores; ours decode a picture each
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # broken files are reported by us, once and by name


# ---- reading -----------------------------------------------------------------------------------------------------


def resize_image(image, size):
    """(h, w, 3) uint8 -> the same with its shorter side at `size` pixels and the longer at most MOST_ELONGATED times that."""
    height, width = image.shape[:2]
    longest = MOST_ELONGATED * min(height, width)
    top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
    image = image[top : top + longest, left : left + longest]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (image.shape[1], image.shape[0])]
    # Averaging areas is free of aliasing when shrinking; enlarging with it would give blocks.
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def center_crop(image, size):
    """The middle (size, size, 3) of a picture whose shorter side is `size`."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def read_image(path, size):
    """Reads a picture file, turned upright as its EXIF says, as `resize_image` shapes it.

    Raises ValueError or OSError where it cannot be decoded.
    """
    if Path(path).suffix.lower() in HEIC_ENDINGS:
        return resize_image(read_heic(path), size)
    data = np.fromfile(path, dtype=np.uint8)  # not cv2.imread, which on Windows fails for names beyond ASCII
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    except cv2.error as error:
        large = "CV_IO_MAX_IMAGE" in str(error)
        raise ValueError(f"declares more than {MOST_PIXELS:,} pixels" if large else "cannot be decoded by OpenCV") from None
    if image is None:
        raise ValueError("empty, truncated or not a picture")
    return resize_image(image, size)


def read_heic(path):
    """A picture as telephones make them, (h, w, 3) uint8, upright. Raises ValueError or OSError where it cannot be decoded."""
    try:
        import pillow_heif  # only here: OpenCV does not read these, and few have the library
    except ImportError:
        raise ValueError("HEIC pictures need pillow-heif: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()
    try:
        with Image.open(path, formats=["HEIF"]) as picture:  # else the file's content would choose among all decoders
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(str(error)) from None


def read_images(paths, size, num_workers=0):
    """Yields for each path (picture, None), or (None, what is wrong with it), decoding a little ahead in threads."""

    def read(path):
        try:
            return read_image(path, size), None
        except (ValueError, OSError) as error:
            return None, f"{path}: {error}"

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        ahead = deque()
        for path in paths:
            ahead.append(pool.submit(read, path))
            if len(ahead) == READ_AHEAD:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class DecodedImages:
    """Pictures of different shapes in one memory-mapped file: len(images), images[i] -> (h, w, 3) uint8.

    folder: holds pixels.bin and shapes.npy, (n, 2) heights and widths, 0 for a picture that could not be read.
    Raises ValueError where the two do not fit each other.
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

    def __reduce__(self):  # a loader's worker maps the file itself rather than being sent its contents
        return DecodedImages, (self.folder,)

    def __getitem__(self, i):
        height, width = self.shapes[i]
        return self.pixels[self.ends[i] - height * width * 3 : self.ends[i]].reshape(height, width, 3)


def decode_images(paths, size, cache_dir, num_workers=0, skip_bad=False, bytes_to_come=0):
    """Decodes and resizes each picture once, into a cache that notices changed files.

    bytes_to_come: what will be written into the cache afterwards, for which there has to be space, too.
    Returns (images, bad): DecodedImages, and {position: what is wrong} of the pictures that could not be read.
    Raises UserError for such a picture unless skip_bad, and where the cache has too little space or cannot be written.
    """
    folder = Path(cache_dir) / f"images-{key_of(VIEW, size, file_facts(paths), skip_bad)}"
    try:
        images = DecodedImages(folder)
        if len(images) != len(paths):
            raise ValueError(f"{folder}: of other pictures")
    except (OSError, ValueError, EOFError):
        shutil.rmtree(folder, ignore_errors=True)
        require_space(cache_dir, len(paths) * size * size * 3 + bytes_to_come, "lower --size")
        write_decoded(folder, paths, size, num_workers, skip_bad)
        images = DecodedImages(folder)
    bad = {int(i): f"{paths[i]}: empty, truncated or not a picture" for i in np.flatnonzero(images.shapes[:, 0] == 0)}
    return images, bad


def write_decoded(folder, paths, size, num_workers, skip_bad):
    """Writes the folder of a DecodedImages, whole or not at all."""
    temporary = unfinished(folder)
    gigabytes = len(paths) * size * size * 1.4 * 3 / 1e9  # most photographs are about 1.4 times as long as wide
    print(f"decoding {len(paths):,} pictures into {folder.parent} (about {gigabytes:.2f} GB)")
    shapes, bad = [], []
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with open(temporary / "pixels.bin", "wb") as pixels:
            progress = tqdm(
                read_images(paths, size, num_workers), total=len(paths), desc="decoding", leave=False, unit="img", disable=None
            )
            for image, problem in progress:
                shapes.append((0, 0) if image is None else image.shape[:2])
                bad += [problem] if problem else []
                pixels.write(b"" if image is None else image.tobytes())
        if bad and not skip_bad:
            more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            raise UserError(f"{'; '.join(bad[:SHOWN])}{more}; mend or remove it, or pass --skip-bad")
        if len(bad) == len(paths):
            raise UserError(f"{Path(paths[0]).parent}: none of its {len(paths)} pictures can be decoded")
        np.save(temporary / "shapes.npy", np.array(shapes, dtype=np.int64))
        replace(temporary, folder)
    except OSError as error:
        if folder.is_dir():  # another process was faster with the same pictures
            return
        raise UserError(f"--cache-dir {folder.parent}: cannot be written ({error.strerror}); name another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_batch(images):
    """n pictures, (size, size, 3) uint8 -> (n, 3, size, size) uint8, channels last in memory as convolutions are fastest."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


# ---- pairs -------------------------------------------------------------------------------------------------------


class CLIPDataset(Dataset):
    """An image and some of its captions.

    images: pictures, or an (n, views, ...) tensor of features of a frozen tower or activations of a frozen trunk, of which one
    view is drawn.
    texts: a list of token id lists, or an (m, d_t) tensor of features of a frozen tower.
    size: of the random square crops, in pixels; crop: side of the smallest, as a share of a picture's shorter side.
    sided: for each text whether it says left or right. Where given, half of the crops, and every second view, are mirror
    images, but not beside such a text.

    An index is a (image, captions, seed) that `PairSampler` drew: all randomness comes from there, so an epoch is the
    same with any number of workers and after a resume.
    """

    def __init__(self, images, texts, size, crop=1.0, sided=None):
        self.images, self.texts, self.sided = images, texts, sided
        # The paper's one augmentation is a random square crop. New augmentations go into this list.
        self.augment = A.Compose([A.RandomSizedCrop((max(1, round(crop * size)), size), (size, size), w2h_ratio=1.0)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, captions, seed = index
        kept, sided = self.images[image], self.sided and any(self.sided[caption] for caption in captions)
        if torch.is_tensor(kept):
            view = seed % len(kept)
            picture = kept[view - view % 2 if sided else view]
        else:
            picture = self.random_crop(kept, seed, self.sided and not sided and seed % 2)
        return picture, [self.texts[caption] for caption in captions]

    def random_crop(self, picture, seed, mirrored=False):
        """A picture, (h, w, 3) uint8 -> (size, size, 3), augmented as the seed says, and mirrored where asked for."""
        self.augment.set_random_seed(seed)
        cropped = self.augment(image=picture)["image"]
        return cropped[:, ::-1] if mirrored else cropped


class PairSampler:
    """Batches of (image, captions, seed) for an epoch: every image at most once, with some of its captions.

    captions_of: for each image the positions of its captions, of which captions_per_image are drawn, none twice unless there
    are fewer. Images that do not fill the last batch sit an epoch out, because a smaller batch would be an easier task. Set
    `epoch` before each epoch.

    micro_batch_size: divides batch_size; each batch then comes in parts of this size, twice in a row, as
    `gradient_cache.backward` takes them. ranks: (rank, how many there are); each has its own parts of every batch.

    sources: for each generated image, which stand last in captions_of, the set of positions of the real images whose
    caption it was made from. A batch has `generated` of them, none beside a real or generated picture of the same caption;
    an epoch is then a pass over the real images.

    Attributes: steps, the batches of an epoch, parts, the micro-batches of a batch, own, the positions of this rank's, and
    start, the first step of an epoch that was begun before.
    """

    def __init__(
        self, captions_of, batch_size, seed, micro_batch_size=0, sources=(), generated=0, ranks=(0, 1), captions_per_image=1
    ):
        self.captions_of, self.batch_size, self.seed, self.epoch = captions_of, batch_size, seed, 0
        self.captions_per_image = captions_per_image
        self.real, self.sources, self.generated = len(captions_of) - len(sources), sources, generated
        self.steps, self.start = self.real // (batch_size - generated), 0
        rank, size = ranks
        self.parts = max(size, batch_size // (micro_batch_size or batch_size))
        self.own = np.array_split(range(self.parts), size)[rank]

    def __len__(self):
        return (self.steps - self.start) * (1 if len(self.own) == 1 else 2 * len(self.own))

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.real)
        if self.generated:
            order = self.with_generated(order, rng)
        own, count = [self.captions_of[image] for image in order], self.captions_per_image
        captions = [rng.choice(choices, count, replace=len(choices) < count).tolist() for choices in own]
        seeds = rng.integers(2**31, size=len(order)).tolist()
        draws = list(zip(order.tolist(), captions, seeds))
        bounds = np.linspace(0, self.batch_size, self.parts + 1).round().astype(int)
        for start in range(self.start * self.batch_size, self.steps * self.batch_size, self.batch_size):
            parts = [draws[start + bounds[i] : start + bounds[i + 1]] for i in self.own]
            yield from parts if len(parts) == 1 else parts + parts

    def with_generated(self, order, rng):
        """Real images in order -> images in order of which each batch has its share of generated ones."""
        rest, batches = itertools.cycle(self.real + rng.permutation(len(self.sources))), []
        for start in range(0, self.steps * (self.batch_size - self.generated), self.batch_size - self.generated):
            batch = order[start : start + self.batch_size - self.generated].tolist()
            sources = set(batch)
            for image in itertools.islice(rest, len(self.sources)):
                if len(batch) == self.batch_size:
                    break
                if sources.isdisjoint(self.sources[image - self.real]):
                    batch.append(image)
                    sources |= self.sources[image - self.real]
            if len(batch) < self.batch_size:
                real = self.batch_size - self.generated
                raise UserError(
                    f"--extra-data: only {len(batch) - real} of its {len(self.sources)} pictures go beside {real} real ones of "
                    "other captions; generate more, or lower --extra-fraction"
                )
            batches.append(rng.permutation(batch))  # micro-batches are then alike
        return np.concatenate(batches)


def pad(texts, pad_id):
    """n lists of token ids -> (input_ids, attention_mask), (n, l), l the longest; features pass, with None as their mask."""
    if torch.is_tensor(texts[0]):
        return torch.stack(list(texts)), None
    length = max(map(len, texts))
    input_ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in texts])
    return input_ids, torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts])


def collate(pairs, pad_id):
    """n images with k captions each -> {"image", "text", "attention_mask"}: (n, 3, size, size), (k n, l), (k n, l)."""
    images, texts = zip(*pairs)
    image = torch.stack(images) if torch.is_tensor(images[0]) else as_batch(images)
    text, attention_mask = pad(list(itertools.chain(*texts)), pad_id)
    return {"image": image, "text": text, "attention_mask": attention_mask}


def train_loader(dataset, sampler, pad_id, num_workers=0, pin_memory=False):
    """A DataLoader of the sampler's batches, as `collate` makes them."""
    # Features are fetched faster than they are sent; more workers than cores only wait for each other.
    workers = 0 if torch.is_tensor(dataset.images) else min(num_workers, os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=partial(collate, pad_id=pad_id),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )
