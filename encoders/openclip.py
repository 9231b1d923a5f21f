"""open_clip's models, by names such as open_clip:ViT-B-32@laion2b_s34b_b79k: their two encoders, and what they were made with.

A model is described by plain values, its architecture, from which a run folder builds it again without a network:

    model      what open_clip builds it from; hf_config: the configuration of a Hugging Face text encoder
    preprocess how its pictures are resized and normalised
    clean      how its captions are cleaned before they are split into tokens; pad_id: the token that fills them up
"""

import difflib
import json
import tempfile
import warnings
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import nn

from config import OPEN_CLIP, OPENAI
from encoders.build import load_pretrained, plain_config
from encoders.hub import from_hub
from encoders.tokenizer import CleaningTokenizer, configure_tokenizer, openai_tokenizer
from utils.errors import UserError

CONFIG_FILE = "open_clip_config.json"  # which open_clip writes beside a checkpoint
CHECKPOINTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")  # in a folder, the first that is there
MODEL_KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")
NEAREST = 3  # names to suggest for an unknown one


@dataclass
class OpenClip:
    """Two encoders that end in their projections, and the scale and bias of the logits.

    visual: (n, 3, h, w) normalised pixels -> (n, d_e). text: (n, l) token ids -> (n, d_e). logit_bias: None in a model that was
    trained with a softmax.
    """

    visual: nn.Module
    text: nn.Module
    logit_scale: torch.Tensor
    logit_bias: torch.Tensor | None


def split_name(name):
    """A name -> (model, weights). Raises UserError for a model that open_clip has not, or weights that it has not."""
    import open_clip  # only here and below: this import takes seconds

    model, _, weights = OPENAI.get(name, name).removeprefix(OPEN_CLIP).partition("@")
    if model not in open_clip.list_models():
        close = difflib.get_close_matches(model, open_clip.list_models(), NEAREST, cutoff=0.5)
        nearest = f"the nearest are {', '.join(close)}" if close else "open_clip.list_models() lists all"
        raise UserError(f"{name}: open_clip has no model {model!r}; {nearest}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    weights = str(Path(weights).expanduser()) if weights.startswith("~") else weights
    if weights in ("random", *tags) or weights and Path(weights).exists():
        return model, weights
    what = f"no weights {weights!r}, and no such file" if weights else "no weights are named; add @WEIGHTS"
    known = ", ".join([*(difflib.get_close_matches(weights, tags, NEAREST) or tags), "random"])
    raise UserError(f"{name}: {what}; for {model} there are {known}, or name a local checkpoint")


def load_open_clip(name, size=0, download_root=None):
    """(OpenClip, tokenizer, architecture) of a name. size: of its input in pixels; 0: its own.

    download_root: the folder for weights that are downloaded; None: the model hub's cache.

    Raises UserError for an unknown name, weights that do not fit, or a hub that cannot be reached.
    """
    import open_clip

    model, weights = split_name(name)
    tag = open_clip.get_pretrained_cfg(model, weights)
    beside = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    given = read_config(beside / CONFIG_FILE) if Path(weights).exists() else {}
    found = deepcopy(given.get("model_cfg") or open_clip.get_model_config(model))
    found = model_config(found, tag, size)
    if Path(weights).is_file() and torchscript_state(weights):  # OpenAI's own archives, which had this activation
        found["quick_gelu"] = True
    local = beside if Path(weights).exists() else None
    tokenizer, clean = open_clip_tokenizer(name, found["text_cfg"], local)
    architecture = {"name": model, "clean": clean, "pad_id": tokenizer.padding["pad_id"]}
    architecture["model"] = {key: found[key] for key in MODEL_KEYS if key in found}
    found["text_cfg"].pop("hf_tokenizer_name", None)  # a name on a hub, or a path, which a run folder does not need
    if "hf_model_name" in found["text_cfg"]:
        source = local if local and (local / "config.json").exists() else found["text_cfg"]["hf_model_name"]
        architecture["hf_config"] = plain_config(fetch(transformers.AutoConfig, source, name, "configuration"))
        found["text_cfg"]["hf_model_name"] = Path(found["text_cfg"]["hf_model_name"]).name
    # Weights without a tag are most likely made with the preprocessing of the model's first one.
    likely = tag or next((open_clip.get_pretrained_cfg(model, t) for t in open_clip.list_pretrained_tags_by_model(model)), {})
    base = asdict(open_clip.transform.PreprocessCfg())
    preprocess = open_clip.transform.merge_preprocess_dict(base, given.get("preprocess_cfg") or likely)
    if preprocess["resize_mode"] == "longest":
        raise UserError(f"{name}: pads its pictures to a square, which is not supported; choose another model")
    architecture["preprocess"] = preprocess
    parts = read_weights(name, weights, tag, architecture, found.get("multimodal_cfg"), download_root)
    return parts, tokenizer, architecture


def read_config(path):
    """What open_clip wrote beside a checkpoint; {} where there is no such file. Raises UserError for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); restore or remove it") from None


def model_config(found, tag, size):
    """open_clip's configuration of a model, with the activation of its weights and an input size, that fetches nothing."""
    if "quick_gelu" in tag:
        found["quick_gelu"] = tag["quick_gelu"]
    image, text = found["vision_cfg"], found["text_cfg"]
    image["output_tokens"] = text["output_tokens"] = False  # CoCa's decoder would need them
    if "timm_model_name" in image:
        image["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if size:
        image["image_size"] = size
    return found


def open_clip_tokenizer(name, text_cfg, local):
    """(tokenizer, how texts are cleaned). text_cfg: open_clip's; local: the folder of a local checkpoint, or None."""
    options, length = text_cfg.get("tokenizer_kwargs") or {}, text_cfg.get("context_length", 77)
    if not text_cfg.get("hf_tokenizer_name"):
        clean = options.get("clean", "lower")
        return CleaningTokenizer(openai_tokenizer(length), clean), clean
    clean = options.get("clean", "whitespace")
    source = local if local and (local / "tokenizer.json").exists() else text_cfg["hf_tokenizer_name"]
    hf_tokenizer = fetch(transformers.AutoTokenizer, source, name, "tokenizer")
    tokenizer, pad_id = hf_tokenizer.backend_tokenizer, hf_tokenizer.pad_token_id
    if options.get("strip_sep_token"):  # the last token of a text is then replaced by padding
        first = [(hf_tokenizer.cls_token, hf_tokenizer.cls_token_id)]
        template = f"{hf_tokenizer.cls_token} $A"
        tokenizer.post_processor = transformers.convert_slow_tokenizer.processors.TemplateProcessing(template, None, first)
        length -= 1
    configure_tokenizer(tokenizer, length, pad_id, hf_tokenizer.pad_token)
    return CleaningTokenizer(tokenizer, clean), clean


def fetch(auto_class, source, name, what):
    try:
        return load_pretrained(auto_class, str(source))
    except UserError:
        raise UserError(
            f"{name}: its {what} {source} is neither on this machine nor available from a model hub; for a local checkpoint "
            "put its tokenizer.json and config.json into the same folder"
        ) from None


def build_open_clip(architecture):
    """The OpenClip that an architecture describes, with random weights. Raises UserError where open_clip cannot build it."""
    model = build_model(architecture)
    resize_input(model, architecture)
    return as_parts(model)


def build_model(architecture, decoder=None):
    """open_clip's own model, at the input size of its weights. decoder: CoCa's configuration of one, to load its weights."""
    import open_clip

    cfg = deepcopy(architecture["model"])
    with tempfile.TemporaryDirectory() as folder:
        if "hf_config" in architecture:  # open_clip reads it from a folder
            transformers.AutoConfig.for_model(**architecture["hf_config"]).save_pretrained(folder)
            cfg["text_cfg"]["hf_model_name"] = folder
        try:
            return open_clip.CoCa(**cfg, multimodal_cfg=decoder) if decoder else open_clip.CustomTextCLIP(**cfg)
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            reason = str(error).split("\n")[0][:160]
            raise UserError(f"{architecture['name']}: open_clip cannot build it so ({reason}); try without --size") from None


def resize_input(model, architecture):
    """Resizes what depends on the input size in a timm encoder; open_clip's own encoders are built in the right size."""
    image = architecture["model"]["vision_cfg"]
    if "timm_model_name" in image and model.visual.trunk.default_cfg["input_size"][1] != image["image_size"]:
        model.visual.set_input_size(image["image_size"])


def as_parts(model):
    bias = model.logit_bias
    return OpenClip(model.visual, model.text, model.logit_scale.data.view(()), None if bias is None else bias.data.view(()))


def read_weights(name, weights, tag, architecture, decoder, download_root=None):
    """The OpenClip of an architecture with the weights of a tag or a local checkpoint; random: as it is built."""
    import open_clip

    if weights == "random":
        return build_open_clip(architecture)
    try:
        download = partial(open_clip.download_pretrained, tag, cache_dir=download_root)
        path = from_hub(download) if tag else checkpoint_file(name, Path(weights))
    except (OSError, RuntimeError):
        raise UserError(
            f"{name}: its weights are neither on this machine nor available from a model hub; name a local checkpoint, "
            f"{OPENAI.get(name, name).partition('@')[0]}@FILE"
        ) from None
    model = build_model(architecture, decoder)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            open_clip.load_checkpoint(model, plain_checkpoint(path, Path(folder) / "weights.pt"))
    except Exception as error:  # the readers of the formats raise many types
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        signs = ("size mismatch", "Missing", "Unexpected")
        first = next((line for line in lines if line.startswith(signs)), lines[-1])
        raise UserError(f"{name}: the checkpoint is not of this model ({first[:160]})") from None
    resize_input(model, architecture)
    return as_parts(model)


def checkpoint_file(name, path):
    files = [path] if path.is_file() else [file for pattern in CHECKPOINTS for file in sorted(path.glob(pattern))]
    if not files:
        raise UserError(f"{name}: no checkpoint in this folder ({', '.join(CHECKPOINTS)})")
    return files[0]


def plain_checkpoint(path, place):
    """The path of a checkpoint that open_clip reads; the tensors of OpenAI's TorchScript archives are written to `place`."""
    state = torchscript_state(path)
    if state is None:
        return str(path)
    torch.save(state, place)
    return str(place)


def torchscript_state(path):
    """The tensors of a TorchScript archive; None for any other file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
            state = torch.jit.load(path, map_location="cpu").state_dict()
    except (RuntimeError, ValueError):
        return None
    return {key: value for key, value in state.items() if key not in ("input_resolution", "context_length", "vocab_size")}
