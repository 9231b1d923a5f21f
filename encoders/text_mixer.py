"""An MLP-Mixer as a text encoder, registered with transformers as model type "mixer"."""

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput


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
        **kwargs,
    ):
        super().__init__(**kwargs)
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
        length = x.shape[1]  # the weights beyond it would only be multiplied by zeros, the padding
        y = (self.token_norm(x) * mask).mT  # (n, d_t, l); zeros keep padding out of the sum over the tokens
        y = F.gelu(F.linear(y, self.token_in.weight[:, :length], self.token_in.bias))  # (n, d_t, d_t / 2)
        x = x + F.linear(y, self.token_out.weight[:length], self.token_out.bias[:length]).mT  # (n, l, d_t)
        return x + self.channel_out(F.gelu(self.channel_in(self.channel_norm(x))))


class TextMixer(transformers.PreTrainedModel):
    """An MLP-Mixer (Tolstikhin et al. 2021) over tokens instead of patches.

    Each position has its own weights, so there are no position embeddings.
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

        output_hidden_states: also return hidden_states, a tuple of each layer's input and the last layer's output.
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
