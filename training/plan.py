"""What a run would do, for `python main.py --dry-run`: its data, encoders, steps, and the disk space and memory it takes."""

import tempfile
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pandas as pd
import psutil
import torch

from clip import loss_over_captions
from config import SHAPES, heads_config, is_stream, trains_heads_first
from dataset import pad
from Datasets import shapes
from embedding import IMAGE_BATCH, token_ids
from encoders.stages import unfreeze_from
from training import distributed
from training.adapters import add_adapters
from training.data import fetch_data, fit_batch, read_table, real_per_batch
from training.feature_cache import activation_bytes
from training.gradient_cache import frozen_batch_norm_statistics
from training.optimization import parameter_groups
from training.stream import open_stream
from training.trial import create_tried_model
from utils.cache import free_space
from utils.device import autocast, pick_device, pick_dtype
from utils.errors import UserError
from utils.images import decoded_bytes

GB = 1e9
NUM_CAPTIONS = 32  # the longest of so many stands for the length of all


def print_plan(config, flickr8k_dir):
    """Prints what a run with this Config would do, and writes nothing. flickr8k_dir: as for `training.data.fetch_data`.

    A sample that is not drawn yet is drawn into a temporary folder. Raises UserError where the run would, and where Flickr8k
    would have to be downloaded first.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        table, image_dir = read_planned(config, flickr8k_dir, folder)
        config = fit_batch(config, num_images(table, "train"), image_dir)
        model = create_tried_model(config, table["caption"][table["split"] == "train"])
        decoded = ["val"] if is_stream(config.data_dir) else ["train", "val"]
        used = table["image"][table["split"].isin(decoded)].unique()
        pixels = decoded_bytes([image_dir / name for name in used], model.image_encoder.size, model.image_encoder.resize)
    freeze(config, model)
    total, trained = sum(weight.numel() for weight in model.parameters()), trained_parameters(model, config)
    for name, about in (
        ("", describe_splits(table)),
        ("encoders", f"{config.image_encoder} at {model.image_encoder.size} px, {config.text_encoder}"),
        ("parameters", f"{total / 1e6:.1f} million, of which {trained / 1e6:.1f} million are trained"),
        ("steps", describe_steps(config, num_images(table, "train"))),
        ("device", f"{device}, {str(dtype).removeprefix('torch.')}"),
        ("disk", describe_disk(config, pixels, output_bytes(config, model, table, dtype), total, trained)),
        ("memory", describe_memory(config, model, table, total, trained, device, dtype)),
    ):
        print(f"{name:12}{about}")
    print("a dry run: nothing was written")


def read_planned(config, flickr8k_dir, folder):
    """(table, image_dir) of the pictures that a run would use; where they come from is printed. folder: a temporary one.

    For shards the table has the rows that a folder with as many pictures would have, and image_dir is that of validation.
    """
    if config.data_dir == SHAPES.data_dir and not Path(config.data_dir).exists():
        print(f"{'data':12}the sample, which would be drawn into {config.data_dir}")
        shapes.draw(f"{folder}/sample")
        return read_table(replace(config, data_dir=f"{folder}/sample", cache_dir=folder))[:2]
    if config.download and not (config.data_dir or flickr8k_dir):
        raise UserError("--dry-run --download: a dry run downloads nothing; leave --dry-run out to get Flickr8k")
    config = replace(fetch_data(config, flickr8k_dir), cache_dir=folder)  # what is counted and unpacked does not stay
    if not is_stream(config.data_dir):
        table, image_dir, _ = read_table(config)
        print(f"{'data':12}{image_dir}")
        print("\n".join(table.attrs["split"].lines()))
        return table, image_dir
    stream, (table, image_dir, _) = open_stream(config), read_table(config)
    print(f"{'data':12}{config.data_dir}")
    return pd.concat([table, rows_of(stream)], ignore_index=True), image_dir


def rows_of(stream):
    """A table like that of a folder with as many pictures and captions as a `Stream` has."""
    captions = list(islice(cycle(stream.captions), stream.num_captions))
    images = [str(number % stream.num_images) for number in range(len(captions))]
    return pd.DataFrame({"image": images, "caption": captions, "split": "train"})


def freeze(config, model):
    """Freezes what the Config names, and adds adapters, as the run does before its first step."""
    if config.lora_rank:
        add_adapters(model, config.lora_rank)
    if config.image_unfreeze_from:
        unfreeze_from(model.image_encoder, config.image_unfreeze_from)
    for part, encoder in (("image", model.image_encoder), ("text", model.text_encoder)):
        if config.freezes(part):
            encoder.requires_grad_(False)


def num_images(table, split):
    return table["image"][table["split"] == split].nunique()


def describe_splits(table):
    parts = [(name, num_images(table, name), (table["split"] == name).sum()) for name in ("train", "val", "test")]
    return ", ".join(f"{images:,} {name} images ({captions:,} captions)" for name, images, captions in parts if images)


def trained_parameters(model, config):
    """How many numbers the optimizer changes."""
    return sum(weight.numel() for group in parameter_groups(model, config) for weight in group["params"])


def describe_steps(config, num_train):
    """The steps of a run with so many training images; of its heads first, where they are trained first."""
    stages = [("", config)]
    if trains_heads_first(config):
        stages = [("heads first: ", heads_config(config, num_train)), ("then ", config)]
    texts = []
    for name, stage in stages:
        steps = num_train // real_per_batch(stage)
        in_all = f"{stage.steps} in all " if stage.steps else f"{stage.epochs} epochs of {steps} steps "
        texts.append(f"{name}{in_all}of {stage.batch_size} images")
    return "; ".join(texts)


def output_bytes(config, model, table, dtype):
    """The bytes on disk of frozen encoders' cached outputs: activations, and features, also those that heads train on first."""
    train, val = num_images(table, "train"), num_images(table, "val")
    if is_stream(config.data_dir):  # is encoded again in each epoch
        train, table = 0, table[table["split"] == "val"]
    heads = trains_heads_first(config)
    size = activation_bytes(config, model.image_encoder, table, dtype)
    if config.freezes("image") or heads:
        crops = config.cached_crops if config.freezes("image") else 1
        size += 4 * model.image_encoder.width * (crops * train + val)
    if config.freezes("text") or heads:
        size += 4 * model.text_encoder.width * table["split"].isin(["train", "val"]).sum()
    return size


def describe_disk(config, pixels, outputs, total, trained):
    """The space for `pixels` bytes of decoded pictures, `outputs` of frozen encoders, and the run folder while it trains."""
    checkpoint = 4 * trained * (4 if config.ema_decay else 3)  # the weights, AdamW's two averages, the weights' average
    run = 4 * total * (2 if trains_heads_first(config) else 1) + 2 * checkpoint
    cached = f"{pixels / GB:.2f} GB of decoded pictures" + (f" and {outputs / GB:.2f} GB of features" if outputs else "")
    free = free_space(config.cache_dir) / GB
    return f"{cached} in {config.cache_dir}, unless they are there; {run / GB:.2f} GB in {config.run_dir}; {free:.0f} GB free"


def describe_memory(config, model, table, total, trained, device, dtype):
    """A line on the memory for the weights and what AdamW keeps of them, and for a step."""
    weights, step = memory_bytes(config, model, table, total, trained, device, dtype)
    where = "of the GPU" if device.type == "cuda" else "beside Python and torch"
    without = ", without the generator" if config.gan == "joint" else ""
    parts = f"{weights / GB:.1f} for the weights, {step / GB:.1f} for a step"
    return f"about {(weights + step) / GB:.1f} GB {where}{without}: {parts}"


def warn_of_memory(config, model, table, device, dtype):
    """Prints a line where a run is likely to need more memory than is free."""
    total, trained = sum(weight.numel() for weight in model.parameters()), trained_parameters(model, config)
    with frozen_batch_norm_statistics(model):
        needed = sum(memory_bytes(config, model, table, total, trained, device, dtype)) - 4 * total  # they are there already
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        sizes = f"about {needed / GB:.1f} GB of memory are needed, and {free / GB:.1f} GB are free"
        print(
            f"{sizes}: lower --batch-size, keep it with --micro-batch-size 16, or try --lora-rank 8 or --freeze image",
            flush=True,
        )


def memory_bytes(config, model, table, total, trained, device, dtype):
    """(bytes for the weights and what AdamW keeps of them, bytes for a step), from two small steps that are counted."""
    weights = 4 * (total + trained * (4 if config.ema_decay else 3))  # gradient, AdamW's two averages, the weights' average
    rows = table[table["split"] == "train"]  # without any, the training captions lie in shards
    captions = list((table if rows.empty else rows)["caption"][:NUM_CAPTIONS])
    ids = max(token_ids(model.tokenizer, captions), key=len)
    model.to(device)
    few, more = (step_bytes(config, model, ids, count, device, dtype) for count in (2, 4))
    size = config.micro_batch_size or -(-config.batch_size // distributed.size())
    return weights, max(few + (more - few) / 2 * (size - 2), encode_bytes(model, device, dtype))


def step_bytes(config, model, ids, count, device, dtype):
    """The bytes that the forward pass of a step keeps for the backward pass, with `count` images and captions of token ids."""
    encoder, captions = model.image_encoder, count * config.captions_per_image
    text, mask = pad([ids] * captions, model.tokenizer.padding["pad_id"])
    if config.freezes("image"):
        batch = {"image_features": torch.zeros(count, encoder.width)}
    elif encoder.stage:
        batch = {"image_activations": torch.zeros(count, *encoder.activation_shape)}
    else:
        batch = {"image": torch.zeros(count, 3, encoder.size, encoder.size, dtype=torch.uint8)}
    if config.freezes("text"):
        batch |= {"text_features": torch.zeros(captions, model.text_encoder.width)}
    else:
        batch |= {"text": text, "attention_mask": mask}
    kept, own = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(device, dtype):
        I_f, T_f = model.features({name: value.to(device) for name, value in batch.items()})
        loss_over_captions(model.logits(I_f, T_f))
    return sum(kept.values())


@torch.no_grad()
def encode_bytes(model, device, dtype):
    """The bytes of the largest input and output of a layer, where a batch of pictures is embedded."""
    encoder, largest = model.image_encoder, 0

    def count(module, inputs, output):
        nonlocal largest
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, torch.Tensor)]
        largest = max(largest, sum(tensor.nbytes for tensor in tensors))

    hooks = [module.register_forward_hook(count) for module in encoder.modules()]
    with autocast(device, dtype):
        encoder.eval()(torch.zeros(1, 3, encoder.size, encoder.size, dtype=torch.uint8, device=device))
    for hook in hooks:
        hook.remove()
    return largest * IMAGE_BATCH
