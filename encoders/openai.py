"""Load OpenAI's CLIP weights into our encoders and projection heads."""

import logging
import re
import warnings
from functools import partial

import torch
from timm.models import byobnet, vision_transformer

from encoders.build import read_weight_file
from encoders.hub import from_hub
from utils.errors import UserError

TEXT_NAMES = [  # OpenAI's names of the text encoder's tensors, and transformers'
    (r"token_embedding\.", r"embeddings.token_embedding."),
    (r"positional_embedding$", r"embeddings.position_embedding.weight"),
    (r"ln_final\.", r"final_layer_norm."),
    (r"transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", r".mlp.fc1."),
    (r"\.mlp\.c_proj\.", r".mlp.fc2."),
    (r"\.attn\.", r".self_attn."),
]


def load_openai(model, name, weights, full_model):
    """Loads OpenAI's weights into a CLIPModel of the same sizes.

    name: OpenAI's. weights: "pretrained" (through open_clip, from the model hub), or a file in OpenAI's layout: a
    TorchScript archive as OpenAI publishes it, a state dict or safetensors. full_model: load the text encoder, heads and
    temperature, too, not only the image encoder.
    Raises UserError where the weights are not available or do not fit.
    """
    state = hub_state(name) if weights == "pretrained" else file_state(weights)
    state = {key: value.float() for key, value in state.items()}
    try:
        image = image_state(state, model.image_encoder.backbone)
        projection = [key for key in image if re.match(r"head\.(proj\.)?(weight|bias)$", key)]
        head = {key.rpartition(".")[2]: image.pop(key) for key in projection}
        model.image_encoder.backbone.load_state_dict(image)
        model.image_encoder.pretrained = True
        if full_model:
            model.text_encoder.backbone.load_state_dict(text_state(state))
            if not model.image_encoder.attention_pool:
                head.pop("bias")  # zeros that timm adds
            model.image_projection.projection.load_state_dict(head)
            model.text_projection.projection.load_state_dict({"weight": state["text_projection"].T})
            model.logit_scale.data.copy_(state["logit_scale"])
    except (KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[-1].strip()[:160]
        raise UserError(f"--image-weights {weights}: does not fit OpenAI's {name} ({reason})") from None


def hub_state(name):
    import open_clip  # only here: this import takes seconds

    openclip_name = re.sub("/|@", "-", name).removesuffix("px")
    logging.disable(logging.ERROR)  # our error message reports a failed download
    try:
        create = partial(open_clip.create_model, openclip_name, pretrained="openai", force_quick_gelu=True)
        return from_hub(create).state_dict()
    except (OSError, RuntimeError):
        raise UserError(
            f"{name}: OpenAI's weights are neither on this machine nor available from a model hub; "
            "name a file of them with --image-weights, or pass --image-weights random --text-weights random"
        ) from None
    finally:
        logging.disable(logging.NOTSET)


def file_state(path):
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript, which OpenAI used, is deprecated
            return torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError):
        return read_weight_file(path)


def image_state(state, backbone):
    """A state dict's image encoder, OpenAI's names -> timm's; its projection is called head."""
    filters = vision_transformer if isinstance(backbone, vision_transformer.VisionTransformer) else byobnet
    converted = filters.checkpoint_filter_fn(state, backbone)
    return {key: value for key, value in converted.items() if key in backbone.state_dict() or key.startswith("head.")}


def text_state(state):
    """A state dict's text encoder, OpenAI's names -> transformers', which has three tensors for queries, keys and values."""
    converted = {}
    for key, value in state.items():
        if not re.match(r"transformer\.|token_embedding|positional_embedding|ln_final", key):
            continue
        for pattern, replacement in TEXT_NAMES:
            key = re.sub(pattern, replacement, key)
        if ".in_proj_" in key:
            for part, tensor in zip("qkv", value.chunk(3)):
                converted[key.replace("in_proj_", f"{part}_proj.")] = tensor
        else:
            converted[key] = value
    return converted
