"""Write captioned pictures into shards: python -m training.shards IN OUT, for `python main.py --data-dir 'OUT/train-*.tar'`.

A shard is a tar file in the WebDataset layout: KEY.jpg, and KEY.txt with a caption in each line.
"""

import sys
from dataclasses import dataclass, field

from utils.cli import POSITIONAL, run_cli
from utils.errors import UserError, run_command


@dataclass
class WriteShards:
    """Writes a folder of captioned pictures into shards: OUT/train-000000.tar and so on, and the same for val and test."""

    data: str = field(metadata=POSITIONAL)  # folder with Images/ and a captions file
    output: str = field(metadata=POSITIONAL)  # new folder for the shards
    size: int = 0  # scale larger pictures down to this shorter side, in pixels; 0: keep the files as they are
    per_shard: int = 1000  # pictures in a shard
    seed: int = 0  # of the order of the pictures
    skip_bad: bool = False  # leave out unusable rows and pictures instead of stopping
    num_workers: int = 4  # threads that read and scale pictures

    def __post_init__(self):
        if self.per_shard < 1 or self.size < 0:
            raise UserError(f"--per-shard {self.per_shard}, --size {self.size}: must be at least 1 and at least 0")


if __name__ == "__main__":  # before the imports below, which take seconds to load
    OPTIONS = run_command(run_cli, WriteShards, "-m training.shards", sys.argv[1:])

import io
import tarfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from captions import load_captions
from loading.splits import SPLIT_LISTS
from utils.files import atomic_dir, require_own_folder
from utils.formats import decode
from utils.images import read_ahead, resize_image

KEPT_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # of files that are copied as they are, unless they are too large
JPEG_QUALITY = 95


def shard_picture(path, size):
    """(ending, contents) of a picture file, scaled down to a shorter side of `size` pixels; smaller ones stay as they are.

    size 0: all do. Raises ValueError or OSError where it cannot be decoded.
    """
    ending, contents = path.suffix.lower(), path.read_bytes()
    picture = decode(contents, ending)  # also where it is not used, so that no broken picture gets into a shard
    shorter = min(picture.shape[:2])
    size = min(size or shorter, shorter)
    if ending in KEPT_ENDINGS and size == shorter:
        return ending[1:], contents
    ending = ".png" if ending == ".png" else ".jpg"
    scaled = cv2.cvtColor(resize_image(picture, size), cv2.COLOR_RGB2BGR)
    encoded = cv2.imencode(ending, scaled, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    return ending[1:], encoded.tobytes()


def write_shards(folder, split, captions_of, per_shard, pictures):
    """Writes SPLIT-000000.tar and so on. captions_of: a list for each picture. pictures: `read_ahead` of `shard_picture`.

    Returns (number of pictures, what is wrong with those that are left out).
    """
    count, bad, archive = 0, [], None
    progress = tqdm(zip(captions_of, pictures), total=len(captions_of), desc=split, leave=False, disable=None)
    for captions, (contents, problem) in progress:
        if problem:
            bad.append(problem)
            continue
        if count % per_shard == 0:
            if archive:
                archive.close()
            archive = tarfile.open(folder / f"{split}-{count // per_shard:06d}.tar", "w")  # noqa: SIM115  several pictures long
        key, (ending, data) = f"{count:08d}", contents
        lines = "\n".join(" ".join(caption.split()) for caption in captions)
        for member, content in ((f"{key}.{ending}", data), (f"{key}.txt", lines.encode())):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        count += 1
    if archive:
        archive.close()
    return count, bad


def shards(options):
    """What `python -m training.shards` does. options: a `WriteShards`."""
    folder = Path(options.output)
    require_own_folder(folder)
    table, image_dir, skipped = load_captions(options.data, skip_bad=options.skip_bad)
    rng, lines = np.random.default_rng(options.seed), []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_dir(folder) as temporary:
            for split in SPLIT_LISTS:
                captions_of = table[table["split"] == split].groupby("image")["caption"].agg(list).to_dict()
                names = rng.permutation(sorted(captions_of)).tolist()
                pictures = read_ahead(
                    partial(shard_picture, size=options.size), [image_dir / name for name in names], options.num_workers
                )
                captions = [captions_of[name] for name in names]
                count, bad = write_shards(temporary, split, captions, options.per_shard, pictures)
                skipped += bad
                if bad and not options.skip_bad:
                    raise UserError(f"{bad[0]}; fix or remove it, or pass --skip-bad")
                lines += [f"{-(-count // options.per_shard)} of {split}, {count:,} pictures"] if count else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); free space, or name another folder") from None
    print(f"{folder}: shards: {'; '.join(lines)}; left out: {len(skipped)}")
    print(f"python main.py PRESET --data-dir '{folder}/train-*.tar' --val-data '{folder}/val-*.tar'")


if __name__ == "__main__":
    run_command(shards, OPTIONS)
