"""OpenAI's `clip.simple_tokenizer`: its byte-pair encoding, with the vocabulary from open_clip."""


class SimpleTokenizer:
    """OpenAI's class: encode(text) -> token ids without start and end, decode(ids) -> text.

    Attributes: encoder, {token: id}, with OpenAI's names of the start token and the end token; decoder, its inverse; and what
    open_clip's tokenizer has.
    """

    def __init__(self):
        from open_clip.tokenizer import SimpleTokenizer as OpenClipTokenizer  # only here: this import takes seconds

        self.tokenizer = OpenClipTokenizer()
        names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
        self.encoder = {names.get(token, token): number for token, number in self.tokenizer.encoder.items()}
        self.decoder = {number: token for token, number in self.encoder.items()}

    def __getattr__(self, name):
        if name == "tokenizer":  # a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def encode(self, text):
        return self.tokenizer.encode(text)

    def decode(self, tokens):
        joined = "".join(self.decoder[token] for token in tokens)
        contents = bytearray(self.byte_decoder[letter] for letter in joined)
        return contents.decode("utf-8", errors="replace").replace("</w>", " ")
