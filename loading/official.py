"""Flickr8k's official split: recognise its images by their names, and find its lists where they lie elsewhere.

The lists may not be shipped here. A digest of each stands for them: of the SHA-256 of its names, the 48 smallest, cut to 12
digits. That is enough to recognise Flickr8k, or a few hundred of its images, and images that stand in another split than there.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath

from Datasets import flickr8k

SIGNATURE = {
    "train": """
        0006e7caf591 00104296db10 00164b40b4c9 0031444812bf 003932f77baa 003b671a0e39 003ba32d446b 003db857a139 0042827cf8d5
        0044d9705f29 004e763c6d12 0056a5577e84 0057704c182d 006d9b013a3c 0070ddec60e4 007e27d30896 0094b0cef1a9 0097d0268eb8
        00a11908ceb7 00a2e24ac8e7 00c035aad3e5 00c24bffd51b 00d268b87eec 00d740d3cf7f 00dcd0d676a6 00e0c5e02c7e 00e733b9d39f
        00eef12fa9c0 00f5ec85631e 00f97ce57468 00fa2d118fb7 00fde49caf5e 00fec046d013 00ff0879a987 0108bf4d7812 010d94c5bace
        01119112a5b6 0117e9a0eefd 0118ca5cd16a 01287dbbf522 012c6368f712 0133d3387a02 01458d9edc91 0145faf62583 0152b7d58c8d
        015b8e7f03b9 016b8a8d82a5 017a98112544
    """,
    "val": """
        0082c2a8f7e9 00c0ba56f6e3 00c9fae22a87 00f0653331b2 01060bc1630d 010a6b918a32 014af96fd97d 014f9d8d383a 01aa93c42eb2
        01ad6aeea56d 01b4508be180 01eac31a850a 01f0f851598d 01f180daa364 02232b0baa41 026141fa8cac 0275cb62093d 029b32abbe40
        02e50b13133a 0326f4f3c324 038c11f04340 03a0dee1ebc0 03cc19fc56ad 03d215ac5f4f 03f774bc7a6a 040b5c20041f 0419e53fd1f0
        042bd01b2dad 04515541bf38 051d6a8a23cd 05c36a17bde8 05e4f65243b3 06556cd4bf7e 067704f6563e 06c3561e3138 07427fa60072
        0759e7274f1f 0774442aad08 07a5e0464241 08273140cf24 083c61dd42df 087d98ae2641 08be0af5c5c2 08c94025ff0c 092698b5552f
        09386c4e576c 0942c39a623c 09c994600f0c
    """,
}
TEXT_FOLDERS = ["Flickr8k_text", "Flickr_TextData"]  # what the published archives call the folder of the lists
LIST = "Flickr_8k.{}Images.txt"
KARPATHY = ["dataset_flickr8k.json", "dataset_flickr30k.json", "dataset_coco.json"]


def official_splits(images):
    """{image: "train" or "val"} of those images whose names the digests know; empty for other data than Flickr8k."""
    known = {digest: split for split, digests in SIGNATURE.items() for digest in digests.split()}
    digests = {image: hashlib.sha256(PurePosixPath(image).name.encode()).hexdigest()[:12] for image in images}
    return {image: known[digest] for image, digest in digests.items() if digest in known}


def caution(splits, is_hashed):
    """A line where images of Flickr8k are not split as officially, else "".

    splits: {image: split}, "" for none. is_hashed: whether a hash of the names gave them.
    """
    official = official_splits(splits)
    if not official or not (is_hashed or any(splits[image] not in (split, "") for image, split in official.items())):
        return ""
    development = [image for image, split in official.items() if split == "val"]
    trained = sum(splits[image] == "train" for image in development)
    looked_for = f" (of {len(development)} official development images that were looked for, {trained} are for training)"
    return (
        f"Flickr8k without its official split{looked_for if development else ''}: no score of this run may stand beside a "
        f"published one; put the lists {LIST.format('train')}, dev and test, beside the captions"
    )


def own_folders(folders):
    """Folders, and those within them where the published archives put the lists."""
    return [inner for folder in map(Path, folders) for inner in (folder, *(folder / name for name in TEXT_FOLDERS))]


def other_folders(folders, images):
    """Yields the folders that have the official lists or Karpathy's JSON beside some data folders, or attached on Kaggle.

    A neighbour with pictures of its own is another data set, whose names may be the same by chance; it is passed over, except
    for Flickr8k, whose names no other pictures have.
    """
    is_flickr8k = bool(official_splits(images))
    names = [LIST.format("train"), KARPATHY[0]]
    for folder in dict.fromkeys(Path(folder).absolute() for folder in folders):
        neighbours = [Path(entry.path) for entry in sorted_entries(folder.parent)]
        if not is_flickr8k:
            neighbours = [path for path in neighbours if not any((path / name).is_dir() for name in ("Images", "images"))]
        nested = [path / name for path in neighbours for name in [path.name, *TEXT_FOLDERS]]
        for place in [folder.parent, *neighbours, *nested]:
            if any(os.path.isfile(place / name) for name in names):
                yield place
    for name in names:
        yield from (path.parent for path in flickr8k.on_kaggle(name))


def sorted_entries(folder):
    """The folders within a folder, by name; none where it may not be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.is_dir()), key=lambda entry: entry.name)
    except OSError:
        return []
