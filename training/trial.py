"""Try a model before any picture is decoded: a step, and saving and loading, on random pictures and token ids.

What an architecture cannot do would else end a training in its first step, or be lost when its first epoch is saved.
"""

import contextlib
import json
import random

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from transformers.initialization import no_init_weights

from clip import contrastive_loss, create_model, describe_encoders
from encoders.build import IMAGE_ADVICE, TEXT_ADVICE, refused_in_a_line
from encoders.hub import weights_as_bytes
from encoders.text import text_encoder_of
from utils.errors import UserError

PAIRS = 2  # pictures and captions of the step
MAX_LENGTH = 512  # tokens of a caption; more take long without a GPU


def create_tried_model(config, captions):
    """As `clip.create_model`, after a trial, which changes nothing of the model and no random state.

    Raises UserError where the model cannot be trained, saved or loaded.
    """
    model = create_model(config, captions)
    with random_states_kept():
        with left_as_it_was(model):
            try_step(model, config, captions)
        try_saving(model, config)  # when the gradients no longer take memory
    return model


@contextlib.contextmanager
def random_states_kept():
    """A context after which torch's, NumPy's and Python's random numbers go on as before it. The trial uses no GPU."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextlib.contextmanager
def left_as_it_was(model):
    """A context after which a model's buffers, gradients and modes are as before it. Nothing in it may change a weight."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(weight, weight.grad) for weight in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, training in modes:
            module.training = training
        for weight, gradient in gradients:
            weight.grad = gradient


def try_step(model, config, captions):
    """One forward and backward pass of random pictures and token ids, as of a training step."""
    image_name = text_name = f"--model {config.model}"
    if not config.model:
        image_name = f"--image-encoder {config.image_encoder} with --size {config.size}"
        text_name = f"--text-encoder {config.text_encoder}"
    size = model.image_encoder.size
    image = torch.randint(256, (PAIRS, 3, size, size), dtype=torch.uint8)
    text, mask = random_ids(model, text_name, captions)
    model.train()
    with torch.set_grad_enabled(not config.freezes("image")), refused_in_a_line(image_name, IMAGE_ADVICE):
        I_e = model.image_projection(model.image_features(image))
    with torch.set_grad_enabled(not config.freezes("text")), refused_in_a_line(text_name, TEXT_ADVICE):
        T_e = model.text_projection(model.text_features(text, mask))
    logits = F.normalize(I_e, dim=1) @ F.normalize(T_e, dim=1).T
    if logits.requires_grad:  # unless both encoders are frozen
        both = " and ".join(dict.fromkeys([image_name, text_name]))
        with refused_in_a_line(both, "choose other encoders"):
            contrastive_loss(logits).backward()


def random_ids(model, text_name, captions):
    """(input_ids, attention_mask) of PAIRS captions, (PAIRS, l): the first one l long, the others of one token.

    l: the most tokens that the tokenizer leaves. Raises UserError where the encoder has no embedding for a caption's token.
    """
    tokenizer = model.tokenizer
    length, count = min(tokenizer.truncation["max_length"], MAX_LENGTH), tokenizer.get_vocab_size()
    known = getattr(getattr(model.text_encoder.backbone, "config", None), "vocab_size", None) or count
    if known < count:  # of special tokens that no caption has, perhaps
        largest = max((max(encoding.ids, default=0) for encoding in tokenizer.encode_batch(list(captions))), default=0)
        if largest >= known:
            raise UserError(
                f"{text_name}: its tokenizer makes the token {largest} of a caption, and its model has {known} only; use the "
                "tokenizer that the model was trained with"
            )
    ids = torch.randint(min(known, count), (PAIRS, length))
    ids[1:, 1:] = tokenizer.padding["pad_id"]
    mask = torch.ones_like(ids)
    mask[1:, 1:] = 0
    return ids, mask


def try_saving(model, config):
    """What a run folder does with a model: its weights are written and loaded, its text encoder built again, in memory."""
    with refused_in_a_line(f"--model {config.model}" if config.model else f"--text-encoder {config.text_encoder}", TEXT_ADVICE):
        model.load_state_dict(safetensors.torch.load(weights_as_bytes(model)))
        if model.open_clip:
            return  # is built from the same description at first
        encoders = json.loads(json.dumps(describe_encoders(model)))
        with no_init_weights():  # only their shapes are compared
            text_config = transformers.AutoConfig.for_model(**encoders["text"])
            rebuilt = text_encoder_of(transformers.AutoModel.from_config(text_config)).state_dict()
        for name, value in model.text_encoder.backbone.state_dict().items():
            if name not in rebuilt or rebuilt[name].shape != value.shape:
                raise ValueError(f"its configuration does not say how {name} is built")
