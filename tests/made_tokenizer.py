"""A tokenizer made of a function, with the interface of the ``tokenizers`` package."""

from types import SimpleNamespace


class MadeTokenizer:
    """``encode(text, whole=)``: ``whole`` asks for the model's own start, too."""

    def __init__(self, encode):
        self._encode = encode

    def encode(self, text, /, *, add_special_tokens=True):
        return SimpleNamespace(ids=self._encode(text, whole=add_special_tokens))

    def encode_batch_fast(self, texts, /, *, add_special_tokens=True):
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
