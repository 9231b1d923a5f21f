"""OpenAI's weights in our towers and heads."""

import logging
import re
import warnings
from functools import partial

import torch
from timm.models import byobnet, vision_transformer

from storage import UserError
from towers import from_hub, read_weight_file

TEXT_NAMES = [  # OpenAI's names of the text tower's tensors, and transformers'
    (r"token_embedding\.", r"embeddings.token_embedding."),
    (r"positional_embedding$", r"embeddings.position_embedding.weight"),
    (r"ln_final\.", r"final_layer_norm."),
    (r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", r".mlp.fc1."),
    (r"\.mlp\.c_proj\.", r".mlp.fc2."),
    (r"\.attn\.", r".self_attn."),
]


def load_openai(model, name, weights, whole):
    """Loads OpenAI's weights into a CLIPModel of their sizes.

    name: OpenAI's. weights: "pretrained" (through open_clip, from the model hub), or a file in OpenAI's layout: a
    TorchScript archive as OpenAI publishes it, a state dict or safetensors. whole: also text tower, heads, temperature.
    Raises UserError where they cannot be had or do not fit.
    """
    state = hub_state(name) if weights == "pretrained" else file_state(weights)
    state = {key: value.float() for key, value in state.items()}
    try:
        image = image_state(state, model.image_encoder.tower)
        projection = [key for key in image if re.match(r"head\.(proj\.)?(weight|bias)$", key)]
        head = {key.rpartition(".")[2]: image.pop(key) for key in projection}
        model.image_encoder.tower.load_state_dict(image)
        model.image_encoder.pretrained = True
        if whole:
            model.text_encoder.tower.load_state_dict(text_state(state))
            if not model.image_encoder.attention_pool:
                head.pop("bias")  # zeros that timm adds
            model.image_projection.projection.load_state_dict(head)
            model.text_projection.projection.load_state_dict({"weight": state["text_projection"].T})
            model.logit_scale.data.copy_(state["logit_scale"])
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[-1].strip()[:160]
        raise UserError(f"--image-weights {weights}: does not fit OpenAI's {name} ({reason})") from None


def hub_state(name):
    import open_clip  # an import of seconds that other towers do without

    theirs = re.sub("/|@", "-", name).removesuffix("px")
    logging.disable(logging.ERROR)  # what it logs of a failed download, our one line says
    try:
        create = partial(open_clip.create_model, theirs, pretrained="openai", force_quick_gelu=True)
        return from_hub(create).state_dict()
    except (OSError, RuntimeError):
        raise UserError(
            f"{name}: OpenAI's weights are neither on this machine nor to be fetched from a model hub; "
            "name a file of them with --image-weights, or pass --image-weights random --text-weights random"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def file_state(path):
    try:
        with warnings.catch_warnings(action="ignore"):  # torch would rather have us not use TorchScript, as OpenAI did
            return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError):
        return read_weight_file(path)


def image_state(state, tower):
    """OpenAI's names -> timm's, of the image tower; its projection is called head."""
    filters = vision_transformer if isinstance(tower, vision_transformer.VisionTransformer) else byobnet
    converted = filters.checkpoint_filter_fn(state, tower)
    return {key: value for key, value in converted.items() if key in tower.state_dict() or key.startswith("head.")}


def text_state(state):
    """OpenAI's names -> transformers', of the text tower, whose queries, keys and values stand in three tensors there."""
    converted = {}
    for key, value in state.items():
        if not re.match(r"transformer\.|token_embedding|positional_embedding|ln_final", key):
            continue
        for pattern, replacement in TEXT_NAMES:
            key = re.sub(pattern, replacement, key)
        if ".in_proj_" in key:
            for part, third in zip("qkv", value.chunk(3)):
                converted[key.replace("in_proj_", f"{part}_proj.")] = third
        else:
            converted[key] = value
    return converted
