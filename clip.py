"""CLIP (Radford et al. 2021): two encoders, two projection heads, a temperature, and the symmetric loss.

The lines of the paper's pseudocode (its figure 3) are beside the code that implements them. Below are the functions that
create a model from a Config, save and load it, and OpenAI's calls `load` and `tokenize`.
"""

import math
import sys
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from config import (
    CONTEXT_LENGTH,
    HUBNESS_FILE,
    OPENAI,
    SUGGESTED,
    is_model_name,
    load_run,
    may_be_on_hub,
    save_run,
    without_paths,
)
from encoders import simple_tokenizer  # noqa: F401
from encoders.build import IMAGE_ADVICE, TEXT_ADVICE, load_pretrained, random_text_model, refused_in_a_line
from encoders.hub import COPIED, OF_WEIGHTS, WRITTEN, HubModel, copy_run_files, fetch_run, require_copy_folder, weights_as_bytes
from encoders.hubness import load_hubness
from encoders.openai import (  # noqa: F401  as clip.model.build_model
    OpenAINames,
    build_model,
    convert_weights,
    encode_floats,
    ids_and_mask,
    tokens,
    transform,
    transform_of,
)
from encoders.openclip import build_open_clip, load_open_clip
from encoders.stages import run_from_stage
from encoders.tokenizer import CleaningTokenizer, openai_tokenizer, pretrained_tokenizer, read_tokenizer, train_tokenizer
from modules import ImageEncoder, OpenClipImageEncoder, OpenClipTextEncoder, ProjectionHead, TextEncoder
from utils.device import pick_device
from utils.errors import UserError
from utils.files import atomic_write

last_tokenizer = None  # of the last model that `load` returned, for `tokenize`
MAX_LOGIT_SCALE = math.log(100)  # the paper never scales logits by more than 100


class UnknownModel(UserError, RuntimeError):
    """No run folder or model has this name; also a RuntimeError, as OpenAI's `clip.load` raises."""


class CLIPModel(nn.Module, OpenAINames, HubModel):
    """Image encoder, text encoder and their projection heads.

    image_encoder: maps (n, 3, h, w) pixels to (n, d_i) features and has the attribute width, d_i; text_encoder maps
    (n, l) token ids and their mask to (n, d_t). tokenizer: makes the token ids. projection_dim: d_e. layers, hidden_width and
    dropout: of the heads, as in `modules.ProjectionHead`. feature_dropouts: their feature_dropout, of images and texts.
    """

    def __init__(
        self,
        image_encoder,
        text_encoder,
        tokenizer,
        projection_dim,
        layers=1,
        hidden_width=0,
        dropout=0.1,
        feature_dropouts=(0.0, 0.0),
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.text_encoder = text_encoder
        bias, head = getattr(image_encoder, "attention_pool", False), (projection_dim, layers, hidden_width, dropout)
        self.image_projection = ProjectionHead(image_encoder.width, *head, feature_dropouts[0], bias)
        self.text_projection = ProjectionHead(text_encoder.width, *head, feature_dropouts[1])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = None  # of the sigmoid loss
        self.tokenizer = tokenizer
        self.open_clip = None  # the architecture of one of open_clip's models, `encoders.openclip`
        self.run_dir = None  # the folder that `load` read it from
        self.hubness = None  # an `encoders.hubness.Hubness`, which corrects the scores of a search
        self.views = 1  # crops of each picture that are embedded for a search, `utils.images.view_crops`

    def save_pretrained(self, save_directory, **options):
        """huggingface_hub's call: writes a run folder with the current weights. options: huggingface_hub's.

        For the run's own folder only the weights are written: huggingface_hub would first delete its config.json.
        Raises UserError for a model that was not loaded from a run folder, and as `require_copy_folder` does.
        """
        if self.run_dir is None:
            raise UserError("only a model that clip.load found in a run folder can be saved as one; train it with main.py")
        if Path(save_directory).resolve() != Path(self.run_dir).resolve():
            require_copy_folder(save_directory, (*WRITTEN, *COPIED))
            return super().save_pretrained(save_directory, **options)
        save_weights(self, save_directory)
        if options.pop("push_to_hub", False):
            return self.push_to_hub(**{"repo_id": Path(save_directory).name} | options)

    def _save_pretrained(self, save_directory):
        """Called by huggingface_hub's save_pretrained and push_to_hub. Local paths are not written."""
        run = load_run(self.run_dir)
        save_run(save_directory, without_paths(run["config"]), run["encoders"])
        save_weights(self, save_directory)
        copy_run_files(self.run_dir, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id, **options):
        """Called by huggingface_hub's from_pretrained."""
        names = "revision", "cache_dir", "token", "force_download", "local_files_only"
        options = {name: options.get(name) for name in names}
        return load(model_id if Path(model_id).is_dir() else fetch(model_id, **options), "cpu")[0]

    def image_features(self, image):
        """(n, 3, h, w) pixels -> (n, d_i). Integers are 0 to 255; floats normalised, as the preprocess of `load` makes them."""
        return encode_floats(self.image_encoder, image) if image.is_floating_point() else self.image_encoder(image)

    def text_features(self, text, attention_mask=None):
        """(n, l) token ids -> (n, d_t). attention_mask: for ids of `tokenize` it is told by their padding."""
        if attention_mask is None:
            text, attention_mask = ids_and_mask(self.tokenizer, text)
        return self.text_encoder(text, attention_mask)

    def encode_image(self, image):
        """(n, 3, h, w) pixels -> (n, d_e) embeddings, not normalised."""
        return self.image_projection(self.image_features(image))

    def encode_text(self, text, attention_mask=None):
        """(n, l) token ids -> (n, d_e) embeddings, not normalised."""
        return self.text_projection(self.text_features(text, attention_mask))

    def forward(self, image, text, attention_mask=None):
        """n images and m captions -> (logits_per_image, logits_per_text), (n, m) and (m, n); m is n in the paper."""
        # fmt: off
        # the code                                              # the paper
        I_f = self.image_features(image)                        # I_f = image_encoder(I)  # [n, d_i]
        T_f = self.text_features(text, attention_mask)          # T_f = text_encoder(T)  # [n, d_t]
        # fmt: on
        logits = self.logits(I_f, T_f)
        return logits, logits.T

    def logits(self, I_f, T_f):
        """Features of n images and m captions, (n, d_i) and (m, d_t) -> (n, m) scaled cosines, in fp32 under autocast, too."""
        # BEGIN SOLUTION
        # fmt: off
        I_e, T_e = self.image_projection(I_f).float(), self.text_projection(T_f).float()
        with torch.autocast(I_e.device.type, enabled=False):    # bf16 rounds a cosine by 0.002; exp(t) multiplies that
            I_e = F.normalize(I_e, dim=1)                       # I_e = l2_normalize(np.dot(I_f, W_i), axis=1)  # [n, d_e]
            T_e = F.normalize(T_e, dim=1)                       # T_e = l2_normalize(np.dot(T_f, W_t), axis=1)  # [n, d_e]
            return self.logit_scale.exp() * I_e @ T_e.T         # logits = np.dot(I_e, T_e.T) * np.exp(t)  # [n, n]
        # fmt: on
        # END SOLUTION

    def features(self, batch):
        """The features of a training batch of `dataset.collate`, (n, d_i) and (k n, d_t), some of which may be cached."""
        return self.batch_image_features(batch), self.batch_text_features(batch)

    def batch_image_features(self, batch):
        if "image_features" in batch:
            return batch["image_features"]
        if "image_activations" in batch:
            return run_from_stage(self.image_encoder, batch["image_activations"])
        return self.image_encoder(batch["image"])  # 0 to 255, also where generated pictures make them floats

    def batch_text_features(self, batch):
        if "text_features" in batch:
            return batch["text_features"]
        return self.text_features(batch["text"], batch["attention_mask"])


def contrastive_loss(logits):
    """The symmetric cross-entropy of (n, n) logits whose diagonal holds the true pairs; ln(n) is chance."""
    # BEGIN SOLUTION
    # fmt: off
    # the code                                                  # the paper
    labels = torch.arange(len(logits), device=logits.device)    # labels = np.arange(n)
    loss_i = F.cross_entropy(logits, labels)                    # loss_i = cross_entropy_loss(logits, labels, axis=0)
    loss_t = F.cross_entropy(logits.T, labels)                  # loss_t = cross_entropy_loss(logits, labels, axis=1)
    return (loss_i + loss_t) / 2                                # loss   = (loss_i + loss_t)/2
    # fmt: on
    # END SOLUTION


def loss_over_captions(logits):
    """The mean `contrastive_loss` of (n, k n) logits of n images with k captions each, in adjacent columns.

    Each of the k terms has one caption per image, so that an image's other captions are not treated as negatives.
    """
    rounds = logits.unflatten(1, (len(logits), -1)).unbind(2)  # k of (n, n)
    return sum(contrastive_loss(logits) for logits in rounds) / len(rounds)


def create_model(config, captions):
    """The CLIPModel that a Config describes, in fp32. captions: the training captions, from which a vocabulary may be learned.

    Raises UserError for encoders that are not available.
    """
    if config.model:
        return whole_model(config)
    image_encoder = create_image_encoder(config, config.image_weights)
    if config.text_weights == "pretrained" and config.text_encoder != "clip":
        tokenizer = pretrained_tokenizer(config.text_encoder, config.max_length)
        text_model = load_pretrained(transformers.AutoModel, config.text_encoder, dtype=torch.float32)
    else:
        if config.text_encoder == "clip":
            tokenizer = openai_tokenizer(config.max_length)
        else:
            start = "" if config.text_encoder == "gpt2" else "[CLS]"  # GPT-2 reads no start token
            tokenizer = train_tokenizer(captions, config.vocab_size, config.max_length, start)
        sizes = config.text_width, config.text_layers, config.text_heads, tokenizer.get_vocab_size(), config.max_length
        text_model = random_text_model(config.text_encoder, *sizes)
    with refused_in_a_line(f"--text-encoder {config.text_encoder}", TEXT_ADVICE):
        text_encoder = TextEncoder(text_model, config.pooling, config.text_feature_layers)
    tokenizer.enable_truncation(min(config.max_length, text_encoder.max_length))
    model = build_clip(config, image_encoder, text_encoder, tokenizer)
    set_scale_and_bias(model, config)
    return model


def whole_model(config):
    """The CLIPModel that a Config fine-tunes: one of open_clip's, or that of an earlier run."""
    if is_model_name(config.model):
        model = open_clip_model(*load_open_clip(config.model, config.size), config)
    else:
        model, _ = load(config.model, "cpu")
        model.run_dir, model.hubness = None, None  # what is saved is another run
        if config.num_projection_layers and isinstance(model.image_projection.projection, nn.Identity):
            add_identity_heads(model)
    for part in ("image", "text"):
        head = getattr(model, f"{part}_projection")
        for module in head.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
        head.feature_dropout.p = getattr(config, f"{part}_feature_dropout")
    model.image_encoder.pretrained = not config.model.endswith("@random")
    set_scale_and_bias(model, config)
    return model


def add_identity_heads(model):
    """Gives a model without heads linear ones that change nothing at first."""
    width = model.image_encoder.width
    model.image_projection, model.text_projection = ProjectionHead(width, width), ProjectionHead(width, width)
    for head in (model.image_projection, model.text_projection):
        nn.init.eye_(head.projection.weight)


def open_clip_model(parts, tokenizer, architecture, config=None):
    """The CLIPModel of an `encoders.openclip.OpenClip`. Its heads are none, or linear ones that change nothing at first.

    config: the run's, for its heads; without one there are none.
    """
    image_encoder, text_encoder = (
        OpenClipImageEncoder(parts.visual, architecture),
        OpenClipTextEncoder(parts.text, architecture),
    )
    model = CLIPModel(image_encoder, text_encoder, tokenizer, image_encoder.width, layers=0)
    if config and config.num_projection_layers:
        add_identity_heads(model)
    model.logit_scale.data.copy_(parts.logit_scale)
    model.logit_bias = None if parts.logit_bias is None else nn.Parameter(parts.logit_bias)
    model.open_clip = architecture
    return model


def settings_of_model(config, model):
    """The Config with what the model decides: its loss, where that is auto, is the one that it was trained with."""
    loss = config.loss
    if loss == "auto" and config.model and not is_model_name(config.model):
        loss = load_run(config.model)["config"].loss
    if loss == "auto":
        loss = "softmax" if model.logit_bias is None else "sigmoid"
    return replace(config, loss=loss)


def create_image_encoder(config, weights, size=0):
    sizes = config.patch_size, config.image_width, config.image_layers, config.image_heads
    stages = tuple(filter(None, config.image_feature_stages.split(",")))
    size = size or config.size
    with refused_in_a_line(f"--image-encoder {config.image_encoder} with --size {size}", IMAGE_ADVICE):
        return ImageEncoder(
            config.image_encoder, weights, size, sizes, stages, config.image_drop_path, config.fast_convolutions
        )


def build_clip(config, image_encoder, text_encoder, tokenizer):
    return CLIPModel(
        image_encoder,
        text_encoder,
        tokenizer,
        config.projection_dim,
        config.num_projection_layers,
        config.hidden_width,
        config.dropout,
        (config.image_feature_dropout, config.text_feature_dropout),
    )


def set_scale_and_bias(model, config):
    """The model's logit_scale and logit_bias as --loss and --temperature want them at the start."""
    if config.loss == "sigmoid" and model.logit_bias is None:  # initial values as in section 3.2 of Zhai et al. 2023
        model.logit_scale.data.fill_(math.log(10))
        model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    model.logit_scale.requires_grad_(True)  # a model whose temperature was fixed can learn it now
    if config.temperature:
        model.logit_scale.data.fill_(-math.log(config.temperature))
        model.logit_scale.requires_grad_(False)


def describe_encoders(model):
    """Plain values from which `load` builds the encoders again, without anyone's weights."""
    bias = {"bias": True} if model.logit_bias is not None else {}
    if model.open_clip:
        return {"open_clip": model.open_clip} | bias
    text = model.text_encoder.architecture["config"]
    return {"image": {"size": model.image_encoder.size}, "text": text, "pooling": model.text_encoder.pooling} | bias


def save_weights(model, run_dir):
    """Writes run_dir/model.safetensors, and beside it what corrects the scores of these weights, if the model has it.

    What was learned, measured and drawn from other weights is removed first, so that after a kill nothing is mixed.
    """
    contents = weights_as_bytes(model)
    path = Path(run_dir) / "model.safetensors"
    same_hubness = (model.hubness is not None) == Path(run_dir, HUBNESS_FILE).exists()
    if not (same_hubness and path.exists() and path.read_bytes() == contents):
        for name in OF_WEIGHTS if path.exists() else ():
            (Path(run_dir) / name).unlink(missing_ok=True)
        atomic_write(path, lambda temporary: temporary.write_bytes(contents))
    if model.hubness:
        model.hubness.save(run_dir)


def load_weights(model, run_dir):
    """Loads run_dir/model.safetensors, which must fit. Raises UserError where it is missing, truncated or of another model."""
    path = Path(run_dir) / "model.safetensors"
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; this run has not finished its first epoch") from None
    except (safetensors.SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise UserError(f"{path}: truncated, damaged or of another model ({reason}); train the run again") from None


def load(name, device="auto", jit=False, download_root=None):
    """OpenAI's call: (model, preprocess) for a name; the model is in eval mode, in fp32.

    name: a run folder, open_clip:MODEL@WEIGHTS, one of OpenAI's names, or USER/NAME of a run on a model hub.

    device: a torch device or its name; auto takes a GPU where there is one. jit: not supported by these encoders.
    download_root: the folder for what is downloaded; None: the model hub's cache.
    preprocess maps a PIL image to (3, size, size) normalised pixels; model.encode_image takes batches of them.
    `tokenize` then uses this model's tokenizer.
    Raises UnknownModel for another name (a RuntimeError, as OpenAI's call does), and UserError for a folder that holds no
    usable run, or weights that cannot be downloaded.
    """
    global last_tokenizer
    if jit:
        raise UserError("clip.load(jit=True): TorchScript is not supported; leave jit out, and use torch.compile(model)")
    if is_model_name(name):
        model = open_clip_model(*load_open_clip(name, download_root=download_root))
    else:
        model = load_from_folder(name if Path(name).is_dir() else fetch(str(name), cache_dir=download_root))
    model.eval().to(pick_device(str(device)))
    last_tokenizer = model.tokenizer
    return model, transform_of(model.image_encoder)


def load_from_folder(run_dir):
    """The CLIPModel of a run folder. Raises UserError where it holds no usable run."""
    run = load_run(run_dir)
    config, encoders = run["config"], run["encoders"]
    if "open_clip" in encoders:
        architecture = encoders["open_clip"]
        tokenizer = CleaningTokenizer(read_tokenizer(run_dir), architecture["clean"])
        model = open_clip_model(build_open_clip(architecture), tokenizer, architecture, config)
    else:
        image_encoder = create_image_encoder(config, "random", encoders["image"]["size"])
        text_config = transformers.AutoConfig.for_model(**encoders["text"])
        text_model = transformers.AutoModel.from_config(text_config, dtype=torch.float32)
        text_encoder = TextEncoder(text_model, encoders["pooling"], config.text_feature_layers)
        model = build_clip(config, image_encoder, text_encoder, read_tokenizer(run_dir))
    set_scale_and_bias(model, config)
    if encoders.get("bias") and model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.zeros(()))
    load_weights(model, run_dir)
    model.run_dir, model.hubness = str(run_dir), load_hubness(run_dir)
    return model


def fetch(name, **options):
    """Downloads a run that was pushed to a model hub as USER/NAME, and returns its local folder.

    options: of huggingface_hub's snapshot_download, such as cache_dir and revision; None: as if it was left out.
    Raises UnknownModel where the hub has none. A local path is not looked up: a stranger's model may have the same name.
    """
    if Path(name).is_file():
        raise UnknownModel(f"{name}: is a file; write open_clip:MODEL@{name}, with its model, such as ViT-B-32")
    if may_be_on_hub(name):
        try:
            return fetch_run(name, **options)
        except (OSError, ValueError) as error:
            print(f"{name}: not found on a model hub ({type(error).__name__})")
    raise UnknownModel(f"{name}: neither a run folder nor the name of a model; there are {', '.join(available_models())}")


def available_models():
    """OpenAI's call: names that `load` takes: run folders under runs/, some of open_clip's models, and OpenAI's.

    open_clip.list_pretrained() lists all (MODEL, WEIGHTS).
    """
    runs = sorted(path.parent.as_posix() for path in Path("runs").glob("*/model.safetensors"))
    return [*runs, *SUGGESTED, *OPENAI]


def tokenize(texts, context_length=CONTEXT_LENGTH, truncate=False):
    """OpenAI's call: one text or a list of n -> (n, context_length) int64 token ids, padded at the end.

    The tokenizer is that of the last loaded model, or OpenAI's if none was loaded; `CLIPModel.tokenize` uses a model's own.
    truncate: shorten a text that is too long, keeping its end token; otherwise it raises RuntimeError.
    """
    global last_tokenizer
    last_tokenizer = last_tokenizer or openai_tokenizer(CONTEXT_LENGTH)
    return tokens(last_tokenizer, texts, context_length, truncate)


# Programs also write `from clip import clip`, `from clip.model import CLIP` and `from clip.simple_tokenizer import ...`.
CLIP, _transform = CLIPModel, transform
clip = model = sys.modules[__name__]
for _name in ("clip", "model", "simple_tokenizer"):
    sys.modules[f"{__name__}.{_name}"] = globals()[_name]
