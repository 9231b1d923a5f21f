"""Towers from names, weight files and sizes: timm's for pictures, Hugging Face's for text."""

import logging
from functools import partial
from pathlib import Path

import huggingface_hub
import timm
import transformers
from timm.layers import LayerNorm
from timm.models import load_state_dict
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer

from storage import UserError

HUB_TIMEOUT = 5  # seconds that a model hub has for its first answer
RESNET_STRIDE = 32  # pixels of the input to a place of the paper's ResNet's last feature map
SIZED = ("vit", "mixer", "modified_resnet")  # kinds of image towers of any size

transformers.logging.set_verbosity_error()  # its notes on unused weights and missing heads help nobody here
transformers.logging.disable_progress_bar()
logging.getLogger("timm").setLevel(logging.CRITICAL)  # its errors come as exceptions too


def from_hub(load):
    """What load() returns of a model hub's files: of those that were fetched before, else of those that it then fetches.

    Raises what load() does, an OSError or a RuntimeError, within HUB_TIMEOUT where no hub answers: left alone, the libraries
    try every file five times with growing pauses.
    """
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE:
        return load()
    constants.HF_HUB_OFFLINE = True
    try:
        return load()
    except (OSError, RuntimeError) as error:
        missing = error
    finally:
        constants.HF_HUB_OFFLINE = False
    if not hub_answers():
        raise missing
    return load()


def hub_answers():
    """Whether a model hub is reached, asked as downloads are: with the same certificates, proxies and address."""
    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # of whichever HTTP library this version of huggingface_hub uses
        return False
    return True


def timm_tower(name, weights, drop_path=0.0):
    """A timm model without its classifier. weights: "pretrained" (model hub), "random", or the path of a weight file.

    drop_path: stochastic depth (Huang et al. 2016), the share of pictures for which training skips the last residual branch;
    it rises linearly from 0 at the first.
    Raises UserError for an unknown name, weights that do not fit, a hub that cannot be reached, or a model without such
    branches.
    """
    create = partial(timm.create_model, name, num_classes=0, drop_path_rate=drop_path or None)
    try:
        tower = from_hub(partial(create, pretrained=True)) if weights == "pretrained" else create()
    except TypeError:
        if not drop_path:
            raise
        raise UserError(f"--image-drop-path {drop_path}: {name} cannot skip its layers; leave it out") from None
    except (RuntimeError, ValueError) as error:
        if timm.is_model(name.partition(".")[0]):
            raise UserError(f"--image-encoder {name}: {str(error).splitlines()[0]}") from None
        near = ", ".join(timm.list_models(f"{name[:6]}*")[:5]) or "timm.list_models() has all"
        raise UserError(f"--image-encoder {name}: timm has no such model (near: {near})") from None
    except OSError as error:
        raise UserError(
            f"--image-encoder {name}: its pretrained weights are neither on this machine nor to be fetched "
            f"({type(error).__name__}); pass --image-weights FILE, or --image-weights random"
        ) from None
    if weights not in ("pretrained", "random"):
        load_weight_file(tower, name, weights)
    return tower


def read_weight_file(path):
    """The state dict in a file of any format. Raises UserError where there is none."""
    try:
        return load_state_dict(path, weights_only=True)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--image-weights {path}: no such file (nor 'pretrained' or 'random')") from None
    except Exception as error:  # whatever a damaged file makes the readers of three formats raise
        raise UserError(f"--image-weights {path}: cannot be read ({type(error).__name__}: {error})") from None


def load_weight_file(tower, name, path):
    """Loads a weight file that has to fit exactly, but for its classifier. Raises UserError where it does not."""
    state = read_weight_file(path)
    classifiers = tower.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    wanted = tower.state_dict()
    state = {
        key: value for key, value in state.items() if key in wanted or not key.startswith(tuple(f"{c}." for c in classifiers))
    }
    unfit = sorted(wanted.keys() ^ state.keys())
    unfit += [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
    if unfit:
        raise UserError(f"--image-weights {path}: does not fit {name}: {len(unfit)} tensors differ ({unfit[0]}, ...)")
    tower.load_state_dict(state)


def sized_image_tower(kind, size, patch_size, width, layers, heads, drop_path=0.0):
    """An untrained timm tower of the paper's kinds, or an MLP-Mixer (Tolstikhin et al. 2021), of any size.

    kind: "vit", "mixer" or "modified_resnet", the paper's ResNet (three-convolution stem, average pooling before strides,
    attention pooling). size, patch_size: in pixels. width, layers: features and layers; for the ResNet the channels behind
    the stem and the blocks in each of its four stages. heads: attention heads a layer, for "vit".
    drop_path: as for `timm_tower`, but a Mixer's branches are all skipped alike.
    Raises UserError where patches or strides do not fill the picture.
    """
    if kind == "modified_resnet":
        if size % RESNET_STRIDE:
            raise UserError(f"--size {size}: --image-encoder modified_resnet takes multiples of {RESNET_STRIDE} pixels")
        blocks = [ByoBlockCfg(type="bottle", d=layers, c=4 * width * 2**i, s=min(i + 1, 2), br=0.25) for i in range(4)]
        stem = {"stem_chs": (width // 2, width // 2, width), "stem_type": "", "stem_pool": "avg2"}
        config = ByoModelCfg(blocks=tuple(blocks), downsample="avg", aa_layer="avg", head_type="attn_abs", **stem)
        return ByobNet(config, num_classes=0, img_size=size, drop_path_rate=drop_path)
    if size % patch_size:
        raise UserError(f"--patch-size {patch_size}: does not divide --size {size}")
    shape = {"img_size": size, "patch_size": patch_size, "embed_dim": width, "num_classes": 0, "drop_path_rate": drop_path}
    if kind == "mixer":
        return MlpMixer(num_blocks=layers, **shape)
    norm = partial(LayerNorm, eps=1e-5)  # this and the activation are what OpenAI's weights expect
    return VisionTransformer(depth=layers, num_heads=heads, pre_norm=True, norm_layer=norm, act_layer="quick_gelu", **shape)


def random_text_tower(model_type, width, layers, heads, vocab_size, max_length):
    """The configuration of an untrained Hugging Face text tower. Raises UserError for an unknown type.

    model_type: Hugging Face's name of the family; "clip" is the paper's causal Transformer.
    """
    try:
        config = transformers.AutoConfig.for_model("clip_text_model" if model_type == "clip" else model_type)
    except ValueError:
        raise UserError(
            f"--text-encoder {model_type}: with random weights it is a model type: clip, mixer, distilbert, bert, gpt2, ..."
        ) from None
    config.vocab_size = vocab_size
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, layers, heads
    config.max_position_embeddings = max_length
    for feed_forward in ("hidden_dim", "intermediate_size"):  # each family has its own name for it
        if hasattr(config, feed_forward):
            setattr(config, feed_forward, 4 * width)
    return config


def load_pretrained(auto_class, name, **options):
    """auto_class.from_pretrained(name, **options). Raises UserError where there is no such folder and no hub has it."""
    load = partial(auto_class.from_pretrained, name, **options)
    try:
        return load() if Path(name).is_dir() else from_hub(load)
    except (OSError, ValueError, ImportError, KeyError) as error:
        what = "tokenizer" if auto_class is transformers.AutoTokenizer else "model"
        if Path(name).is_dir():
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"--text-encoder {name}: this folder holds no {what} that loads ({reason})") from None
        raise UserError(
            f"--text-encoder {name}: no such folder, and its {what} is neither on this machine nor to be fetched from a "
            "model hub; name a local folder, or a model type with --text-weights random"
        ) from None
