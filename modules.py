"""The parts of the model: image encoder, text encoder and the projection heads into the joint embedding space."""

import torch
import torch.nn.functional as F
from torch import nn

from encoders.build import SIZED_KINDS, ends_in_attention_pool, input_config, plain_config, sized_image_encoder, timm_encoder
from encoders.convolution import speed_up
from encoders.stages import multi_stage_features, multi_stage_width
from encoders.text import max_tokens, text_encoder_of
from utils.errors import UserError
from utils.images import AREA

BUCKET = 32  # captions per forward pass on a CPU
ROUNDING = 1e-5  # of features, relative to their size


class ImageEncoder(nn.Module):
    """Any timm model as an image encoder: pixels to one feature vector per image.

    name: a timm model name, such as resnet50, or one of `encoders.build.SIZED_KINDS`.
    weights: "pretrained" (from the model hub), "random", or the path of a weight file with timm's key names.
    size: height and width of the input in pixels; 0 for the model's own.
    sizes: patch_size, width, layers and heads, for SIZED_KINDS only.
    feature_stages: names of stages whose outputs, averaged over all positions, are concatenated to the model's features.
    drop_path: stochastic depth, as for `encoders.build.timm_encoder`.
    fast_convolutions: compute convolutions as `encoders.convolution` does, with the same results up to rounding.

    Attributes: backbone (the timm model), width (d_i), size, attention_pool (whether the model ends in one), architecture
    (what is needed to build it, without weights, in plain values), mean and std of its training pixels, (1, 3, 1, 1) in units
    of 0 to 255, resize (how pictures are resized, see `utils.images.resize_image`), and stage and activation_shape, where
    `encoders.stages.unfreeze_from` has cut it, else None.
    Raises UserError for an unknown name, weights that do not fit, or a hub that cannot be reached.
    """

    def __init__(self, name, weights="random", size=0, sizes=None, feature_stages=(), drop_path=0.0, fast_convolutions=True):
        super().__init__()
        if name in SIZED_KINDS:
            if weights != "random" or not size:
                raise UserError(f"--image-encoder {name}: has no pretrained weights; pass --image-weights random and a --size")
            self.backbone = sized_image_encoder(name, size, *sizes, drop_path)
        else:
            self.backbone = timm_encoder(name, weights, drop_path)
        data = input_config(self.backbone)
        self.size = size or data["input_size"][1]
        if hasattr(self.backbone, "set_input_size"):  # models with position embeddings need it
            self.backbone.set_input_size(img_size=self.size)
        self.width = getattr(self.backbone, "head_hidden_size", self.backbone.num_features)
        self.attention_pool = ends_in_attention_pool(self.backbone)
        self.pretrained = weights != "random"
        self.resize = AREA
        self.stage, self.activation_shape, self.feature_stages = None, None, feature_stages
        self.architecture = {"name": name, "size": self.size, "sizes": sizes, "feature_stages": feature_stages}
        if feature_stages:
            self.width = multi_stage_width(self)
        if fast_convolutions:
            speed_up(self.backbone, self.size)
        self.register_buffer("mean", 255 * torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(data["std"]).view(1, 3, 1, 1))

    def train(self, mode=True):
        """As for any module, but BatchNorm statistics stay fixed where the weights are pretrained or frozen.

        Small batches would make a pretrained encoder's statistics noisy.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                frozen = module.affine and not module.weight.requires_grad
                module.train(mode and not (self.pretrained or frozen))
        return self

    def normalize(self, image):
        """(n, 3, h, w) pixels of 0 to 255 -> normalised pixels, as the model expects them."""
        return (image - self.mean) / self.std

    def forward(self, image):
        """image: (n, 3, h, w) uint8 or float pixels of 0 to 255 -> (n, d_i) features."""
        return self.encode_normalized(self.normalize(image))

    def encode_normalized(self, image):
        """(n, 3, h, w) normalised pixels -> (n, d_i) features."""
        return multi_stage_features(self.backbone, self.feature_stages, image)


class OpenClipImageEncoder(ImageEncoder):
    """An image encoder of open_clip, with its projection: pixels to one embedding per image, not normalised.

    visual: as in `encoders.openclip.OpenClip`. architecture: of the model, as there. Attributes: as of an ImageEncoder.
    """

    def __init__(self, visual, architecture):
        nn.Module.__init__(self)
        self.backbone, self.pretrained, preprocess = visual, True, architecture["preprocess"]
        self.width = architecture["model"]["embed_dim"]
        self.size = architecture["model"]["vision_cfg"].get("image_size", 224)
        interpolation = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"  # as open_clip for any other
        self.resize = f"{preprocess['resize_mode']} {interpolation}"
        self.attention_pool, self.stage, self.activation_shape, self.feature_stages = False, None, None, ()
        self.architecture = architecture["model"] | {"resize": self.resize}
        self.register_buffer("mean", 255 * torch.tensor(preprocess["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(preprocess["std"]).view(1, 3, 1, 1))


class TextEncoder(nn.Module):
    """Any Hugging Face text model as a text encoder: token ids to one feature vector per caption.

    backbone: a transformers model whose output has last_hidden_state; of an encoder-decoder the encoder is taken.
    pooling: "first", "mean" (over the real tokens), "last" (real token), or "auto": last for causal models, mean for
    bidirectional ones.
    layers: how many of the last layers give features; they are concatenated, the last layer's first.

    Attributes: width (d_t), pooling (never "auto"), max_length (in tokens), and architecture (what is needed to build it,
    without weights, in plain values).
    """

    def __init__(self, backbone, pooling="auto", layers=1):
        super().__init__()
        config = backbone.config  # of an encoder-decoder, so that `clip.load` builds it again
        if layers > config.num_hidden_layers:
            raise UserError(f"--text-feature-layers {layers}: this encoder has {config.num_hidden_layers}")
        self.backbone = backbone = text_encoder_of(backbone)
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # unused; its parameters would get no gradient, which distributed training needs
        self.layers = layers
        self.width = layers * config.hidden_size
        self.max_length = max_tokens(backbone)
        causal = config.model_type != "cbow" and self.is_causal()  # no token of a bag of words sees another
        self.pooling = pooling if pooling != "auto" else "last" if causal else "mean"
        self.architecture = {"config": plain_config(config), "pooling": self.pooling, "layers": layers}

    @torch.no_grad()
    def is_causal(self):
        """True where the first token's output does not depend on the second token."""
        training = self.backbone.training
        self.backbone.eval()
        hidden = self.backbone(input_ids=torch.tensor([[1, 2], [1, 3]])).last_hidden_state  # (2, 2, d_t)
        self.backbone.train(training)
        return torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-6)

    def forward(self, input_ids, attention_mask):
        """input_ids, attention_mask: (n, l), the mask 1 at real tokens and 0 at the padding after them -> (n, d_t) features."""
        if len(input_ids) <= BUCKET or input_ids.device.type != "cpu":
            return self.pooled(input_ids, attention_mask)
        # Captions of similar length are grouped, as each bucket is padded to its longest only. A GPU would have to wait for
        # the lengths, and is faster with large batches.
        lengths, order = attention_mask.sum(dim=1).sort()
        buckets = zip(order.split(BUCKET), lengths.split(BUCKET))
        features = [self.pooled(input_ids[rows, : ends[-1]], attention_mask[rows, : ends[-1]]) for rows, ends in buckets]
        return torch.cat(features)[order.argsort()]

    def pooled(self, input_ids, attention_mask):
        """input_ids, attention_mask: (n, l) -> (n, d_t) features of n captions.

        pooling "first" takes the first token's output, "last" the last real token's, "mean" the mean over the real tokens. With
        several layers their outputs are side by side, the last layer's first.
        """
        # BEGIN SOLUTION
        kwargs = {"output_hidden_states": True} if self.layers > 1 else {}
        outputs = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = outputs.last_hidden_state  # (n, l, d_t)
        if self.layers > 1:
            hidden = torch.cat([hidden, *outputs.hidden_states[-2 : -1 - self.layers : -1]], dim=2)
        if self.pooling == "first":
            return hidden[:, 0]
        if self.pooling == "last":
            last = attention_mask.sum(dim=1) - 1  # (n,)
            return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        # END SOLUTION


class OpenClipTextEncoder(TextEncoder):
    """A text encoder of open_clip, with its pooling and projection: token ids to one embedding per caption, not normalised.

    text: as in `encoders.openclip.OpenClip`. architecture: of the model, as there. Attributes: as of a TextEncoder.
    """

    def __init__(self, text, architecture):
        nn.Module.__init__(self)
        self.backbone, self.width, self.pooling, self.layers = text, architecture["model"]["embed_dim"], "its own", 1
        cfg, self.pad_id = architecture["model"]["text_cfg"], architecture["pad_id"]
        self.max_length = cfg.get("context_length", 77)
        mask = getattr(text, "attn_mask", None)
        if mask is not None:  # exp(-1e4) is 0, too, and a moving average of -inf would be no number
            mask.clamp_(min=-1e4)
        self.causal = mask is not None and text.cls_emb is None and text.pool_type in ("argmax", "eos")
        # Others, such as SigLIP's, see the padding, so captions are filled up to the full length, as in their training.
        self.fills_up = not (self.causal or "hf_model_name" in cfg)
        self.architecture = architecture["model"] | {"hf_config": architecture.get("hf_config")}

    def pooled(self, input_ids, attention_mask):
        """input_ids: (n, l) -> (n, d_t). Padding follows from the ids."""
        if self.causal:
            return self.causal_features(input_ids)
        if self.fills_up:
            input_ids = F.pad(input_ids, (0, self.max_length - input_ids.shape[1]), value=self.pad_id)
        return self.backbone(input_ids)

    def causal_features(self, input_ids):
        """open_clip's own forward pass, which takes texts of the full length only, for texts of any length: (n, l) -> (n, d_t).

        No token before the end sees what comes behind it, and most captions are short.
        """
        text, length = self.backbone, input_ids.shape[1]
        hidden = text.token_embedding(input_ids) + text.positional_embedding[:length]  # (n, l, width)
        hidden = text.ln_final(text.transformer(hidden, attn_mask=text.attn_mask[:length, :length]))
        end = input_ids.argmax(dim=1) if text.pool_type == "argmax" else (input_ids == text.eos_id).int().argmax(dim=1)
        features = hidden.gather(1, end[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
        projection = text.text_projection
        if projection is None:
            return features
        return projection(features) if isinstance(projection, nn.Linear) else features @ projection


class ProjectionHead(nn.Module):
    """An encoder's features to the joint embedding: (n, d) -> (n, d_e).

    layers: 0 is no head, for encoders whose features have the width d_e; 1 is the paper's linear map; 2 is the residual head of
    many teaching scripts.
    hidden_width: units of a hidden layer (linear, GELU, dropout, linear) whose output is added to that of the linear map; 0:
    none. The output is 0 at first.
    dropout: of the hidden layer and the residual.
    bias: of the linear map; in the paper only after attention pooling.
    feature_dropout: probability that training drops an input feature.

    Attributes: out_features (d_e).

    Features are first standardised with `mean` and `std`, (d,), which `standardize` sets for a frozen encoder. Their initial
    values, 0 and 1, change nothing.
    """

    def __init__(self, width, projection_dim, layers=1, hidden_width=0, dropout=0.1, feature_dropout=0.0, bias=False):
        super().__init__()
        self.out_features = projection_dim
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.feature_dropout = nn.Dropout(feature_dropout)
        if layers == 0 and width != projection_dim:
            raise UserError(
                f"--num-projection-layers 0: the encoders have {width} features, so --projection-dim must be {width}"
            )
        self.projection = nn.Linear(width, projection_dim, bias=bias) if layers else nn.Identity()
        self.hidden = None
        if hidden_width:
            output = nn.Linear(hidden_width, projection_dim)
            self.hidden = nn.Sequential(nn.Linear(width, hidden_width), nn.GELU(), nn.Dropout(dropout), output)
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
        self.residual = None
        if layers == 2:
            self.residual = nn.Sequential(nn.GELU(), nn.Linear(projection_dim, projection_dim), nn.Dropout(dropout))
            self.layer_norm = nn.LayerNorm(projection_dim)

    @torch.no_grad()
    def standardize(self, features):
        """Sets mean and std to those of training features, (n, d), so that all features have the same scale.

        Very small standard deviations are clamped: otherwise such a feature would dominate once its encoder is trained. Where
        the rows differ by rounding only, as those of equal captions do, std stays 1.
        """
        std = features.std(dim=0, correction=min(1, len(features) - 1))
        self.mean.copy_(features.mean(dim=0))
        varies = std.mean() > ROUNDING * features.abs().mean()
        self.std.copy_(std.clamp(min=float(std.mean()) / 10) if varies else torch.ones_like(std))

    def forward(self, features):
        features = self.feature_dropout((features - self.mean) / self.std)
        projected = self.projection(features)
        if self.hidden is not None:
            projected = projected + self.hidden(features)
        if self.residual is None:
            return projected
        return self.layer_norm(projected + self.residual(projected))
