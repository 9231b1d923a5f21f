"""What differs between Hugging Face's text models: where the encoder is, and how many tokens it takes."""


def text_encoder_of(model):
    """The part of a Hugging Face model that reads texts: the encoder of an encoder-decoder, such as T5's; else all of it."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def max_tokens(model):
    """How many tokens a Hugging Face text model takes; 10**6 where it has no limit."""
    lengths = (getattr(model.config, name, None) for name in ("max_encoder_position_embeddings", "max_position_embeddings"))
    limit = next((length for length in lengths if length and length > 0), 10**6)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit - max(padding, default=-1) - 1  # RoBERTa's kind counts positions from behind the padding's number
