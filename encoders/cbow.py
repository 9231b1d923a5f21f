"""A bag of words as a text encoder (CBOW), registered with transformers as model type "cbow"."""

import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput


class CBOWConfig(transformers.PreTrainedConfig):
    """The sizes of a `CBOW`, by Hugging Face's names. Its token embeddings count as its one layer."""

    model_type = "cbow"

    def __init__(self, vocab_size=8192, hidden_size=512, num_hidden_layers=1, max_position_embeddings=77, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.max_position_embeddings = max_position_embeddings


class CBOW(transformers.PreTrainedModel):
    """Token embeddings and nothing else: their mean, which `TextEncoder` takes, does not depend on the order of the words.

    The CLIP paper's other text encoder: "CBOW or Text Transformer" in the pseudocode of its figure 3.
    """

    config_class = CBOWConfig

    def __init__(self, config):
        config.num_hidden_layers = 1
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False):
        """input_ids: (n, l) -> an output with last_hidden_state, (n, l, d_t): each token's embedding."""
        embedded = self.token_embedding(input_ids)
        return BaseModelOutput(last_hidden_state=embedded, hidden_states=(embedded,) if output_hidden_states else None)


transformers.AutoConfig.register(CBOWConfig.model_type, CBOWConfig)
transformers.AutoModel.register(CBOWConfig, CBOW)
