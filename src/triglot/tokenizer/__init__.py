"""Text to token ids and back: tokenizers that are trained here, and those that came with other libraries' models."""

from triglot.tokenizer.ids import Message, SpecialIds
from triglot.tokenizer.pair import TOKENIZER_FILES, Tokenizers
from triglot.tokenizer.trained import Kind, TextStream, Tokenizer, word_boundary

__all__ = ["TOKENIZER_FILES", "Kind", "Message", "SpecialIds", "TextStream", "Tokenizer", "Tokenizers", "word_boundary"]
