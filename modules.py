"""The parts of the model: an image tower, a text tower and the heads that project both into one space."""

import torch
import torch.nn.functional as F
import transformers
from timm.data import resolve_model_data_config
from timm.layers import AttentionPool2d
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from convolution import speed_up
from storage import UserError
from towers import SIZED, sized_image_tower, timm_tower

BUCKET = 32  # captions that a CPU takes at a time
OF_ITS_FILES = ("_name_or_path", "transformers_version", "dtype", "architectures")  # of a configuration: not of the model


class Reached(Exception):
    """Ends a forward pass at a stage; holds what the stage was given."""


class ImageEncoder(nn.Module):
    """Any timm model as a tower: pixels to one feature vector an image.

    name: a timm model name, such as resnet50, or a kind of `sized_image_tower`.
    weights: "pretrained" (from the model hub), "random", or the path of a weight file with timm's key names.
    size: height and width of the input in pixels; 0 for the tower's own.
    sizes: patch_size, width, layers and heads of a `sized_image_tower`.
    feature_stages: names of `stages` whose outputs, averaged over the picture, stand behind the tower's own features.
    drop_path: stochastic depth, as for `towers.timm_tower`.

    Attributes: width (d_i), size, attention_pool (whether the tower ends in one), architecture (what makes it, but for its
    weights, in plain values), and mean and std of the pixels that it expects, (1, 3, 1, 1) in units of 0 to 255.
    Raises UserError for an unknown name, weights that do not fit, or a hub that cannot be reached.
    """

    def __init__(self, name, weights="random", size=0, sizes=None, feature_stages=(), drop_path=0.0):
        super().__init__()
        if name in SIZED:
            if weights != "random" or not size:
                raise UserError(f"--image-encoder {name}: is made from scratch; pass --image-weights random and a --size")
            self.tower = sized_image_tower(name, size, *sizes, drop_path)
        else:
            self.tower = timm_tower(name, weights, drop_path)
        data = resolve_model_data_config(self.tower)
        self.size = size or data["input_size"][1]
        if hasattr(self.tower, "set_input_size"):  # towers with position embeddings have to be told
            self.tower.set_input_size(img_size=self.size)
        self.width = self.tower.num_features if not hasattr(self.tower, "head_hidden_size") else self.tower.head_hidden_size
        self.attention_pool = isinstance(getattr(self.tower, "head", None), AttentionPool2d)
        self.pretrained = weights != "random"
        self.stage, self.activation_shape = None, None
        self.architecture = {"name": name, "size": self.size, "sizes": sizes, "feature_stages": feature_stages}
        self.feature_stages = feature_stages
        if feature_stages:
            flag, known = f"--image-feature-stages {','.join(feature_stages)}", ", ".join(self.stages())
            unknown = sorted(set(feature_stages) - set(self.stages()))
            if unknown:
                raise UserError(f"{flag}: no {unknown[0]}; there are {known}")
            self.eval()  # as BatchNorm would else count these pictures
            try:
                with torch.no_grad():
                    self.width = self.features(torch.zeros(2, 3, self.size, self.size)).shape[1]
            except (AttributeError, KeyError):
                raise UserError(f"{flag}: not all give a map or tokens to average; there are {known}") from None
            self.train()
        speed_up(self.tower, self.size)
        self.register_buffer("mean", 255 * torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(data["std"]).view(1, 3, 1, 1))

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
            flags = f"--train-image-from {stage}"
            if self.feature_stages:  # one below the cut does not run again
                flags += f" --image-feature-stages {','.join(self.feature_stages)}"
            raise UserError(f"{flags}: this tower cannot be cut there; there are {', '.join(self.stages())}")
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
            return self.features((image - self.mean) / self.std)
        if not torch.is_autocast_enabled(image.device.type):
            image = image.to(self.mean.dtype)  # they are kept in 16 bits
        # The tower runs on one grey image, whose activations give way to these where the stage begins.
        stage = self.tower.get_submodule(self.stage)
        hook = stage.register_forward_pre_hook(lambda module, inputs: (image, *inputs[1:]))
        try:
            return self.features(torch.zeros(1, 3, self.size, self.size, device=image.device))
        finally:
            hook.remove()

    def features(self, image):
        """What the tower makes of normalised pixels, and behind it the mean outputs of `feature_stages`, (n, d_i)."""
        if not self.feature_stages:
            return self.tower(image)
        outputs = []
        hooks = [
            self.tower.get_submodule(stage).register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for stage in self.feature_stages
        ]
        try:
            own = self.tower(image)
        finally:
            for hook in hooks:
                hook.remove()
        last = getattr(self.tower, "output_fmt", "NCHW") == "NHWC"  # where the tower has its channels
        places = {4: (1, 2) if last else (2, 3), 3: (1,)}
        return torch.cat([own, *(output.mean(dim=places[output.ndim]) for output in outputs)], dim=1)


class TextEncoder(nn.Module):
    """Any Hugging Face text model as a tower: token ids to one feature vector a caption.

    tower: a transformers model whose output has last_hidden_state.
    pooling: "first", "mean" (over the real tokens), "last" (real token), or "auto": the last for towers whose tokens see
    only what stands before them, the mean for those that see both ways.
    layers: how many of the tower's last layers give features; those of each stand side by side, the last layer's first.

    Attributes: width (d_t), pooling (never "auto"), max_length, the most tokens that the tower takes, and architecture (what
    makes it, but for its weights, in plain values).
    """

    def __init__(self, tower, pooling="auto", layers=1):
        super().__init__()
        if layers > tower.config.num_hidden_layers:
            raise UserError(f"--text-feature-layers {layers}: this tower has {tower.config.num_hidden_layers}")
        self.tower = tower
        if getattr(tower, "pooler", None) is not None:
            tower.pooler = None  # unused, and a parameter without a gradient troubles optimizers and processes
        self.layers = layers
        self.width = layers * tower.config.hidden_size
        self.max_length = getattr(tower.config, "max_position_embeddings", None) or 10**6
        self.pooling = pooling if pooling != "auto" else "last" if self.is_causal() else "mean"
        config = {key: value for key, value in tower.config.to_dict().items() if key not in OF_ITS_FILES}
        self.architecture = {"config": config, "pooling": self.pooling, "layers": layers}

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
        several = {"output_hidden_states": True} if self.layers > 1 else {}
        outputs = self.tower(input_ids=input_ids, attention_mask=attention_mask, **several)
        hidden = outputs.last_hidden_state  # (n, l, d_t)
        if several:
            hidden = torch.cat([hidden, *outputs.hidden_states[-2 : -1 - self.layers : -1]], dim=2)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            last = attention_mask.sum(dim=1) - 1  # (n,)
            return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


class TextMixerConfig(transformers.PreTrainedConfig):
    """The sizes of a `TextMixer`, by Hugging Face's names. max_position_embeddings: its fixed context, in tokens."""

    model_type = "mixer"

    def __init__(
        self,
        vocab_size=8192,
        hidden_size=512,
        num_hidden_layers=12,
        intermediate_size=2048,
        max_position_embeddings=77,
        **others,
    ):
        super().__init__(**others)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.intermediate_size, self.max_position_embeddings = intermediate_size, max_position_embeddings


class MixerLayer(nn.Module):
    """One MLP over the tokens, the same for each feature, then one over the features, the same for each token."""

    def __init__(self, config):
        super().__init__()
        context, width, inner = config.max_position_embeddings, config.hidden_size, config.intermediate_size
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_in, self.token_out = nn.Linear(context, width // 2), nn.Linear(width // 2, context)
        self.channel_in, self.channel_out = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x, mask):
        """x: (n, l, d_t), mask: (n, l, 1), 1 at real tokens -> (n, l, d_t)."""
        length = x.shape[1]  # where it is below the context, the rest would be padding and, as zeros, add nothing
        y = (self.token_norm(x) * mask).mT  # (n, d_t, l); zeros keep padding out of the sum over the tokens
        y = F.gelu(F.linear(y, self.token_in.weight[:, :length], self.token_in.bias))  # (n, d_t, d_t / 2)
        x = x + F.linear(y, self.token_out.weight[:length], self.token_out.bias[:length]).mT  # (n, l, d_t)
        return x + self.channel_out(F.gelu(self.channel_in(self.channel_norm(x))))


class TextMixer(transformers.PreTrainedModel):
    """An MLP-Mixer (Tolstikhin et al. 2021) over tokens instead of patches.

    Where a token stands shows in the weights that it meets: there are no position embeddings.
    """

    config_class = TextMixerConfig

    def __init__(self, config):
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MixerLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        """input_ids, attention_mask: (n, l), l at most the context -> an output with last_hidden_state, (n, l, d_t).

        output_hidden_states: it then also has hidden_states, a tuple of what each layer was given and the last one gave.
        """
        x = self.token_embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.unsqueeze(-1).to(x.dtype)  # (n, l, 1)
        hidden_states = [x]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1], mask))
        last = self.norm(hidden_states[-1])
        return BaseModelOutput(last_hidden_state=last, hidden_states=tuple(hidden_states) if output_hidden_states else None)


transformers.AutoConfig.register(TextMixerConfig.model_type, TextMixerConfig)
transformers.AutoModel.register(TextMixerConfig, TextMixer)


class ProjectionHead(nn.Module):
    """A tower's features to the joint embedding: (n, d) -> (n, d_e).

    layers: 1 is the paper's linear map; 2 is the residual head of many teaching scripts.
    bias: of the linear map, which has none in the paper but behind attention pooling.
    feature_dropout: share of the incoming features dropped while training.

    Features are first standardised with `mean` and `std`, (d,), which `standardise` sets for a frozen tower; as made
    they change nothing.
    """

    def __init__(self, width, projection_dim, layers=1, dropout=0.1, feature_dropout=0.0, bias=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.feature_dropout = nn.Dropout(feature_dropout)
        self.projection = nn.Linear(width, projection_dim, bias=bias)
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
