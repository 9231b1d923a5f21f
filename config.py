"""Every setting of a run in one place, the presets, and the command line made from them."""

import dataclasses
import difflib
import json
import shlex
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from Datasets import flickr8k
from utils.cli import HELP, dataclass_flags, flag_lines, parse
from utils.errors import UserError
from utils.files import write_json

Loss = Literal["auto", "softmax", "image", "text", "sigmoid", "bce"]
Targets = Literal["pair", "image", "smooth", "soft"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
SplitName = Literal["train", "val", "test", "all"]
Views = Literal[1, 2, 4]  # of `utils.images.view_crops`
Precision = Literal["auto", "fp32", "bf16", "fp16"]
RUN_FORMAT = 3  # of a run folder's config.json; a folder of another format is refused


@dataclass
class Config:
    # Data
    data_dir: str = ""  # folder with Images/ and captions, shards as 'DIR/{00..99}.tar', or hf:NAME; empty: Flickr8k, if found
    val_data: str = ""  # validation pictures for training on shards: a folder, shards, or hf:NAME:SPLIT
    image_column: str = ""  # image column of a table, parquet files or hf:NAME; empty: found by its name or type
    caption_column: str = ""  # caption column of a table, parquet, hf:NAME or JSON in tar files; empty: found by its name
    image_path: str = ""  # folder of the images, where it is not in data_dir
    captions_path: str = ""  # captions file, where it is not in data_dir
    download: bool = False  # download Kaggle's Flickr8k if it is not found (needs a network)
    skip_bad: bool = False  # leave out unusable rows and pictures instead of stopping; listed in skipped.txt
    cache_dir: str = ".cache"  # folder for decoded pictures and features of frozen encoders
    train_images: int = 0  # use so many of the training images only, drawn with the seed; 0: all
    num_workers: int = 4  # processes that crop while the encoders compute, and threads that decode pictures

    # Encoders
    model: str = ""  # a whole model to fine-tune: open_clip:MODEL@WEIGHTS, ViT-B/32 and the like, or a run folder
    image_encoder: str = "resnet50"  # timm name, or vit, mixer, modified_resnet to be sized
    image_weights: str = "pretrained"  # pretrained (model hub), random, or a local weight file of that model
    size: int = 0  # height and width of the image encoder's input in pixels; 0: the encoder's own
    patch_size: int = 8  # height and width of a patch in pixels, for vit and mixer
    image_width: int = 192  # features per patch, for vit and mixer; channels after the stem, for modified_resnet
    image_layers: int = 6  # layers, for vit and mixer; blocks in each of four stages, for modified_resnet
    image_heads: int = 3  # attention heads per layer, for vit
    text_encoder: str = "distilbert-base-uncased"  # Hugging Face name or folder; clip; if random, a model type
    text_weights: Literal["pretrained", "random"] = "pretrained"  # random: from scratch, sized by the next four
    text_width: int = 768  # features per token
    text_layers: int = 6  # layers
    text_heads: int = 12  # attention heads a layer
    vocab_size: int = 8192  # largest vocabulary made from the training captions; clip has OpenAI's instead
    max_length: int = 200  # tokens; longer captions are cut
    pooling: Literal["auto", "first", "mean", "last"] = "auto"  # caption feature; auto: last token if causal, else mean
    image_feature_stages: str = ""  # stages whose mean outputs are added to the image features, as blocks.5,blocks.6
    text_feature_layers: int = 1  # how many of the last layers are pooled and concatenated as text features
    freeze: Literal["none", "image", "text", "both"] = "none"  # encoders that are not trained; their features are cached
    image_unfreeze_from: str = ""  # train the image encoder from this stage on; the outputs below it are cached
    cached_crops: int = 4  # random crops per training image that a frozen part sees; 1: its centre crop

    # Heads
    projection_dim: int = 256  # width d_e of the joint embedding space; a whole model has its own
    num_projection_layers: Literal[0, 1, 2] = 1  # 0: none; 1: the paper's linear map; 2: with GELU, dropout, LayerNorm
    hidden_width: int = 0  # units of a hidden layer beside the linear map of each head; 0: none
    dropout: float = 0.1  # in the two-layer head and in hidden layers
    image_feature_dropout: float = 0.5  # on the image features, before the head
    text_feature_dropout: float = 0.2  # on the text features, before the head

    # Training
    heads_first: bool = True  # first train only the heads, on frozen pretrained encoders, in RUN_DIR/heads
    head_init: Literal["random", "cca"] = "random"  # cca: heads on frozen encoders start from canonical correlation analysis
    epochs: int = 0  # passes over the training images; 0: 60 with both encoders frozen (cca: 30), else 8 (whole model: 10)
    batch_size: int = 0  # images per step, each with the others as negatives; 0: up to 1000 if both are frozen, else 128
    steps: int = 0  # training steps; 0: as many as the epochs have
    unique_images: bool = True  # an image at most once per batch; no: batches drawn from all pairs of image and caption
    captions_per_image: int = 1  # captions sampled per image per step; the loss is the mean over them
    micro_batch_size: int = 0  # images that pass the encoders at once; fewer: less memory, same gradient; 0: all
    loss: Loss = (
        "auto"  # softmax: CLIP's; image, text: one half of it; sigmoid: SigLIP's; bce: each pair by itself; auto: the model's
    )
    targets: Targets = "pair"  # what is right: pair; image: all its captions; smooth: the pair mostly; soft: similar pairs, too
    temperature: float = 0.0  # fixed, at least 0.01; 0: learned, from 0.07 (sigmoid: 0.1) or a whole model's own
    image_encoder_lr: float = 1e-4  # peak learning rate
    text_encoder_lr: float = 1e-5  # peak learning rate
    head_lr: float = (
        0.0  # of heads and temperature; 0: 5e-3 if both are frozen (cca: 2e-3), else 1e-3 (whole model: 1e-3, 1e-5)
    )
    layer_decay: float = 1.0  # 0.7: each layer learns at 0.7 times the rate of the layer after it; 1: all at the encoder's rate
    weight_decay: float = 1e-3  # AdamW's, on weight matrices only
    warmup: float = 0.05  # share of all steps over which the learning rates rise from 0
    schedule: Literal["cosine", "plateau"] = "cosine"  # how the learning rates fall after the warm-up
    patience: int = 1  # plateau: epochs to wait for a better rsum before lowering the rates
    factor: float = 0.8  # plateau: what the rates are then multiplied by
    shard_optimizer: bool = False  # in several processes: each keeps AdamW's averages of its share of the weights only
    early_stop: int = 0  # stop after so many epochs in a row without a better rsum; 0: never
    ema_decay: float = 0.0  # per step, of a moving average of the weights, which is then scored and kept; 0: none
    image_drop_path: float = 0.0  # stochastic depth: how often the last layer is skipped, earlier ones less often
    hflip: bool = False  # flip half of the training crops, but not if a caption says left or right
    flip_left_right: bool = False  # with --hflip: flip beside captions of left and right, too
    crop: float = 0.85  # smallest random training crop, as a share of the image's shorter side; 1: no zoom

    # Generated pictures
    extra_data: str = ""  # folder of pictures and captions that GAN.py --generate wrote, mixed into training batches
    gan: Literal["none", "joint"] = "none"  # joint: a generator is trained at the same time, and its pictures are used
    gan_weight: float = 1.0  # lambda, what the generator's loss is multiplied by, for --gan joint
    extra_fraction: float = 0.25  # share of each batch that is generated, with --extra-data or --gan joint

    # Fine-tuning a whole model
    lora_rank: int = 0  # train low-rank adapters of this rank instead of the encoders' weights; 0: the weights
    keep_folder: str = ""  # folder with a subfolder of pictures per class; their zero-shot accuracy is printed after each epoch
    keep_classes: str = ""  # file of the class names for keep_folder; empty: the names of its subfolders
    keep_template: str = "a photo of a {}."  # prompt for --keep-folder, with {} in place of the class name
    keep_data: str = ""  # folder of captioned pictures; their recall is printed after each epoch
    wise_ft: bool = False  # mix the weights before and after training, and keep the best mixture (tradeoff.png)
    wise_ft_share: float = 0.05  # how much of the old score a mixture may lose, as a share of it: 0.05 is from 60% to 57%

    # The run
    seed: int = 0  # of initial weights, shuffling, captions drawn, crops and dropout
    precision: Precision = "auto"  # of matrix products; auto: bf16 or fp16 where native, else fp32
    fast_convolutions: bool = True  # fewer passes over the activations of convolutional encoders; same results up to rounding
    compile: bool = False  # torch.compile the encoders: a slow start (on a CPU with g++), then faster steps
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    run_dir: str = ""  # folder that the run writes; empty: runs/PRESET
    dry_run: bool = False  # only print what the run would do and take; write nothing
    resume: Literal["no", "yes", "auto"] = "no"  # go on in run_dir, with its settings and new rates if given; auto: if it can
    report_to: tuple[Tracker, ...] = ()  # trackers that get each epoch's figures: tensorboard, wandb, mlflow, trackio
    save_every: int = 0  # steps between checkpoints within an epoch; 0: after each epoch only
    deterministic: bool = False  # the same weights from the same seed on CUDA too, for some speed; on a CPU they always are

    def freezes(self, part):
        """Whether the "image" or the "text" encoder is frozen as a whole."""
        return self.freeze in (part, "both")


class AtMost(int):
    """A batch size that nobody passed: a run takes a smaller one where it has fewer training images."""


RANGES = {  # (what a value must be, whether it is): settings
    ("more than 0", lambda value: value > 0): "max_length projection_dim cached_crops captions_per_image text_feature_layers "
    "head_lr image_encoder_lr text_encoder_lr text_width text_layers text_heads vocab_size patch_size image_width image_layers "
    "image_heads",
    ("at least 0", lambda value: value >= 0): "epochs steps train_images batch_size micro_batch_size size num_workers "
    "hidden_width weight_decay patience seed save_every gan_weight early_stop lora_rank",
    ("at least 0 and below 1", lambda value: 0 <= value < 1): "dropout image_feature_dropout text_feature_dropout "
    "image_drop_path warmup ema_decay wise_ft_share",
    ("above 0 and at most 1", lambda value: 0 < value <= 1): "crop factor layer_decay",
    ("0 or at least 0.01", lambda value: value == 0 or value >= 0.01): "temperature",
    ("above 0 and below 1", lambda value: 0 < value < 1): "extra_fraction",
}
ARCHITECTURE = (  # what defines the model
    *("image_encoder", "size", "patch_size", "image_width", "image_layers", "image_heads"),
    *("text_encoder", "text_weights", "text_width", "text_layers", "text_heads", "vocab_size", "max_length", "pooling"),
    *("image_feature_stages", "text_feature_layers", "projection_dim", "num_projection_layers", "hidden_width"),
)
FIXED_IN_A_RUN = (  # what defines the model and its training, which a resumed run keeps; no paths, as files may have moved
    *(name for name in ARCHITECTURE if name != "text_encoder"),
    *("freeze", "image_unfreeze_from", "gan", "seed", "loss", "temperature", "train_images", "steps"),
    *("lora_rank", "layer_decay", "head_init"),
)
HUBNESS_FILE = "hubness.safetensors"  # in a run folder
HUB_PREFIX = "hf:"  # what the name of a data set on the Hugging Face hub begins with
OPEN_CLIP = "open_clip:"  # what the name of one of open_clip's models begins with
LOCAL_PREFIXES = ("runs/", "runs\\", ".", "/", "\\", "~")  # names that begin so are local folders, not a hub's
OPENAI = {  # OpenAI's names of its models: what they are short for
    name: f"{OPEN_CLIP}{name.replace('/', '-').replace('@336px', '-336')}-quickgelu@openai"
    for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
}
SUGGESTED = {  # some of open_clip's models: (for whom, million parameters, published R@1 of Flickr30k from text to image)
    "open_clip:MobileCLIP2-S0@dfndr2b": ("a laptop", "75", "-"),
    "open_clip:ViT-B-32-256@datacomp_s34b_b86k": ("a laptop", "151", "64.9"),
    "open_clip:ViT-B-16-SigLIP@webli": ("a free GPU", "203", "74.7"),
    "open_clip:ViT-B-16-SigLIP2@webli": ("a free GPU", "375", "-"),
    "open_clip:ViT-B-16-SigLIP-i18n-256@webli": ("a free GPU, many languages", "371", "72.2"),
    "open_clip:ViT-SO400M-14-SigLIP-384@webli": ("a large GPU", "878", "83.0"),
}
CONTEXT_LENGTH = 77  # tokens that OpenAI's text encoders take
SHAPES = Config(
    run_dir="runs/shapes",
    data_dir="Datasets/shapes",
    num_workers=0,
    image_encoder="test_resnet",
    image_weights="random",
    size=80,
    text_encoder="distilbert",
    text_weights="random",
    text_width=128,
    text_layers=2,
    text_heads=4,
    vocab_size=512,
    max_length=64,
    image_feature_dropout=0.0,
    text_feature_dropout=0.0,
    heads_first=False,
    epochs=15,
    batch_size=128,
    image_encoder_lr=4e-3,
    text_encoder_lr=1e-3,
    head_lr=2e-3,
    weight_decay=0.05,
    crop=0.95,
)
PAPER = replace(
    SHAPES,
    run_dir="runs/paper",
    image_encoder="modified_resnet",
    size=64,
    image_width=16,
    image_layers=1,
    text_encoder="clip",
    text_layers=4,
    text_heads=8,
    max_length=CONTEXT_LENGTH,
    image_encoder_lr=2e-3,
    text_encoder_lr=7e-4,
    epochs=36,
)
MIXER = replace(
    SHAPES,
    run_dir="runs/mixer",
    image_encoder="mixer",
    size=96,
    patch_size=16,
    image_width=128,
    image_layers=4,
    text_encoder="mixer",
    text_layers=4,
    max_length=40,
    image_encoder_lr=2e-3,
    batch_size=64,
    crop=0.97,
    epochs=44,
)
LINEAR = Config(
    run_dir="runs/linear",
    image_encoder="tf_efficientnet_lite2",
    size=384,
    text_encoder="sentence-transformers/all-MiniLM-L6-v2",
    image_feature_stages="blocks.5,blocks.6",
    text_feature_layers=3,
    freeze="both",
    cached_crops=1,
)
FAST = replace(
    LINEAR,
    run_dir="runs/fast",
    projection_dim=512,
    hidden_width=1024,
    dropout=0.5,
    head_init="cca",
    captions_per_image=5,
    epochs=16,
)
BEST = replace(
    FAST,
    run_dir="runs/best",
    freeze="none",
    image_unfreeze_from="blocks.5",
    cached_crops=8,
    batch_size=256,
    captions_per_image=3,
    epochs=12,
    image_encoder_lr=1e-3,
    text_encoder_lr=2e-4,
    ema_decay=0.98,
    image_drop_path=0.1,
    hflip=True,
)
RESNET50 = {"image_encoder": "resnet50", "image_feature_stages": "", "size": 0, "text_encoder": "distilbert-base-uncased"}
PRESETS = {
    "flickr8k": Config(run_dir="runs/flickr8k"),
    "linear": LINEAR,
    "fast": FAST,
    "best": BEST,
    "fast-resnet50": replace(FAST, **RESNET50, run_dir="runs/fast-resnet50"),
    "best-resnet50": replace(
        BEST,
        **RESNET50,
        run_dir="runs/best-resnet50",
        image_unfreeze_from="layer4",
        image_encoder_lr=3e-4,  # larger encoders, so smaller rates
        text_encoder_lr=5e-5,
    ),
    "open_clip": Config(  # rates of Goyal et al. 2022 (arXiv:2212.00638), not tried here on pretrained weights
        run_dir="runs/open_clip",
        model="open_clip:ViT-B-32-256@datacomp_s34b_b86k",
        image_feature_dropout=0.0,
        text_feature_dropout=0.0,
        image_encoder_lr=1e-5,
        text_encoder_lr=1e-5,
        weight_decay=0.1,
        warmup=0.1,
        early_stop=3,
    ),
    "shapes": SHAPES,
    "gpt2": replace(SHAPES, run_dir="runs/gpt2", text_encoder="gpt2", text_heads=8, text_encoder_lr=7e-4, epochs=28),
    "paper": PAPER,
    "mixer": MIXER,
}
PRESET_NOTES = {  # what is trained, on what, minutes on two CPU cores (-: not measured)
    "flickr8k": ("ResNet50 and DistilBERT, pretrained", "Flickr8k", "-"),
    "linear": ("linear heads on frozen EfficientNet-Lite2, MiniLM", "Flickr8k", "2 to 2.5"),
    "fast": ("heads with a hidden layer, on the same", "Flickr8k", "4"),
    "best": ("heads as in fast, then more of both encoders", "Flickr8k", "55"),
    "fast-resnet50": ("fast, with the encoders of flickr8k", "Flickr8k", "-"),
    "best-resnet50": ("best, with the encoders of flickr8k", "Flickr8k", "-"),
    "open_clip": ("fine-tunes a pretrained CLIP or SigLIP, --model", "Flickr8k", "-"),
    "shapes": ("a small ResNet and a small DistilBERT", "drawn", "2 to 3"),
    "gpt2": ("the same with GPT-2 as text encoder", "drawn", "4"),
    "paper": ("the CLIP paper's ResNet and Transformer, small", "drawn", "7"),
    "mixer": ("MLP-Mixers for both", "drawn", "5"),
}
USAGE = "python main.py [PRESET] [--flags]"
DAILY_FLAGS = (  # those that --help shows
    *("data_dir", "image_encoder", "size", "text_encoder", "freeze", "epochs", "batch_size"),
    *("head_lr", "seed", "device", "run_dir", "dry_run", "resume"),
)
OPEN_CLIP_FLAGS = (  # and those of a pretrained model
    *("data_dir", "model", "freeze", "epochs", "batch_size", "micro_batch_size", "lora_rank", "keep_folder", "wise_ft"),
    *("head_lr", "seed", "device", "run_dir", "dry_run", "resume"),
)


def is_model_name(name):
    """Whether a name is that of one of open_clip's models, or OpenAI's name of one; else it is a run folder."""
    return str(name).startswith(OPEN_CLIP) or name in OPENAI


def run_names(run):
    """The models that a --run names: one or, with commas between them, those of an ensemble."""
    names = [str(run)] if Path(run).is_dir() else [name.strip() for name in str(run).split(",")]  # a folder may have a comma
    if len(names) > 1 and not all(names):
        raise UserError(f"--run {run}: a name is missing between the commas")
    return names


def may_be_on_hub(name):
    """Whether a name can be that of a run on a model hub, USER/NAME; a local path that is not there is not looked up there."""
    return name.count("/") == 1 and not name.startswith(LOCAL_PREFIXES)


def require_runs(run):
    """Raises UserError where a --run, as of `run_names`, names a folder without a run; a hub's names are not looked up."""
    for name in run_names(run):
        if Path(name).is_dir() or not (is_model_name(name) or may_be_on_hub(name)):
            load_run(name)


def is_stream(data):
    """Whether a --data-dir or --val-data names shards or a hub's data set; else it is a folder."""
    return data.startswith(HUB_PREFIX) or data.endswith((".tar", ".parquet"))


def parse_config(arguments, default_preset=None):
    """The Config of a command line ([PRESET] [--flags]), and the name of its preset.

    default_preset: where none is named; None: flickr8k where its pictures are found or asked for, else shapes.
    Raises UserError for an unknown flag, values of the wrong type or that make no sense, own data without a preset, and where
    the run to resume or to fine-tune does not exist.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    found = "flickr8k" if flickr8k.find() or "--download" in arguments else "shapes"
    preset = arguments[0] if named else default_preset or found
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, 1)
        suggestion = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"preset {preset!r} is unknown; {suggestion}there are {', '.join(PRESETS)}")
    if {*HELP, "--help-all"} & set(arguments):
        print(main_help(preset, "--help-all" in arguments))
        sys.exit(0)
    refuse_late_preset(arguments)
    flags = []
    for word, following in pairwise([*arguments[named:], "--"]):
        flags += [word, "yes"] if word == "--resume" and following.startswith("--") else [word]

    config = parse(Config, "main.py", flags, PRESETS[preset])
    if config.resume == "yes" or config.resume == "auto" and (Path(config.run_dir) / "config.json").exists():
        config = parse(Config, "main.py", flags, replace(load_run(config.run_dir)["config"], run_dir=config.run_dir))
    else:
        if not (named or default_preset):
            require_preset(config, preset, arguments)
        config = replace(own_places(config, arguments), resume="no")
        if not is_passed("--batch-size", arguments):
            config = replace(config, batch_size=AtMost(config.batch_size))
    config = resolve_defaults(config)
    check_run_dir(config.run_dir)
    validate(config)
    return config, preset


def is_passed(flag, arguments):
    """Whether a command line has a flag, such as --data-dir."""
    return any(word.partition("=")[0].replace("_", "-") == flag for word in arguments)


def own_places(config, arguments):
    """The Config without the preset's data folder, where the command line names a captions file or pictures elsewhere.

    Raises UserError where it names pictures, and the captions would be those of the sample.
    """
    if config.data_dir != SHAPES.data_dir or is_passed("--data-dir", arguments):
        return config
    if config.image_path and not config.captions_path:
        raise UserError(f"--image-path {config.image_path}: name its captions, too, with --captions-path or --data-dir")
    return replace(config, data_dir="") if config.captions_path else config


def require_preset(config, preset, arguments):
    """Raises UserError where own data or a whole model would be trained with a preset that nobody named."""
    usual = ("", PRESETS[preset].data_dir, flickr8k.find())
    own = [name for name in ("model", "data_dir", "captions_path", "image_path") if getattr(config, name) not in usual]
    if not own:
        return
    photographs, drawn = (
        ", ".join(name for name, (_, where, _) in PRESET_NOTES.items() if where == data) for data in ("Flickr8k", "drawn")
    )
    example = shlex.join(["open_clip" if config.model else "fast", *arguments])
    raise UserError(
        f"--{own[0].replace('_', '-')} {getattr(config, own[0])}: name the preset, too: for photographs {photographs} "
        f"(pretrained encoders), from scratch {drawn}; as in python main.py {example}"
    )


def refuse_late_preset(arguments):
    """Raises UserError where a preset stands behind a flag, where it would not be taken as one."""
    switches = {f"--{flag.name}" for flag in dataclass_flags(Config()) if flag.is_bool}
    for before, word, position in zip(arguments, arguments[1:], range(1, len(arguments))):
        flag = before.replace("_", "-").replace("--no-", "--")
        takes_value = flag.startswith("-") and "=" not in flag and flag not in switches
        if word in PRESETS and not takes_value:
            if arguments[0] in PRESETS:
                raise UserError(f"{word}: {arguments[0]} is the preset already; leave one of them out")
            rest = [*arguments[:position], *arguments[position + 1 :]]
            raise UserError(f"{word}: the preset comes first: python main.py {shlex.join([word, *rest])}")


def main_help(preset, every_flag):
    """The help of main.py: the presets, and the flags of daily use or every flag, with a preset's own defaults."""
    lines = [f"usage: {USAGE}", "", "Trains CLIP on captioned pictures.", ""]
    if preset == "open_clip":
        lines += ["Models for --model (for whom; million parameters; published R@1 of Flickr30k, text to image):"]
        lines += [f"  {name:43}{who:28}{millions:>5}{recall:>7}" for name, (who, millions, recall) in SUGGESTED.items()]
        lines.append('All: python -c "import open_clip; print(*open_clip.list_pretrained(), sep=chr(10))"')
    else:
        lines.append("Presets (what is trained; on what; minutes on two CPU cores):")
        lines += [f"  {name:15}{what:51}{data:10}{minutes}" for name, (what, data, minutes) in PRESET_NOTES.items()]
        lines.append("-: not measured, needs a model hub. With no preset: flickr8k if its pictures are found, else shapes.")
    flags = dataclass_flags(resolve_defaults(PRESETS[preset]))
    if every_flag:
        return "\n".join([*lines, "", f"All flags, with the values of the preset {preset}:", *flag_lines(flags)])
    names = OPEN_CLIP_FLAGS if preset == "open_clip" else DAILY_FLAGS
    daily = [replace(flag, group="") for flag in flags if flag.name.replace("-", "_") in names]
    lines += ["", f"Flags of daily use, with the values of the preset {preset}:", *flag_lines(daily)]
    return "\n".join([*lines, "", "All flags: python main.py [PRESET] --help-all"])


def resolve_defaults(config):
    """The Config with defaults filled in: epochs, batch size and head learning rate, and the architecture of a whole model.

    Over cached features an epoch takes a fraction of a second and a step of 1000 pairs little memory, and heads alone
    bear a larger rate.
    """
    if is_model_name(config.model):  # without heads of its own; frozen encoders get linear ones, else nothing could learn
        layers = 1 if config.freeze == "both" else 0
        name = OPENAI.get(config.model, config.model).partition("@")[0]
        config = replace(config, image_encoder=name, text_encoder="the same model's")
        config = replace(config, num_projection_layers=layers, hidden_width=0)
    elif config.model:
        source = load_run(config.model)["config"]
        config = replace(config, **{name: getattr(source, name) for name in ARCHITECTURE})
        if config.freeze == "both":
            config = replace(config, num_projection_layers=max(1, config.num_projection_layers))
    if is_stream(config.data_dir):  # features of frozen encoders are not kept, so there is no cheap first stage
        config = replace(config, heads_first=False, head_init="random")
    epochs, batch_size, head_lr = (60, 1000, 5e-3) if config.freeze == "both" else (8, 128, 1e-3)
    if config.freeze == "both" and config.head_init == "cca":
        epochs, head_lr = 30, 2e-3
    if is_model_name(config.model):
        epochs, head_lr = (60, 1e-3) if config.freeze == "both" else (10, 1e-5)
    return replace(
        config,
        epochs=config.epochs or epochs,
        batch_size=config.batch_size or AtMost(batch_size),
        head_lr=config.head_lr or head_lr,
    )


def trains_heads_first(config):
    """Whether heads with random weights are first trained alone: on pretrained encoders that are not both frozen."""
    new_heads = "random" not in (config.image_weights, config.text_weights) and not config.model
    return config.heads_first and new_heads and config.freeze != "both" and config.num_projection_layers > 0


def heads_config(config, num_images):
    """The Config that trains the heads alone, in RUN_DIR/heads, before a run. num_images: real ones for training."""
    run_dir = Path(config.run_dir) / "heads"
    config = replace(config, resume=config.resume if (run_dir / "config.json").exists() else "no", run_dir=str(run_dir))
    config = replace(config, freeze="both", image_unfreeze_from="", gan="none", extra_data="", cached_crops=1, hflip=False)
    config = replace(config, keep_folder="", keep_data="", report_to=())
    config = replace(config, micro_batch_size=0, epochs=0, steps=0, batch_size=0, head_lr=0)
    config = resolve_defaults(config)
    return replace(config, batch_size=min(config.batch_size, num_images))


def generated_per_batch(config):
    """How many of a batch's pictures are generated."""
    return round(config.extra_fraction * config.batch_size) if config.extra_data or config.gan == "joint" else 0


def check_run_dir(run_dir):
    """Raises UserError for a run folder that is the current folder or holds it: an earlier run's folder is renamed."""
    if not run_dir or Path.cwd().is_relative_to(Path(run_dir).resolve()):
        raise UserError(f'--run-dir "{run_dir}": a run needs its own folder; name one, such as runs/mine')


def refuse_changes(config, saved):
    """Raises UserError where a Config to resume with differs from the run's saved one in what makes the model or its input."""
    for name in (*FIXED_IN_A_RUN, "image_weights"):
        before, now = getattr(saved, name), getattr(config, name)
        if before != now and (name in FIXED_IN_A_RUN or "random" in (before, now)):
            raise UserError(
                f"--{name.replace('_', '-')} {now}: {config.run_dir} was started with {before!r}, and a resumed run keeps it; "
                "leave the flag out, or start a new run with another --run-dir"
            )


def validate(config):
    """Raises UserError for a value outside its range, or values that do not go together."""
    for (wanted, is_inside), names in RANGES.items():
        for name in names.split():
            value = getattr(config, name)
            if not is_inside(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be {wanted}")
    for is_broken, message in rules(config):
        if is_broken:
            raise UserError(message)


def rules(config):
    """What must not be set together: (whether it is, what to say). fits: a batch is lowered to whole micro-batches."""
    c, fits = config, isinstance(config.batch_size, AtMost) and config.micro_batch_size <= config.batch_size
    cached, count = c.freezes("image") or bool(c.image_unfreeze_from), generated_per_batch(c)
    joint, generates = c.gan == "joint", bool(c.extra_data) or c.gan == "joint"
    yield c.batch_size == 1, "--batch-size 1: a single pair has no negatives; use 2 or more"
    micro_batch = f"--micro-batch-size {c.micro_batch_size}: does not divide --batch-size {c.batch_size}"
    yield c.micro_batch_size and c.batch_size % c.micro_batch_size and not fits, micro_batch
    yield c.extra_data and joint, "--extra-data, --gan joint: either fills a share of the batch; leave one out"
    fraction = f"--extra-fraction {c.extra_fraction}: makes {count} of {c.batch_size} pictures; at least 2 are needed"
    yield generates and not 2 <= count < c.batch_size, fraction
    yield (
        joint and (cached or c.micro_batch_size),
        (
            "--gan joint: generated pictures have to pass the whole image encoder in one batch; leave out "
            "--freeze image or both, --image-unfreeze-from and --micro-batch-size"
        ),
    )
    own_loss = c.loss in ("auto", "softmax") and c.targets == "pair" and c.unique_images
    yield (
        joint and not own_loss,
        "--gan joint: goes with CLIP's own loss and targets and unique images; leave the other flags out",
    )
    sides = f"--targets {c.targets}: are probabilities, and --loss {c.loss} takes each pair as right or wrong"
    yield c.loss in ("sigmoid", "bce") and c.targets in ("smooth", "soft"), sides
    repeated = "--no-unique-images: draws one caption at a time, from real images; pass --captions-per-image 1, no --extra-data"
    yield not c.unique_images and (c.captions_per_image > 1 or c.extra_data), repeated
    yield from stream_rules(c)
    yield c.flip_left_right and not c.hflip, "--flip-left-right: flips nothing without --hflip; add it"
    nothing = "--freeze both, --num-projection-layers 0: nothing but the temperature is left to train; leave one out"
    yield c.freezes("image") and c.freezes("text") and c.num_projection_layers == 0, nothing
    cca, heads_alone = c.head_init == "cca", c.freeze == "both" or trains_heads_first(c)
    unfrozen = "--head-init cca: is for new heads on frozen pretrained encoders; add --freeze both, or pass --head-init random"
    yield cca and (c.model or not heads_alone), unfrozen
    headless = "--hidden-width, --head-init cca: are for heads, and --num-projection-layers 0 has none; leave one out"
    yield c.num_projection_layers == 0 and not c.model and (c.hidden_width or cca), headless
    several = "--captions-per-image: a generated picture has one caption; leave it out with --gan joint"
    yield joint and c.captions_per_image > 1, several
    unfreeze = f"--image-unfreeze-from {c.image_unfreeze_from}: --freeze {c.freeze} trains no image encoder"
    yield c.image_unfreeze_from and c.freezes("image"), unfreeze
    yield c.hflip and c.cached_crops == 1 and cached, "--hflip: --cached-crops 1 keeps centre crops only; keep 2 or more"
    compiled = "--compile: does not go with --image-unfreeze-from, which enters the encoder at a stage; leave one out"
    yield c.image_unfreeze_from and c.compile, compiled
    clip_text = "--text-encoder clip: has no weights of its own; pass --text-weights random, or --model ViT-B/32"
    yield c.text_encoder == "clip" and c.text_weights == "pretrained" and not c.model, clip_text
    parts = "--model: brings both encoders; leave --image-feature-stages, --text-feature-layers and --image-unfreeze-from out"
    more_features = is_model_name(c.model) and (c.image_feature_stages or c.text_feature_layers > 1)
    yield c.model and c.image_unfreeze_from or more_features, parts
    itself = f"--run-dir {c.run_dir}: is the run that is fine-tuned; name another"
    yield c.model and Path(c.model).resolve() == Path(c.run_dir).resolve(), itself
    fine_tuned = "--wise-ft, --lora-rank: are for a whole model; name one with --model"
    yield (c.wise_ft or c.lora_rank) and not c.model, fine_tuned
    yield c.wise_ft and not (c.keep_folder or c.keep_data), "--wise-ft: name what to keep, with --keep-folder or --keep-data"
    yield c.keep_folder and c.keep_data, "--keep-folder, --keep-data: one score is watched; leave one out"
    frozen = f"--lora-rank: trains both encoders; leave --freeze {c.freeze} out"
    yield c.lora_rank and c.freeze != "none", frozen
    image_heads = f"--image-width {c.image_width}: must be a multiple of --image-heads {c.image_heads}"
    yield c.image_encoder == "vit" and c.image_width % c.image_heads, image_heads
    text_heads = f"--text-width {c.text_width}: must be a multiple of --text-heads {c.text_heads}"
    yield c.text_weights == "random" and c.text_width % c.text_heads, text_heads


def stream_rules(c):
    """As `rules`, for what goes with shards. c: a Config."""
    stream, shards = is_stream(c.data_dir), f"--data-dir {c.data_dir}: is read in shards"
    yield stream and not c.val_data, f"{shards}; name validation pictures with --val-data, a folder or shards"
    yield c.val_data and not stream, "--val-data: goes with shards; a folder's own lists name its validation images"
    kept = "--image-unfreeze-from, --extra-data, --gan, --train-images and --no-unique-images need a folder; leave them out"
    other = c.image_unfreeze_from or c.extra_data or c.gan == "joint" or c.train_images or not c.unique_images
    yield stream and other, f"{shards}; {kept}"
    places = "--captions-path, --image-path: are of a folder, and --data-dir names shards; leave them out"
    yield stream and (c.captions_path or c.image_path), places


def without_paths(config):
    """The Config with paths cut to their last part, for a copy of the run that leaves this machine."""
    places = [
        "data_dir",
        "val_data",
        "image_path",
        "captions_path",
        "image_weights",
        "text_encoder",
        "extra_data",
        "run_dir",
        "cache_dir",
    ]
    places += ["model", "keep_folder", "keep_classes", "keep_data"]
    return replace(config, **{name: last_part(getattr(config, name)) for name in places})


def last_part(name):
    """A path's last part; the name of a model on a hub, such as google-bert/bert-base-uncased, as it is."""
    if name.startswith(HUB_PREFIX):
        return HUB_PREFIX + last_part(name.removeprefix(HUB_PREFIX))
    if name.startswith(OPEN_CLIP):
        model, at, weights = name.partition("@")
        return f"{model}{at}{Path(weights).name}"
    is_path = Path(name).is_absolute() or Path(name).exists() or name.startswith((".", "~"))
    return Path(name).name if is_path else name


def save_run(run_dir, config, encoders):
    """Writes run_dir/config.json: the settings, and what rebuilding the encoders takes."""
    saved = {"format": RUN_FORMAT, "config": dataclasses.asdict(config), "encoders": encoders}
    write_json(Path(run_dir) / "config.json", saved)


def load_run(run_dir):
    """What `save_run` wrote, {"config": Config, "encoders": dict}. Raises UserError where it is missing, damaged or foreign."""
    path = Path(run_dir) / "config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved["format"] != RUN_FORMAT:
            raise UserError(f"{path}: format {saved['format']}, but this version reads {RUN_FORMAT}; train it again")
        settings = saved["config"] | {"resume": "no", "report_to": tuple(saved["config"].get("report_to", ()))}
        return {"config": Config(**settings), "encoders": saved["encoders"]}
    except (FileNotFoundError, NotADirectoryError):
        hint = f", or write {OPEN_CLIP}{run_dir}" if "@" in str(run_dir) else ""
        raise UserError(f"{run_dir}: no run is there (no config.json); train one with python main.py{hint}") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged or of another version ({type(error).__name__}: {error}); train it again") from None
