"""Captions to token ids: a tower's own tokenizer, OpenAI's, or a WordPiece vocabulary made from the captions at hand.

Everywhere a tokenizer is a `tokenizers.Tokenizer` that cuts at its `max_length` and pads to the longest text of a call,
and one file, tokenizer.json, holds all of it.
"""

from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from storage import UserError
from towers import load_pretrained

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def train_tokenizer(captions, vocab_size, max_length):
    """A lower-casing WordPiece tokenizer in BERT's manner, with a vocabulary of about vocab_size from the captions."""
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    learner = tokenizers.Tokenizer(models.WordPiece())
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizer
    captions = list(captions)
    # The trainer numbers word-inner letters in the order of a hash table, another one each time, and breaks ties by these
    # numbers. Naming them first gives one seed one vocabulary.
    letters = sorted(set("".join(map(normalizer.normalize_str, captions))) - {" "})
    named_first = SPECIAL + [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=named_first, show_progress=False)
    learner.train_from_iterator(captions, trainer)

    tokenizer = tokenizers.Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return shaped(tokenizer, max_length, tokenizer.token_to_id("[PAD]"), "[PAD]")


def pretrained_tokenizer(name, max_length):
    """The tokenizer of a Hugging Face name or local folder. Raises UserError where it has none."""
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
        raise UserError(f"--text-encoder {name}: a folder without a tokenizer; put its tokenizer.json or vocab.txt there")
    whole = load_pretrained(transformers.AutoTokenizer, name)
    pad = whole.pad_token or whole.eos_token  # GPT-2 has no padding of its own; the mask hides whatever is taken
    return shaped(whole.backend_tokenizer, max_length, whole.convert_tokens_to_ids(pad), pad)


def openai_tokenizer(max_length):
    """OpenAI's byte-pair encoding of 49,408 tokens, with the vocabulary that open_clip carries.

    Every text begins and ends with a token of its own, and zeros pad it.
    """
    from open_clip.tokenizer import SimpleTokenizer  # an import of seconds that other towers do without

    theirs = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in theirs.encoder.items()}
    whole = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(theirs.bpe_ranks))
    return shaped(whole.backend_tokenizer, max_length, 0, whole.convert_ids_to_tokens(0))


def shaped(tokenizer, max_length, pad_id, pad_token):
    """The tokenizer, set to cut at max_length tokens and to pad to the longest text of a call."""
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=pad_token)
    return tokenizer


def read_tokenizer(run_dir):
    """The tokenizer of a run folder. Raises UserError where it is missing or damaged."""
    path = Path(run_dir) / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more particular
        raise UserError(f"{path}: missing or damaged ({error}); train the run again") from None


def tokenize(tokenizer, texts):
    """texts: list of n strings -> (input_ids, attention_mask), (n, l) int64, l the tokens of the longest text."""
    encodings = tokenizer.encode_batch(list(texts))
    input_ids = torch.tensor([encoding.ids for encoding in encodings])
    return input_ids, torch.tensor([encoding.attention_mask for encoding in encodings])
