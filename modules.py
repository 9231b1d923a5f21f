"""The parts of the model: an image tower, a text tower and the heads that project both into one space."""

import logging
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import timm
import torch
import transformers
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import nn

from convolution import speed_up
from storage import UserError

BUCKET = 32  # captions that a CPU takes at a time
HUB_TIMEOUT = 5  # seconds that a model hub has for its first answer

transformers.logging.set_verbosity_error()  # its notes on unused weights and missing heads help nobody here
transformers.logging.disable_progress_bar()
logging.getLogger("timm").setLevel(logging.ERROR)


def go_offline_without_hub():
    """Where no model hub answers, tells huggingface_hub so: files fetched before still load, others fail at once.

    Left alone, the libraries try every file five times with growing pauses.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


class Reached(Exception):
    """Ends a forward pass at a stage; holds what the stage was given."""


class ImageEncoder(nn.Module):
    """Any timm model as a tower: pixels to one feature vector an image.

    name: a timm model name, such as resnet50.
    weights: "pretrained" (from the model hub), "random", or the path of a weight file with timm's key names.
    size: height and width of the input in pixels; 0 for the tower's own.

    Attributes: width (d_i), size, and mean and std of the pixels it expects, (1, 3, 1, 1) in units of 0 to 255.
    Raises UserError for an unknown name, weights that do not fit, or a hub that cannot be reached.
    """

    def __init__(self, name, weights="random", size=0):
        super().__init__()
        if weights == "pretrained":
            go_offline_without_hub()
        try:
            self.tower = timm.create_model(name, pretrained=weights == "pretrained", num_classes=0)
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
            self.load_weights(name, weights)
        data = resolve_model_data_config(self.tower)
        self.size = size or data["input_size"][1]
        if hasattr(self.tower, "set_input_size"):  # towers with position embeddings have to be told
            self.tower.set_input_size(img_size=self.size)
        self.width = self.tower.num_features if not hasattr(self.tower, "head_hidden_size") else self.tower.head_hidden_size
        self.pretrained = weights != "random"
        self.stage, self.activation_shape = None, None
        speed_up(self.tower, self.size)
        self.register_buffer("mean", 255 * torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(data["std"]).view(1, 3, 1, 1))

    def load_weights(self, name, path):
        """Loads a weight file that has to fit exactly, but for its classifier. Raises UserError where it does not."""
        try:
            state = load_state_dict(path, weights_only=True)
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"--image-weights {path}: no such file (nor 'pretrained' or 'random')") from None
        except Exception as error:  # whatever a damaged file makes the readers of three formats raise
            raise UserError(f"--image-weights {path}: cannot be read ({type(error).__name__}: {error})") from None
        classifiers = self.tower.pretrained_cfg.get("classifier") or ()
        classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
        wanted = self.tower.state_dict()
        state = {
            key: value
            for key, value in state.items()
            if key in wanted or not key.startswith(tuple(f"{c}." for c in classifiers))
        }
        unfit = sorted(wanted.keys() ^ state.keys())
        unfit += [key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape]
        if unfit:
            raise UserError(f"--image-weights {path}: does not fit {name}: {len(unfit)} tensors differ ({unfit[0]}, ...)")
        self.tower.load_state_dict(state)

    def stages(self):
        """The names of the stages from which the tower can be trained: its parts with weights, and the parts of those."""
        parts = {name: module for name, module in self.tower.named_modules() if 0 < len(name.split(".")) <= 2 and name}
        containers = (nn.Sequential, nn.ModuleList)
        return [
            name
            for name, module in parts.items()
            if not isinstance(module, (nn.ModuleList, nn.modules.batchnorm._BatchNorm))
            and next(module.parameters(), None) is not None
            and ("." not in name or isinstance(parts[name.partition(".")[0]], containers))
        ]

    def train_from(self, stage):
        """Freezes the trunk, all that lies below `stage`. `forward` then also takes what `trunk` gave.

        Raises UserError for a stage that is not there, or whose input is not all that the tower needs from then on.
        """
        if stage not in self.stages():
            raise UserError(f"--train-image-from {stage}: no such stage; there are {', '.join(self.stages())}")
        self.eval()
        self.stage = stage
        image = torch.randint(256, (2, 3, self.size, self.size), generator=torch.Generator().manual_seed(0))
        image = image.to(self.mean.device)
        try:
            activations = self.trunk(image)
            if activations.shape == image.shape:
                raise UserError(f"--train-image-from {stage}: nothing lies below it; leave the flag out to train all")
            self.activation_shape = activations.shape[1:]
            resumed = self(activations)
            agree = torch.allclose(resumed, self(image), rtol=1e-3, atol=1e-4)
            agree = agree and activations.ndim > 2  # vectors would be taken for the tower's features
        except (AttributeError, IndexError, RuntimeError):
            agree = False
        if not agree:
            raise UserError(f"--train-image-from {stage}: this tower cannot be cut there; there are {', '.join(self.stages())}")
        parameters = list(self.tower.parameters())
        gradients = torch.autograd.grad(resumed.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients):
            parameter.requires_grad_(gradient is not None)

    @torch.no_grad()
    def trunk(self, image):
        """(n, 3, h, w) pixels -> what the stage that training starts from is given, (n, ...)."""

        def reach(module, inputs):
            raise Reached(inputs[0])

        hook = self.tower.get_submodule(self.stage).register_forward_pre_hook(reach)
        try:
            self.tower((image - self.mean) / self.std)
        except Reached as reached:
            return reached.args[0]
        finally:
            hook.remove()

    def train(self, mode=True):
        """As for any module, but BatchNorm statistics stay where the weights are pretrained or frozen.

        Small batches would only blur a pretrained tower's statistics.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                frozen = module.affine and not module.weight.requires_grad
                module.train(mode and not (self.pretrained or frozen))
        return self

    def forward(self, image):
        """image: (n, 3, h, w) uint8 or float pixels of 0 to 255, or activations of `trunk` -> (n, d_i) features."""
        if image.shape[1:] != self.activation_shape:
            return self.tower((image - self.mean) / self.std)
        # The tower runs on one grey image, whose activations give way to these where the stage begins.
        stage = self.tower.get_submodule(self.stage)
        hook = stage.register_forward_pre_hook(lambda module, inputs: (image, *inputs[1:]))
        try:
            return self.tower(torch.zeros(1, 3, self.size, self.size, device=image.device))
        finally:
            hook.remove()


def random_text_tower(model_type, width, layers, heads, vocab_size, max_length):
    """The configuration of an untrained Hugging Face text tower. Raises UserError for an unknown type."""
    try:
        config = transformers.AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(
            f"--text-encoder {model_type}: with random weights it names a model type, such as distilbert, bert or gpt2"
        ) from None
    config.vocab_size = vocab_size
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = width, layers, heads
    config.max_position_embeddings = max_length
    for feed_forward in ("hidden_dim", "intermediate_size"):  # each family has its own name for it
        if hasattr(config, feed_forward):
            setattr(config, feed_forward, 4 * width)
    return config


def load_pretrained(auto_class, name):
    """auto_class.from_pretrained(name). Raises UserError where there is no such folder and no hub has it."""
    if not Path(name).is_dir():
        go_offline_without_hub()
    try:
        return auto_class.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        what = "tokenizer" if auto_class is transformers.AutoTokenizer else "model"
        if Path(name).is_dir():
            reason = str(error).split("\n")[0][:200]
            raise UserError(f"--text-encoder {name}: this folder holds no {what} that loads ({reason})") from None
        raise UserError(
            f"--text-encoder {name}: no such folder, and its {what} is neither on this machine nor to be fetched from a "
            "model hub; name a local folder, or a model type with --text-weights random"
        ) from None


class TextEncoder(nn.Module):
    """Any Hugging Face text model as a tower: token ids to one feature vector a caption.

    tower: a transformers model whose output has last_hidden_state.
    pooling: "first", "mean" (over the real tokens), "last" (real token), or "auto": the last for towers whose tokens see
    only what stands before them, the mean for those that see both ways.

    Attributes: width (d_t), pooling (never "auto"), and max_length, the most tokens that the tower takes.
    """

    def __init__(self, tower, pooling="auto"):
        super().__init__()
        self.tower = tower
        if getattr(tower, "pooler", None) is not None:
            tower.pooler = None  # unused, and a parameter without a gradient troubles optimizers and processes
        self.width = tower.config.hidden_size
        self.max_length = getattr(tower.config, "max_position_embeddings", None) or 10**6
        self.pooling = pooling if pooling != "auto" else "last" if self.is_causal() else "mean"

    @torch.no_grad()
    def is_causal(self):
        """True where the first token does not see the second: changing the second leaves the first's output alone."""
        training = self.tower.training
        self.tower.eval()
        hidden = self.tower(input_ids=torch.tensor([[1, 2], [1, 3]])).last_hidden_state  # (2, 2, d_t)
        self.tower.train(training)
        return torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-6)

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask: (n, l), the mask 1 at real tokens, which come first -> (n, d_t) features."""
        if len(input_ids) <= BUCKET or input_ids.device.type != "cpu":
            return self.pooled(input_ids, attention_mask)
        # Captions of like length go together, as each bucket is only as long as its longest; a GPU would have to wait
        # for the lengths, and large batches suit it better.
        lengths, order = attention_mask.sum(dim=1).sort()
        buckets = zip(order.split(BUCKET), lengths.split(BUCKET))
        features = [self.pooled(input_ids[rows, : ends[-1]], attention_mask[rows, : ends[-1]]) for rows, ends in buckets]
        return torch.cat(features)[order.argsort()]

    def pooled(self, input_ids, attention_mask):
        """`forward` of captions that pass the tower together."""
        hidden = self.tower(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # (n, l, d_t)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            last = attention_mask.sum(dim=1) - 1  # (n,)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


class ProjectionHead(nn.Module):
    """A tower's features to the joint embedding: (n, d) -> (n, d_e).

    layers: 1 is the paper's linear map without a bias; 2 is the residual head of many teaching scripts.
    feature_dropout: share of the incoming features dropped while training.

    Features are first standardised with `mean` and `std`, (d,), which `standardise` sets for a frozen tower; as made
    they change nothing.
    """

    def __init__(self, width, projection_dim, layers=1, dropout=0.1, feature_dropout=0.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.projection = nn.Linear(width, projection_dim, bias=False)
        self.residual = None
        if layers == 2:
            self.residual = nn.Sequential(nn.GELU(), nn.Linear(projection_dim, projection_dim), nn.Dropout(dropout))
            self.layer_norm = nn.LayerNorm(projection_dim)

    @torch.no_grad()
    def standardise(self, features):
        """Sets mean and std to those of training features, (n, d): small and large features then learn alike.

        A feature that hardly varies is not blown up all the way: once its tower trains, it would drown the others.
        """
        std = features.std(dim=0)
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_(std.clamp(min=float(std.mean()) / 10))

    def forward(self, features):
        projected = self.projection(self.feature_dropout((features - self.mean) / self.std))
        if self.residual is None:
            return projected
        return self.layer_norm(projected + self.residual(projected))
