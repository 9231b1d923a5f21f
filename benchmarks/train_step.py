"""Pairs per second of training steps: this project's, those of a plain script, and of a bare loop over tensors in memory.

    python benchmarks/train_step.py [--image-weights tf_efficientnet_lite0.safetensors --text-encoder distilbert-minilm-l6]

Without weight files the encoders are ResNet50 and a DistilBERT of base size, with random weights.
- plain: fp32, contiguous tensors, every caption padded to the same length, torch's default AdamW, pixels normalised in advance.
  Reading and decoding are not included. It runs in a process of its own, and a second time in ours, where freed memory is kept.
- bare: our model, precision and optimizer on batches that are already in memory.
- ours: `training.steps.train_epoch`, from the cache of decoded pictures, with random crops and normalisation.
"""

import copy
import multiprocessing
import statistics
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import transformers
from measure import alternate, report, spread

from captions import image_positions, load_captions
from clip import CLIPModel, contrastive_loss
from config import PRESETS, Config
from dataset import CLIPDataset, PairSampler
from Datasets import flickr8k, shapes
from embedding import token_ids
from encoders.build import load_pretrained
from encoders.tokenizer import pretrained_tokenizer, train_tokenizer
from modules import ImageEncoder, TextEncoder
from training.data import batch_loader
from training.state import create_state
from training.steps import train_epoch
from utils import device as devices
from utils.cli import run_cli
from utils.errors import run_command
from utils.images import decode_images

import torch  # isort: skip

PLAIN_LENGTH = 40  # tokens; longer captions are truncated


def make_model(image_weights, text_encoder, captions):
    """A CLIPModel. image_weights, text_encoder: as for `measure`. captions: to train a tokenizer on, if none is given."""
    if text_encoder:
        backbone = load_pretrained(transformers.AutoModel, text_encoder).float()
        tokenizer = pretrained_tokenizer(text_encoder, 200)
    else:
        backbone = transformers.DistilBertModel(transformers.DistilBertConfig())
        tokenizer = train_tokenizer(captions, 8192, 200)
    name = "tf_efficientnet_lite0" if image_weights else "resnet50"
    image_encoder = ImageEncoder(name, image_weights or "random", 224)
    return CLIPModel(image_encoder, TextEncoder(backbone), tokenizer, projection_dim=256)


def plain_variant(model, batches, device):
    """A function that takes the plain step with each batch, on a copy of the model without this project's convolutions."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format).train()
    for module in model.image_encoder.backbone.modules():
        module.__dict__.pop("forward", None)  # removes what encoders.convolution.speed_up has set
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    mean, std = (value.cpu() for value in (model.image_encoder.mean, model.image_encoder.std))
    padded = []
    for batch in batches:
        padding = PLAIN_LENGTH - batch["text"].shape[1]
        text, mask = (torch.nn.functional.pad(batch[name], (0, padding)) for name in ("text", "attention_mask"))
        padded.append(((batch["image"].contiguous() - mean) / std, text, mask))

    def train():
        for image, text, mask in padded:
            I_f = model.image_encoder.backbone(image.to(device))
            T_f = model.text_encoder.pooled(text.to(device), mask.to(device))
            I_e, T_e = (torch.nn.functional.normalize(e) for e in (model.image_projection(I_f), model.text_projection(T_f)))
            loss = contrastive_loss(model.logit_scale.exp() * I_e @ T_e.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()

    return train


def plain_process(connection, model, batches, device):
    """Runs the plain variant each time the connection receives True, and ends when it receives False."""
    train = plain_variant(model, batches, device)
    while connection.recv():
        train()
        connection.send(True)


@contextmanager
def in_new_process(model, batches, device):
    """A function that runs the plain variant in a process of its own.

    A plain script does not tell the C library to keep freed memory, a setting that holds for a whole process.
    """
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=plain_process, args=(theirs, model, batches, device), daemon=True)
    process.start()

    def train():
        ours.send(True)
        ours.recv()

    yield train
    ours.send(False)


def bare_variant(model, optimizer, batches, device, dtype):
    """A function that takes a step with each batch, without this project's training loop."""

    def train():
        model.train()
        for batch in batches:
            with devices.autocast(device, dtype):
                logits, _ = model(batch["image"], batch["text"], batch["attention_mask"])
            loss = contrastive_loss(logits.float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        loss.item()

    return train


def our_variant(state, loader, device, dtype):
    """A function that trains for one epoch of the loader's batches."""

    def train():
        train_epoch(state, loader, device, dtype, threading.Event())
        state.losses = []  # so that the next call starts the epoch again

    return train


def load_table(data_dir):
    """(table of the training captions, image_dir). data_dir: as for `measure`."""
    data_dir = data_dir or flickr8k.find() or PRESETS["shapes"].data_dir
    if not Path(data_dir).exists():
        shapes.draw(data_dir)
    table, image_dir, _ = load_captions(str(data_dir))
    return table[table["split"] == "train"], image_dir


def make_dataset(model, table, image_dir, n, cache_dir):
    """(dataset, captions_of) of the first n images. captions_of: for each image the indices of its captions."""
    names, image_of_text = image_positions(table)
    texts = token_ids(model.tokenizer, table["caption"][image_of_text < n])
    pictures, _ = decode_images([image_dir / name for name in names[:n]], 224, cache_dir)
    dataset = CLIPDataset(pictures, [ids[:PLAIN_LENGTH] for ids in texts], 224, crop=0.85)
    return dataset, [np.flatnonzero(image_of_text == image) for image in range(n)]


def table_rows(seconds, n):
    """A row per variant: its pairs per second, and how many times faster ours is. n: pairs per round."""
    median = statistics.median(seconds["ours"])
    rows = []
    for name, values in seconds.items():
        ratios = [s / o for s, o in zip(values, seconds["ours"])]
        rows.append([name, spread([n / s for s in values]), f"{statistics.median(values) / median:.2f}", spread(ratios, 2)])
    return rows


def measure(
    data_dir: str = "",
    image_weights: str = "",
    text_encoder: str = "",
    batch_size: int = 32,
    steps: int = 3,
    rounds: int = 5,
    compile: bool = False,
    num_workers: int = 0,
    device: str = "auto",
    json: str = "",
):
    """Times training steps of all variants in turns.

    Args:
        data_dir: pictures and captions; empty: Flickr8k if it is found, else the drawn sample
        image_weights: file of EfficientNet-Lite0's weights; empty: ResNet50 with random weights
        text_encoder: folder of a text encoder; empty: a model of DistilBERT-base's size with random weights
        batch_size: pairs per step
        steps: steps per round
        rounds: timed rounds
        compile: torch.compile the encoders of ours and bare
        num_workers: the DataLoader's worker processes, for ours
        device: auto, cpu, cuda
        json: file for the results
    """
    devices.keep_freed_memory()
    device = devices.pick_device(device)
    dtype = devices.pick_dtype("auto", device)
    table, image_dir = load_table(data_dir)
    n = batch_size * steps
    torch.manual_seed(0)
    model = make_model(image_weights, text_encoder, table["caption"]).to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as cache_dir:
        dataset, captions_of = make_dataset(model, table, image_dir, n, cache_dir)
        sampler = PairSampler(captions_of, batch_size, seed=0)
        pad_id = model.tokenizer.padding["pad_id"]
        loader = batch_loader(dataset, sampler, pad_id, num_workers, device.type == "cuda")
        batches = list(loader)
        synthetic = [{**batch, "image": torch.randint_like(batch["image"], 256)} for batch in batches]
        synthetic = [{name: value.to(device) for name, value in batch.items()} for batch in synthetic]
        with in_new_process(model, batches, device) as plain_alone:
            plain = plain_variant(model, batches, device)  # copies the model, so before it is compiled
            # With the schedule "plateau" and no warm-up, the learning rate is constant.
            config = Config(head_lr=1e-3, schedule="plateau", warmup=0.0, compile=compile)
            state = create_state(config, model, {}, device, dtype)
            variants = {
                "plain": plain_alone,
                "plain, freed memory kept as ours": plain,
                "bare": bare_variant(model, state.optimizer, synthetic, device, dtype),
                "ours": our_variant(state, loader, device, dtype),
            }
            seconds = alternate(variants, rounds)
    encoders = (
        f"{'EfficientNet-Lite0' if image_weights else 'ResNet50'} and {'MiniLM-L6' if text_encoder else 'DistilBERT-base'}"
    )
    precision = str(dtype).removeprefix("torch.") + (", compiled" if compile else "")
    columns = ["side", "pairs a second", "ours / side", "ours / side in each round"]
    report(f"Training step, {encoders}, batch {batch_size}, {precision}", columns, table_rows(seconds, n), json)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    run_command(lambda: run_cli(measure, "benchmarks/train_step.py", sys.argv[1:]))
