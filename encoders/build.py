"""Create encoders from a name, a weight file or sizes: timm for images, Hugging Face for text."""

import contextlib
import logging
import re
from functools import partial
from pathlib import Path

import timm
import transformers
from timm.data import resolve_model_data_config
from timm.layers import AttentionPool2d, LayerNorm
from timm.models import load_state_dict
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer

from encoders import cbow, text_mixer  # noqa: F401  they register their model types with transformers
from encoders.hub import from_hub
from encoders.text import max_tokens
from utils.errors import OUT_OF_MEMORY, UserError

RESNET_STRIDE = 32  # input pixels per position of the last feature map of the paper's ResNet
SIZED_KINDS = ("vit", "mixer", "modified_resnet")  # image encoders that can be built in any size

FILE_KEYS = ("_name_or_path", "transformers_version", "dtype", "architectures")  # in a configuration, not about the model

IMAGE_ADVICE = "choose another image encoder, or another --size (0: its own)"
TEXT_ADVICE = "choose another text encoder, such as bert, distilbert, roberta or t5"

transformers.logging.set_verbosity_error()  # else it warns of unused weights and missing heads
transformers.logging.disable_progress_bar()
logging.getLogger("timm").setLevel(logging.CRITICAL)  # its errors are also raised as exceptions


@contextlib.contextmanager
def refused_in_a_line(model, advice):
    """A context in which what a library's model raises, of any type, becomes a UserError of one line.

    model: the flag and its value. A lack of memory is no fault of the model, and stays what it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if OUT_OF_MEMORY.search(str(error)):
            raise
        lines = [re.sub(r"^\w+Error: ", "", line.strip()).rstrip(".") for line in str(error).split("\n") if line.strip()]
        lines = [line for line in lines if not line.endswith(":")]  # headings
        named = bool(lines) and not isinstance(error, (AttributeError, TypeError, KeyError))  # these speak of its code only
        reason = lines[0][:160] if named else "it takes or returns something else than encoders do"
        raise UserError(f"{model}: cannot be used ({reason}); {advice}") from None


def timm_encoder(name, weights, drop_path=0.0):
    """A timm model without its classifier. weights: "pretrained" (model hub), "random", or the path of a weight file.

    drop_path: stochastic depth (Huang et al. 2016), the probability that training skips the last residual branch for an
    image; it rises linearly from 0 at the first branch.
    Raises UserError for an unknown name, weights that do not fit, a hub that cannot be reached, or a model without residual
    branches.
    """
    create = partial(timm.create_model, name, num_classes=0, drop_path_rate=drop_path or None)
    try:
        encoder = from_hub(partial(create, pretrained=True)) if weights == "pretrained" else create()
    except TypeError:
        if not drop_path:
            raise
        raise UserError(f"--image-drop-path {drop_path}: {name} cannot skip its layers; leave the flag out") from None
    except (RuntimeError, ValueError) as error:
        if timm.is_model(name.partition(".")[0]):
            raise UserError(f"--image-encoder {name}: {str(error).splitlines()[0]}") from None
        similar = ", ".join(timm.list_models(f"{name[:6]}*")[:5]) or "timm.list_models() lists all"
        raise UserError(f"--image-encoder {name}: timm has no such model (similar: {similar})") from None
    except OSError as error:
        raise UserError(
            f"--image-encoder {name}: its pretrained weights are neither on this machine nor available for "
            f"download ({type(error).__name__}); pass --image-weights FILE, or --image-weights random"
        ) from None
    if weights not in ("pretrained", "random"):
        load_weight_file(encoder, name, weights)
    return encoder


def input_config(backbone):
    """What pictures a timm model was trained on: {"input_size": (3, h, w), "mean", "std", ...}, pixels from 0 to 1."""
    return resolve_model_data_config(backbone)


def ends_in_attention_pool(backbone):
    return isinstance(getattr(backbone, "head", None), AttentionPool2d)


def read_weight_file(path):
    """The state dict in a weight file of any format that timm reads. Raises UserError where it cannot be read."""
    try:
        return load_state_dict(path, weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--image-weights {path}: no such file (nor 'pretrained' or 'random')") from None
    except Exception as error:  # the readers of the three formats raise many types
        raise UserError(f"--image-weights {path}: cannot be read ({type(error).__name__}: {error})") from None


def load_weight_file(encoder, name, path):
    """Loads a weight file; all tensors but the classifier must match. Raises UserError where they do not."""
    state = read_weight_file(path)
    classifiers = encoder.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    expected = encoder.state_dict()
    state = {
        key: value for key, value in state.items() if key in expected or not key.startswith(tuple(f"{c}." for c in classifiers))
    }
    mismatched = sorted(expected.keys() ^ state.keys())
    mismatched += [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    if mismatched:
        raise UserError(f"--image-weights {path}: does not fit {name}: {len(mismatched)} tensors differ ({mismatched[0]}, ...)")
    encoder.load_state_dict(state)


def sized_image_encoder(kind, size, patch_size, width, layers, heads, drop_path=0.0):
    """An untrained timm model of any size: the paper's ViT or ResNet, or an MLP-Mixer (Tolstikhin et al. 2021).

    kind: "vit", "mixer" or "modified_resnet", the paper's ResNet (three-convolution stem, average pooling before strides,
    attention pooling). size, patch_size: in pixels. width, layers: features and layers; for the ResNet the channels after
    the stem and the blocks in each of its four stages. heads: attention heads per layer, for "vit".
    drop_path: as for `timm_encoder`, but the same for all branches of a Mixer.
    Raises UserError where size is not a multiple of the patch size or of the ResNet's stride.
    """
    if kind == "modified_resnet":
        if size % RESNET_STRIDE:
            raise UserError(f"--size {size}: --image-encoder modified_resnet needs multiples of {RESNET_STRIDE} pixels")
        blocks = [ByoBlockCfg(type="bottle", d=layers, c=4 * width * 2**i, s=min(i + 1, 2), br=0.25) for i in range(4)]
        stem = {"stem_chs": (width // 2, width // 2, width), "stem_type": "", "stem_pool": "avg2"}
        config = ByoModelCfg(blocks=tuple(blocks), downsample="avg", aa_layer="avg", head_type="attn_abs", **stem)
        return ByobNet(config, num_classes=0, img_size=size, drop_path_rate=drop_path)
    if size % patch_size:
        raise UserError(f"--patch-size {patch_size}: does not divide --size {size}")
    shape = {"img_size": size, "patch_size": patch_size, "embed_dim": width, "num_classes": 0, "drop_path_rate": drop_path}
    if kind == "mixer":
        return MlpMixer(num_blocks=layers, **shape)
    norm = partial(LayerNorm, eps=1e-5)  # OpenAI's weights expect this and the activation
    return VisionTransformer(depth=layers, num_heads=heads, pre_norm=True, norm_layer=norm, act_layer="quick_gelu", **shape)


def random_text_model(model_type, width, layers, heads, vocab_size, max_length):
    """An untrained Hugging Face text model for max_length tokens. Raises UserError for a type that is unknown or not of text.

    model_type: Hugging Face's name of the architecture; "clip" is the paper's causal Transformer.
    """
    with refused_in_a_line(f"--text-encoder {model_type} with --text-weights random", TEXT_ADVICE):
        config = random_text_config(model_type, width, layers, heads, vocab_size, max_length)
        model = transformers.AutoModel.from_config(config)
        missing = max_length - max_tokens(model)
        if missing > 0:  # some positions are never used, as RoBERTa's first ones
            config.max_position_embeddings += missing
            model = transformers.AutoModel.from_config(config)
    return model


def random_text_config(model_type, width, layers, heads, vocab_size, max_length):
    """The configuration of an untrained Hugging Face text encoder, as for `random_text_model`."""
    if model_type != "clip" and model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"--text-encoder {model_type}: random weights need a model type: clip, mixer, cbow, distilbert, bert, gpt2, ..."
        )
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = transformers.AutoConfig.for_model("clip_text_model" if model_type == "clip" else model_type, **sizes)
    config.vocab_size = vocab_size
    with contextlib.suppress(NotImplementedError):  # XLNet has no limit, and refuses to be given one
        config.max_position_embeddings = max_length
    same_sizes = {"num_key_value_heads": heads, "word_embed_proj_dim": width}
    feed_forward = ("hidden_dim", "intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "d_inner")
    for name, value in (same_sizes | dict.fromkeys(feed_forward, 4 * width)).items():  # the names depend on the architecture
        if hasattr(config, name):
            setattr(config, name, value)
    for name in ("decoder_layers", "num_decoder_layers"):  # is not used, `text_encoder_of`
        if hasattr(config, name):
            setattr(config, name, 1)
    if getattr(config, "pad_token_id", None) and model_type != "clip":
        config.pad_token_id = 0  # as of the tokenizers trained here
    for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "decoder_start_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= vocab_size:
            setattr(config, name, 0)  # it is of another vocabulary, and not used
    return config


def plain_config(config):
    """A Hugging Face configuration as plain values, without what is not about the model."""
    return {key: value for key, value in config.to_dict().items() if key not in FILE_KEYS}


def load_pretrained(auto_class, name, **options):
    """auto_class.from_pretrained(name, **options). Raises UserError where neither a folder nor a hub has it."""
    load = partial(auto_class.from_pretrained, name, **options)
    try:
        return load() if Path(name).is_dir() else from_hub(load)
    except (OSError, ValueError, ImportError, KeyError) as error:
        what = "tokenizer" if auto_class is transformers.AutoTokenizer else "model"
        if Path(name).is_dir():
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"--text-encoder {name}: no {what} can be loaded from this folder ({reason})") from None
        raise UserError(
            f"--text-encoder {name}: no such folder, and its {what} is neither on this machine nor available from "
            "a model hub; name a local folder, or a model type with --text-weights random"
        ) from None
