"""What is measured on the model of a finished training."""

import copy
import statistics
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from captions import image_positions
from config import Config
from Datasets import shapes
from embedding import IMAGE_BATCH, file_features, project_and_normalize, text_features, token_ids
from evaluation.geometry import alignment, uniformity
from evaluation.retrieval import score
from evaluation.sts import sts_scores
from evaluation.twins import twin_scores
from evaluation.zeroshot import class_accuracies
from training.data import read_table
from utils.device import pick_device, pick_dtype
from utils.images import as_batch, center_crop, read_images

NUM_BATCHNORM = 2048  # training pictures from which BatchNorm's statistics are computed again
NUM_TWINS = 1000  # pairs of scenes
NUM_RATED = 2000  # pairs of captions
PROMPTS = ("a {} .", "a photo of a {} .", "a picture of a {} .", "a small {} .", "a large {} .")


@dataclass
class Trained:
    """A finished training. seconds: from its start to its end, with all that it prepares and draws."""

    model: torch.nn.Module
    config: Config
    history: pd.DataFrame
    seconds: float
    classes_dir: Path  # pictures of one shape, in a folder per pair of colour and shape
    seen: int  # pairs of colour and shape that training showed

    @property
    def best(self):
        return self.history.loc[self.history["rsum"].idxmax()]

    @property
    def device_and_dtype(self):
        device = pick_device(self.config.device)
        return device, pick_dtype(self.config.precision, device)

    @cached_property
    def embeddings(self):
        """(I_e, T_e), (n, d_e) each, of the validation images, each with its first caption."""
        table, image_dir, _ = read_table(self.config)
        rows = table[table["split"] == "val"].drop_duplicates("image")
        device, dtype = self.device_and_dtype
        I_f, _ = file_features(self.model, [image_dir / name for name in rows["image"]], device, dtype)
        T_f = text_features(self.model, token_ids(self.model.tokenizer, rows["caption"]), device, dtype)
        return (
            project_and_normalize(self.model.image_projection, I_f, device),
            project_and_normalize(self.model.text_projection, T_f, device),
        )

    @cached_property
    def rsum_with_batchnorm_recomputed(self):
        """rsum once BatchNorm's statistics, where they train, are those of training pictures under the final weights.

        Its running statistics lag behind weights that took few steps.
        """
        model, (device, dtype) = copy.deepcopy(self.model).train(), self.device_and_dtype
        model.hubness = None  # `best` is of the cosines, too
        frozen = self.config.freeze in ("image", "both")
        if frozen or not any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
            return self.best["rsum"]
        table, image_dir, _ = read_table(self.config)
        names, size = table["image"][table["split"] == "train"].unique()[:NUM_BATCHNORM], model.image_encoder.size
        pictures = [center_crop(picture, size) for picture, _ in read_images([image_dir / name for name in names], size)]
        batches = [as_batch(pictures[start : start + IMAGE_BATCH]) for start in range(0, len(pictures), IMAGE_BATCH)]
        update_bn(batches, model.image_encoder, device)
        rows = table[table["split"] == "val"]
        names, image_of_text = image_positions(rows)
        I_f, _ = file_features(model, [image_dir / name for name in names], device, dtype)
        T_f = text_features(model, token_ids(model.tokenizer, rows["caption"]), device, dtype)
        return score(model, I_f, T_f, image_of_text, rows["caption"], device)["rsum"]

    @cached_property
    def twins(self):
        return twin_scores(self.model, shapes.twin_pairs(NUM_TWINS), *self.device_and_dtype)

    @cached_property
    def mirrored(self):
        return twin_scores(self.model, shapes.mirrored_pairs(NUM_TWINS), *self.device_and_dtype)

    def sides_accuracy(self, sides):
        return statistics.mean(self.mirrored["relations"][side] for side in sides)

    def pairs_accuracy(self, unseen, prompts):
        """Zero-shot top-1 accuracy in percent over the pairs of colour and shape that training did or did not show."""
        found = class_accuracies(self.model, self.classes_dir, PROMPTS[:prompts], *self.device_and_dtype)
        names = {f"{color} {shape}" for color, shape in shapes.unseen_pairs(self.seen)}
        return statistics.mean(accuracy for name, accuracy in found.items() if (name in names) == unseen)


MEASURES = {  # name: function of a Trained
    "rsum": lambda t: t.best["rsum"],
    "rsum, BatchNorm recomputed": lambda t: t.rsum_with_batchnorm_recomputed,
    "R@1 text to image": lambda t: t.best["text_to_image_R@1"],
    "R@1 image to text": lambda t: t.best["image_to_text_R@1"],
    "last training loss": lambda t: t.history["loss"].iloc[-1],
    "last validation loss": lambda t: t.history["val_loss"].iloc[-1],
    "lowest validation loss": lambda t: t.history["val_loss"].min(),
    "last temperature": lambda t: t.history["temperature"].iloc[-1],
    "seconds of the epochs": lambda t: t.history["seconds"].sum(),
    "seconds in all": lambda t: t.seconds,
    "million parameters": lambda t: sum(weight.numel() for weight in t.model.parameters()) / 1e6,
    "alignment": lambda t: alignment(*t.embeddings),
    "uniformity": lambda t: uniformity(torch.cat(t.embeddings)),
    "STS, Spearman": lambda t: sts_scores(t.model, shapes.rated_pairs(NUM_RATED), *t.device_and_dtype)["spearman"],
    "twins, percent": lambda t: t.twins["accuracy"],
    "left and right, percent": partial(Trained.sides_accuracy, sides=("left", "right")),
    "above and below, percent": partial(Trained.sides_accuracy, sides=("above", "below")),
    "seen pairs, 1 prompt": partial(Trained.pairs_accuracy, unseen=False, prompts=1),
    "seen pairs, 5 prompts": partial(Trained.pairs_accuracy, unseen=False, prompts=5),
    "unseen pairs, 1 prompt": partial(Trained.pairs_accuracy, unseen=True, prompts=1),
    "unseen pairs, 5 prompts": partial(Trained.pairs_accuracy, unseen=True, prompts=5),
}
