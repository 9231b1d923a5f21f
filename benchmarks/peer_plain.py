"""A plain training loop for benchmarks/peers.py, with the settings that the common teaching scripts have.

Every pair is a sample of its own, in random order; batches of 32, fp32, captions padded to 200 tokens, pictures read from their
files each time, three learning rates that stay as they are, and the loss of the paper's pseudocode.
"""

import json
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import transformers
from measure import ROOT  # noqa: F401  (makes the project's modules importable)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from utils.cli import run_cli

MAX_LENGTH, BATCH_SIZE, EMBED_DIM = 200, 32, 256


class Pairs(Dataset):
    """Pairs of [path of a picture, caption], as pixels and token ids."""

    def __init__(self, pairs, transform, tokenizer):
        self.pairs, self.transform = pairs, transform
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_LENGTH, "return_tensors": "pt"}
        self.tokens = tokenizer([caption for _, caption in pairs], **options)

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image = self.transform(Image.open(self.pairs[index][0]).convert("RGB"))
        return image, self.tokens["input_ids"][index], self.tokens["attention_mask"][index]


class Model(nn.Module):
    """The two encoders, a linear projection each, and the temperature."""

    def __init__(self, image_weights, text_encoder):
        super().__init__()
        torch.manual_seed(0)
        self.image_encoder = timm.create_model(image_weights.stem, checkpoint_path=image_weights)
        self.image_encoder.reset_classifier(0)
        self.text_encoder = transformers.AutoModel.from_pretrained(text_encoder)
        self.image_projection = nn.Linear(self.image_encoder.num_features, EMBED_DIM)
        self.text_projection = nn.Linear(self.text_encoder.config.hidden_size, EMBED_DIM)
        self.temperature = nn.Parameter(torch.tensor(0.07).log().neg())
        self.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(self.image_encoder))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(text_encoder)

    def embed_images(self, image):
        return F.normalize(self.image_projection(self.image_encoder(image)))

    def embed_texts(self, text, mask):
        hidden = self.text_encoder(text, mask).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(self.text_projection(pooled))

    def forward(self, image, text, mask):
        """The loss of a batch: cross-entropy over the rows and the columns of the similarity matrix."""
        logits = self.embed_images(image) @ self.embed_texts(text, mask).T * self.temperature.exp()
        labels = torch.arange(len(logits))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def train(pairs: Path, image_weights: Path, text_encoder: Path, output: Path):
    """Trains for one epoch and writes weights into a folder every 512 pairs.

    Args:
        pairs: JSON file of [path of a picture, caption] pairs
        image_weights: file of the image encoder's weights, named after its timm model
        text_encoder: folder of the text encoder
        output: folder for the weights
    """
    model = Model(image_weights, text_encoder)
    data = Pairs(json.loads(pairs.read_text(encoding="utf-8")), model.transform, model.tokenizer)
    heads = [*model.image_projection.parameters(), *model.text_projection.parameters(), model.temperature]
    groups = [(heads, 1e-3), (model.image_encoder.parameters(), 1e-4), (model.text_encoder.parameters(), 1e-5)]
    optimizer = torch.optim.AdamW([{"params": params, "lr": lr} for params, lr in groups], weight_decay=1e-3)
    model.train()
    for step, batch in enumerate(DataLoader(data, BATCH_SIZE, shuffle=True, num_workers=1), start=1):
        loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 16 == 0:
            torch.save(model.state_dict(), output / f"{step:06}.pt")


@torch.inference_mode()
def embed(image_weights, text_encoder, weights, paths, captions):
    """(I_e, T_e) of pictures and captions."""
    model = Model(image_weights, text_encoder).eval()
    model.load_state_dict(torch.load(weights))
    images = [torch.stack([model.transform(Image.open(p)) for p in paths[i : i + 100]]) for i in range(0, len(paths), 100)]
    tokens = [model.tokenizer(captions[i : i + 250], padding=True, return_tensors="pt") for i in range(0, len(captions), 250)]
    I_e = torch.cat([model.embed_images(image) for image in images])
    return I_e, torch.cat([model.embed_texts(token["input_ids"], token["attention_mask"]) for token in tokens])


if __name__ == "__main__":
    run_cli(train, "benchmarks/peer_plain.py", sys.argv[1:])
