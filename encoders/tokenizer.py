"""Captions to token ids: a pretrained encoder's tokenizer, OpenAI's, or a WordPiece vocabulary learned from the captions.

A tokenizer is always a `tokenizers.Tokenizer` that truncates to its `max_length`, pads to the longest text of a call, and is
saved in one file, tokenizer.json.
"""

from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from encoders.build import TEXT_ADVICE, load_pretrained
from utils.errors import UserError

MAX_LETTERS = 1000  # of what stands between two spaces; more become one unknown token
UNKNOWN = ("[UNK]", "<unk>")  # how tokenizers call the token for what they do not know; those of bytes have none
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


class CleaningTokenizer:
    """A `tokenizers.Tokenizer` that cleans texts first, as open_clip does.

    clean: lower (lower case, plain spaces), whitespace (plain spaces), or canonicalize (lower case, no punctuation).
    """

    def __init__(self, tokenizer, clean):
        from open_clip.tokenizer import get_clean_fn  # only here: this import takes seconds

        self.tokenizer, self.clean = tokenizer, get_clean_fn(clean)

    def __getattr__(self, name):
        if name == "tokenizer":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def encode(self, text):
        return self.tokenizer.encode(self.clean(text))

    def encode_batch(self, texts):
        return self.tokenizer.encode_batch([self.clean(text) for text in texts])


def train_tokenizer(captions, vocab_size, max_length, start="[CLS]"):
    """A lower-casing WordPiece tokenizer like BERT's, with a vocabulary of about vocab_size learned from the captions.

    start: the token before each caption; empty: none. Each caption ends in [SEP].
    """
    # Marks stay: without its vowel signs, Hindi's word for flower is that for fruit. NFC: they may be written in two ways.
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(lowercase=True, strip_accents=False)])
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer_tokenizer = tokenizers.Tokenizer(models.WordPiece())
    trainer_tokenizer.normalizer, trainer_tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    captions = list(captions)
    # The trainer numbers the letters inside words in a hash table's order, which differs between runs, and breaks ties by
    # these numbers. Listing the letters first makes the vocabulary reproducible.
    letters = sorted(set("".join(map(normalizer.normalize_str, captions))) - {" "})
    first_tokens = SPECIAL + [f"##{letter}" for letter in letters]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first_tokens, show_progress=False)
    trainer_tokenizer.train_from_iterator(captions, trainer)

    # Scripts without spaces, such as Thai's, make "words" of whole sentences; by default, those over 100 letters are unknown.
    model = models.WordPiece(trainer_tokenizer.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=MAX_LETTERS)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A [SEP]".strip(), special_tokens=ends)
    return configure_tokenizer(tokenizer, max_length, tokenizer.token_to_id("[PAD]"), "[PAD]")


def pretrained_tokenizer(name, max_length):
    """The tokenizer of a Hugging Face name or local folder. Raises UserError where it has none."""
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
        raise UserError(f"--text-encoder {name}: a folder without a tokenizer; add its tokenizer.json or vocab.txt")
    hf_tokenizer = load_pretrained(transformers.AutoTokenizer, name)
    tokenizer = getattr(hf_tokenizer, "backend_tokenizer", None)
    if tokenizer is None:  # written in Python, as Marian's
        raise UserError(
            f"--text-encoder {name}: its tokenizer cannot be saved as a tokenizer.json, which a run needs; {TEXT_ADVICE}"
        )
    # GPT-2 has no padding token; any works, as it is masked.
    pad = hf_tokenizer.pad_token or hf_tokenizer.eos_token or tokenizer.id_to_token(0)
    return configure_tokenizer(tokenizer, max_length, tokenizer.token_to_id(pad), pad)


def openai_tokenizer(max_length):
    """OpenAI's byte-pair encoding of 49,408 tokens, with the vocabulary from open_clip.

    Every text has a start token and an end token, and is padded with zeros.
    """
    from open_clip.tokenizer import SimpleTokenizer  # only here: this import takes seconds

    openclip_tokenizer = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): number for token, number in openclip_tokenizer.encoder.items()}
    hf_tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(openclip_tokenizer.bpe_ranks))
    return configure_tokenizer(hf_tokenizer.backend_tokenizer, max_length, 0, hf_tokenizer.convert_ids_to_tokens(0))


def configure_tokenizer(tokenizer, max_length, pad_id, pad_token):
    """The tokenizer, set to truncate to max_length tokens and to pad to the longest text of a call."""
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=pad_id, pad_token=pad_token)
    return tokenizer


def read_tokenizer(run_dir):
    """The tokenizer of a run folder. Raises UserError where it is missing or damaged."""
    path = Path(run_dir) / "tokenizer.json"
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no more specific type
        raise UserError(f"{path}: missing or damaged ({error}); train the run again") from None


def tokenize(tokenizer, texts):
    """texts: list of n strings -> (input_ids, attention_mask), (n, l) int64, l the length of the longest text."""
    encodings = tokenizer.encode_batch(list(texts))
    input_ids = torch.tensor([encoding.ids for encoding in encodings])
    return input_ids, torch.tensor([encoding.attention_mask for encoding in encodings])


def count_unknown(tokenizer, captions):
    """How many captions are, by half of their tokens or more, unknown to the tokenizer: the model cannot tell them apart."""
    unknown = {tokenizer.token_to_id(token) for token in UNKNOWN} - {None}
    count = 0
    for encoding in tokenizer.encode_batch(list(captions)) if unknown else ():
        ids = [i for i, special in zip(encoding.ids, encoding.special_tokens_mask) if not special or i in unknown]
        count += len(ids) > 0 and 2 * sum(i in unknown for i in ids) >= len(ids)
    return count
