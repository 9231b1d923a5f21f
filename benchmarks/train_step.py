"""Pairs a second of training steps: this project's, a plain script's, and a bare loop's over tensors in memory.

    python benchmarks/train_step.py [--image-weights tf_efficientnet_lite0.safetensors --text-encoder distilbert-minilm-l6]

Without weights the towers are ResNet50 and a DistilBERT of base size, with random weights.
- plain: fp32, contiguous tensors, every caption padded to 40 tokens, torch's default AdamW, pixels normalised before.
  Reading and decoding are not counted. It has a process of its own, and runs once more in ours, where freed memory is kept.
- bare: our model, precision and optimizer over batches that lie in memory.
- ours: `main.train_epoch` from the cache of decoded pictures, random crops and normalisation included.
"""

import copy
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import transformers
from measure import alternate, report, spread

import device as devices
from captions import load_captions
from clip import CLIPModel, contrastive_loss
from config import PRESETS, Config, parse_flags
from dataset import CLIPDataset, PairSampler, decode_images, train_loader
from Datasets import flickr8k, shapes
from embedding import token_ids
from evaluate import positions_of_images
from main import parameter_groups, train_epoch
from modules import ImageEncoder, TextEncoder
from storage import run_command
from tokenizer import pretrained_tokenizer, train_tokenizer
from towers import load_pretrained

import torch  # isort: skip

PLAIN_LENGTH = 40  # tokens


def make_model(image_weights, text_encoder, captions):
    if text_encoder:
        text, tokenizer = load_pretrained(transformers.AutoModel, text_encoder).float(), pretrained_tokenizer(text_encoder, 200)
    else:
        text, tokenizer = transformers.DistilBertModel(transformers.DistilBertConfig()), train_tokenizer(captions, 8192, 200)
    name = "tf_efficientnet_lite0" if image_weights else "resnet50"
    image = ImageEncoder(name, image_weights or "random", 224)
    return CLIPModel(image, TextEncoder(text), tokenizer, projection_dim=256)


def plain_side(model, batches, device):
    """The plain step over the batches, on a copy of the model without this project's convolutions."""
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format).train()
    for module in model.image_encoder.tower.modules():
        module.__dict__.pop("forward", None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    mean, std = (value.cpu() for value in (model.image_encoder.mean, model.image_encoder.std))
    padded = []
    for batch in batches:
        short = PLAIN_LENGTH - batch["text"].shape[1]
        text, mask = (torch.nn.functional.pad(batch[name], (0, short)) for name in ("text", "attention_mask"))
        padded.append(((batch["image"].contiguous() - mean) / std, text, mask))

    def side():
        for image, text, mask in padded:
            I_f = model.image_encoder.tower(image.to(device))
            T_f = model.text_encoder.pooled(text.to(device), mask.to(device))
            I_e, T_e = (torch.nn.functional.normalize(e) for e in (model.image_projection(I_f), model.text_projection(T_f)))
            loss = contrastive_loss(model.logit_scale.exp() * I_e @ T_e.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()

    return side


def plain_process(connection, model, batches, device):
    """Runs the plain side in a process of its own whenever the connection says so: a plain script does not tell the C
    library to keep freed memory, which holds for a whole process."""
    side = plain_side(model, batches, device)
    while connection.recv():
        side()
        connection.send(True)


def bare_side(model, optimizer, batches, device, dtype):
    def side():
        model.train()
        for batch in batches:
            with devices.autocast(device, dtype):
                logits, _ = model(batch["image"], batch["text"], batch["attention_mask"])
            loss = contrastive_loss(logits.float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        loss.item()

    return side


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
    """Times training steps of three kinds in turns.

    Args:
        data_dir: pictures and captions; empty: Flickr8k where it is found, else the drawn sample
        image_weights: file of EfficientNet-Lite0's; empty: ResNet50 with random weights
        text_encoder: folder of a text tower; empty: DistilBERT-base's size with random weights
        batch_size: pairs a step
        steps: steps a round
        rounds: rounds that are timed
        compile: torch.compile the towers of ours and bare
        num_workers: processes that cut crops for ours; with 0 its own process does
        device: auto, cpu, cuda
        json: file for the figures
    """
    devices.keep_freed_memory()
    device = devices.pick_device(device)
    dtype = devices.pick_dtype("auto", device)
    data_dir = data_dir or flickr8k.find() or PRESETS["shapes"].data_dir
    if not Path(data_dir).exists():
        shapes.draw(data_dir)
    table, image_dir, _ = load_captions(str(data_dir))
    table = table[table["split"] == "train"]
    names, image_of_text = positions_of_images(table)
    n = batch_size * steps
    torch.manual_seed(0)
    model = make_model(image_weights, text_encoder, table["caption"]).to(device, memory_format=torch.channels_last)
    texts = token_ids(model.tokenizer, table["caption"][image_of_text < n])
    texts = [ids[:PLAIN_LENGTH] for ids in texts]  # a plain script cuts what is longer
    captions_of = [np.flatnonzero(image_of_text == image) for image in range(n)]
    pad_id = model.tokenizer.padding["pad_id"]

    with tempfile.TemporaryDirectory() as cache_dir:
        pictures, _ = decode_images([image_dir / name for name in names[:n]], 224, cache_dir)
        sampler = PairSampler(captions_of, batch_size, seed=0)
        dataset = CLIPDataset(pictures, texts, 224, crop=0.85)
        loader = train_loader(dataset, sampler, pad_id, num_workers, device.type == "cuda")
        batches = list(loader)
        synthetic = [{**batch, "image": torch.randint_like(batch["image"], 256)} for batch in batches]
        synthetic = [{name: value.to(device) for name, value in batch.items()} for batch in synthetic]
        here, there = multiprocessing.Pipe()
        process = multiprocessing.Process(target=plain_process, args=(there, model, batches, device), daemon=True)
        process.start()
        plain = plain_side(model, batches, device)
        if compile:
            model.image_encoder.compile()
            model.text_encoder.compile(dynamic=True)
        optimizer = torch.optim.AdamW(parameter_groups(model, Config(head_lr=1e-3)), fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        bare = bare_side(model, optimizer, synthetic, device, dtype)

        sides = {
            "plain": lambda: (here.send(True), here.recv()),
            "plain, freed memory kept as ours": plain,
            "bare": bare,
            "ours": lambda: train_epoch(model, loader, sampler, optimizer, scaler, device, dtype, [0.01] * steps, "step"),
        }
        seconds = alternate(sides, rounds)
        here.send(False)
    ours = statistics.median(seconds["ours"])
    rows = []
    for name, values in seconds.items():
        ratios = [s / o for s, o in zip(values, seconds["ours"])]
        rows.append([name, spread([n / s for s in values]), f"{statistics.median(values) / ours:.2f}", spread(ratios, 2)])
    towers = f"{'EfficientNet-Lite0' if image_weights else 'ResNet50'} and {text_encoder and 'MiniLM-L6' or 'DistilBERT-base'}"
    title = f"Training step, {towers}, batch {batch_size}, {str(dtype).removeprefix('torch.')}{', compiled' if compile else ''}"
    report(title, ["side", "pairs a second", "ours / side", "ours / side in each round"], rows, json)


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    run_command(lambda: parse_flags(measure, "train_step.py", None, sys.argv[1:]))
