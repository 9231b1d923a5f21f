"""Training batches: random crops, a sampler that draws each image at most once per batch, and batches with named keys."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else albumentations looks online for a newer version

import itertools

import albumentations as A
import numpy as np
import torch
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.images import as_batch

CROPS = f"random crops, albumentations {A.__version__}"  # part of cache keys


class CLIPDataset(Dataset):
    """An image and some of its captions.

    images: decoded images, or an (n, crops, ...) tensor of a frozen encoder's features or a frozen trunk's activations, of
    which one crop is chosen.
    texts: a list of token id lists, or an (m, d_t) tensor of features of a frozen encoder.
    size: of the random square crops, in pixels; crop: side of the smallest, as a fraction of an image's shorter side.
    no_flip: for each text whether it mentions left or right. Where given, half of the crops, and every second cached crop, are
    flipped horizontally, except with such a text.

    An index is an (image, captions, seed) from `PairSampler`. All randomness comes from it, so an epoch is the same with any
    number of workers and after a resume.
    """

    def __init__(self, images, texts, size, crop=1.0, no_flip=None, image_key="image", text_key="text"):
        self.images, self.texts, self.no_flip = images, texts, no_flip
        self.image_key, self.text_key = image_key, text_key  # the kind of data, as in `collate`
        # The paper's one augmentation is a random square crop. New augmentations go into this list.
        self.augment = A.Compose([A.RandomSizedCrop((max(1, round(crop * size)), size), (size, size), w2h_ratio=1.0)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, captions, seed = index
        no_flip = self.no_flip and any(self.no_flip[caption] for caption in captions)
        if self.image_key == "image":
            picture = self.random_crop(self.images[image], seed, self.no_flip and not no_flip and seed % 2)
        else:
            crops = self.images[image]
            chosen = seed % len(crops)
            picture = crops[chosen - chosen % 2 if no_flip else chosen]
        return picture, [self.texts[caption] for caption in captions], image

    def random_crop(self, picture, seed, hflip=False):
        """An image, (h, w, 3) uint8 -> (size, size, 3), augmented with the given seed and flipped if hflip."""
        self.augment.set_random_seed(seed)
        cropped = self.augment(image=picture)["image"]
        return cropped[:, ::-1] if hflip else cropped


class PairSampler:
    """The batches of one epoch, lists of (image, captions, seed): a real image at most once, with some of its captions.

    captions_of: for each image the positions of its captions; captions_per_image of them are drawn, without replacement where
    there are enough. Images that do not fill the last batch are left out of the epoch, because a smaller batch would be an
    easier task. Set `epoch` before each epoch.

    micro_batch_size: divides batch_size; each batch is then split into micro-batches of this size, which are yielded twice,
    as `gradient_cache.backward` needs them. ranks: (rank, number of ranks); each rank has its own micro-batches of every batch.

    sources: for each generated image the set of positions of the real images with the caption that it was generated from;
    generated images come last in captions_of. Each batch has `generated` of them, none together with a real or generated
    image of the same caption. An epoch is then one pass over the real images.

    Attributes: steps (batches per epoch), parts (micro-batches per batch), local_parts (positions of this rank's
    micro-batches), and start (the first step of a resumed epoch).
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
        self.local_parts = np.array_split(range(self.parts), size)[rank]

    def __len__(self):
        return (self.steps - self.start) * (1 if len(self.local_parts) == 1 else 2 * len(self.local_parts))

    def __iter__(self):
        draws = self.draw(np.random.default_rng([self.seed, self.epoch]))
        bounds = np.linspace(0, self.batch_size, self.parts + 1).round().astype(int)
        for start in range(self.start * self.batch_size, self.steps * self.batch_size, self.batch_size):
            parts = [draws[start + bounds[i] : start + bounds[i + 1]] for i in self.local_parts]
            yield from parts if len(parts) == 1 else parts + parts

    def draw(self, rng):
        """An epoch's images in random order, each with its captions and a seed: a list of (image, captions, seed).

        Each image is drawn once, so that no batch has it twice. captions: a list of captions_per_image of captions_of[image],
        all different where there are enough. seed: an int from 0 to 2**31 - 1, of the image's crop. rng: a NumPy Generator,
        which draws everything.
        """
        # BEGIN SOLUTION
        order = rng.permutation(self.real)
        if self.generated:
            order = self.with_generated(order, rng)
        choices_of, count = [self.captions_of[image] for image in order], self.captions_per_image
        captions = [rng.choice(choices, count, replace=len(choices) < count).tolist() for choices in choices_of]
        return list(zip(order.tolist(), captions, rng.integers(2**31, size=len(order)).tolist()))
        # END SOLUTION

    def with_generated(self, order, rng):
        """The order of the real images -> an order in which each batch also has `generated` generated images."""
        generated_images, batches = itertools.cycle(self.real + rng.permutation(len(self.sources))), []
        for start in range(0, self.steps * (self.batch_size - self.generated), self.batch_size - self.generated):
            batch = order[start : start + self.batch_size - self.generated].tolist()
            sources = set(batch)
            for image in itertools.islice(generated_images, len(self.sources)):
                if len(batch) == self.batch_size:
                    break
                if sources.isdisjoint(self.sources[image - self.real]):
                    batch.append(image)
                    sources |= self.sources[image - self.real]
            if len(batch) < self.batch_size:
                real = self.batch_size - self.generated
                raise UserError(
                    f"--extra-data: a batch needs {self.generated} generated pictures with other captions than its {real} real "
                    f"ones, but only {len(batch) - real} of {len(self.sources)} fit; generate more, or lower --extra-fraction"
                )
            batches.append(rng.permutation(batch))  # mixes real and generated images over the micro-batches
        return np.concatenate(batches)


class RepeatingSampler(PairSampler):
    """As `PairSampler`, but drawn from all pairs, as most training loops do: an image may be in a batch with several captions.

    Its other captions then count as wrong, unless the targets say otherwise. An epoch has as many pairs as there are images.
    """

    def draw(self, rng):
        pairs = [(image, [int(caption)]) for image, captions in enumerate(self.captions_of) for caption in captions]
        chosen = rng.permutation(len(pairs))[: self.real]
        return [(*pairs[i], seed) for i, seed in zip(chosen, rng.integers(2**31, size=self.real).tolist())]


def pad(texts, pad_id):
    """n lists of token ids -> (input_ids, attention_mask), (n, l), l the length of the longest."""
    length = max(map(len, texts))
    input_ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in texts])
    return input_ids, torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in texts])


def collate(pairs, pad_id, image_key="image", text_key="text"):
    """n images with k captions each -> a batch with these keys:

    image_id: (n,) positions of the images in the data set.
    image: (n, 3, size, size) pixels; or image_activations: (n, ...), outputs of a frozen trunk; or image_features: (n, d_i).
    text and attention_mask: (k n, l) token ids; or text_features: (k n, d_t).
    """
    images, texts, ids = zip(*pairs)
    texts = list(itertools.chain(*texts))
    batch = {image_key: as_batch(images) if image_key == "image" else torch.stack(images), "image_id": torch.tensor(ids)}
    if text_key == "text":
        text, attention_mask = pad(texts, pad_id)
        return batch | {"text": text, "attention_mask": attention_mask}
    return batch | {text_key: torch.stack(texts)}
