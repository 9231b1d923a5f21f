"""sentence-transformers' own trainer for benchmarks/peers.py: a process that trains with its cached loss and keeps weights.

It has no module for a timm model, so `Photographs` is one; the rest (Router, Transformer, Pooling, Dense, Normalize, the loss,
the batch sampler and the trainer) is the library's.
"""

import json
import sys
from pathlib import Path

import timm
import torch
from datasets import Dataset
from measure import ROOT  # noqa: F401  (makes the project's modules importable)
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Dense, InputModule, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import TrainerCallback

from utils.cli import run_cli

EMBED_DIM = 256


class Photographs(InputModule):
    """A timm model that reads pictures from paths. train_transform, transform: timm's, for training and for scoring."""

    def __init__(self, name, weights):
        super().__init__()
        self.backbone = timm.create_model(name, checkpoint_path=weights)
        self.backbone.reset_classifier(0)
        data = timm.data.resolve_model_data_config(self.backbone)
        self.train_transform = timm.data.create_transform(**data, is_training=True, scale=(0.7, 1.0), color_jitter=0, hflip=0)
        self.transform = timm.data.create_transform(**data)

    @property
    def modalities(self):
        return ["image"]

    def preprocess(self, inputs, prompt=None, **kwargs):
        transform = self.train_transform if self.training else self.transform
        return {"pixel_values": torch.stack([transform(Image.open(path)) for path in inputs])}

    def forward(self, features, **kwargs):
        features["sentence_embedding"] = self.backbone(features["pixel_values"])
        return features

    def save(self, *args, **kwargs):
        raise NotImplementedError("the benchmark keeps state dicts")


def build(image_weights, text_encoder):
    """A SentenceTransformer with the two encoders, a linear projection each, and unit length."""
    torch.manual_seed(0)
    image, text = Photographs(image_weights.stem, image_weights), Transformer(str(text_encoder))
    widths = image.backbone.num_features, text.get_embedding_dimension()
    heads = [Dense(width, EMBED_DIM, bias=False, activation_function=None) for width in widths]
    router = Router({"image": [image, heads[0]], "text": [text, Pooling(widths[1], pooling_mode="mean"), heads[1]]})
    return SentenceTransformer(modules=[router, Normalize()], device="cpu")


class KeepWeights(TrainerCallback):
    """Keeps the model's weights every so many steps."""

    def __init__(self, model, folder, every):
        self.model, self.folder, self.every = model, folder, every

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            torch.save(self.model.state_dict(), self.folder / f"{state.global_step:06}.pt")


def train(
    pairs: Path,
    image_weights: Path,
    text_encoder: Path,
    output: Path,
    batch_size: int = 128,
    steps: int = 100,
    text_lr: float = 1e-4,
    freeze_image: bool = False,
):
    """Trains on pairs and writes weights into a folder every 2,048 pairs.

    Args:
        pairs: JSON file of [path of a picture, caption] pairs
        image_weights: file of the image encoder's weights, named after its timm model
        text_encoder: folder of the text encoder
        output: folder for the weights
        batch_size: pairs per step
        steps: steps
        text_lr: learning rate of the text encoder
        freeze_image: do not train the image encoder
    """
    model = build(image_weights, text_encoder)
    if freeze_image:
        model[0].sub_modules["image"][0].requires_grad_(False)
    loss = CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=32, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    paths, captions = zip(*json.loads(pairs.read_text(encoding="utf-8")))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        batch_sampler="no_duplicates",  # an image at most once per batch
        router_mapping={"image": "image", "caption": "text"},
        learning_rate=1e-4,  # of the image encoder
        learning_rate_mapping={r".*linear.*": 1e-3, r".*text\.0\..*": text_lr},
        weight_decay=1e-3,
        warmup_steps=round(0.05 * steps),
        lr_scheduler_type="cosine",
        bf16=True,
        use_cpu=True,
        dataloader_num_workers=1,
        save_strategy="no",
        report_to="none",
        seed=0,
    )
    data = Dataset.from_dict({"image": paths, "caption": captions})
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)
    trainer.add_callback(KeepWeights(model, output, 2048 // batch_size))
    trainer.train()


@torch.inference_mode()
def embed(image_weights, text_encoder, weights, paths, captions):
    """(I_e, T_e) of pictures and captions, as the library embeds them with kept weights."""
    model = build(image_weights, text_encoder)
    model.load_state_dict(torch.load(weights))
    options = {"convert_to_tensor": True, "batch_size": 100, "show_progress_bar": False}
    return model.encode(list(map(str, paths)), task="image", **options), model.encode(list(captions), task="text", **options)


if __name__ == "__main__":
    run_cli(train, "benchmarks/peer_sentence_transformers.py", sys.argv[1:])
