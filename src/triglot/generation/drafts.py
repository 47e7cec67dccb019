"""A smaller model that guesses how a text goes on."""

import itertools
from collections.abc import Sequence

import torch

from triglot.generation.prepared import Prepared
from triglot.generation.steps import TextSteps, start_texts


class ModelDraft:
    """What a model with the same tokens finds likeliest (`decoding.speculation.Draft`), for one growing text.

    Of a text that goes on from the one before, only what is new is read; of one that outgrows the model's context, only
    its end.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.longest = prepared, prepared.decoder.stack.max_seq_length
        self.begin = 0
        """How much of the text's beginning is left out."""
        self.read: list[int] = []
        self.steps: TextSteps | None = None

    @torch.inference_mode()
    def __call__(self, text: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest tokens, each given those before it, as far as the context has room for them."""
        if len(text) - self.begin + count > self.longest or self.begin >= len(text):
            self.begin = max(0, len(text) - max(1, self.longest // 2))
        text, guesses = list(text[self.begin :]), list[int]()
        count = min(count, self.longest - len(text))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.read, text, strict=False))
        known = min(sum(1 for _ in same), len(text) - 1)
        if self.steps is None or known == 0:
            logits, self.steps = start_texts(self.prepared, [text], self.longest)
        else:
            self.steps.forget(torch.tensor([len(self.read) - known]))
            logits = self.steps.extend(torch.tensor([text[known:]]))[:, -1]
        while True:
            guesses.append(int(logits.argmax()))
            if len(guesses) == count:
                break
            logits = self.steps.step(torch.tensor(guesses[-1:]))
        self.read = text + guesses[:-1]
        return guesses
