"""Prompts as a GPU reads them: short ones a few at a time, by one launch.

A prompt of some dozen tokens is hundreds of operations that are over before the next one has been launched. So passes
over short prompts are captured, as steps are (`captured.py`), and read several of them. By default a pass reads a
number of prompts that follows from what each is filled up to, with empty ones in the places that are left: products
have one shape, and no prompt's bits depend on its company.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from triglot.generation.cuda_graph import captured
from triglot.layers.vectors import round_up
from triglot.models.decoder_only import DecoderLLM

UNIT = 64
"""A prompt is filled up to a multiple of so many tokens."""
SHORT = 256
"""Tokens of the prompts that a captured pass reads at most of each; by default of all of them together."""
CAPTURED = 4096
"""Tokens of a captured pass, at most: it keeps their keys and values, and what they were made of."""

Read = Float[Tensor, "2 layers kv_heads length head_dim"]
"""Keys and values of a text, or of what was read of it."""


class Pass:
    """One pass of a model over `rows` prompts of at most `width` tokens."""

    def __init__(self, model: DecoderLLM, rows: int, width: int, *, capture: bool) -> None:
        device = model.lm_head.weight.device
        self.model, self.cache = model, model.start_cache(rows, width)
        self.ids = torch.zeros(rows, width, dtype=torch.long, device=device)
        self.launch = captured(self._read, device) if capture else self._read

    def _read(self) -> None:
        self.model.run(self.ids, cache=self.cache)

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Read]:
        """Keys and values of these; what stood in other places stays there and is read again."""
        given = pad_sequence([torch.tensor(one, dtype=torch.long) for one in prompts], batch_first=True)
        self.ids[: len(prompts), : given.size(1)] = given.to(self.ids.device)
        self.launch()
        both = torch.stack([self.cache.keys, self.cache.values])
        return [both[:, :, row, :, : len(one)] for row, one in enumerate(prompts)]


class PromptReader:
    """Reads prompts: the least of `batches` at a time that is enough, or by default as many as their width asks for."""

    def __init__(self, model: DecoderLLM, batches: Sequence[int] | None = None) -> None:
        self.model, self.batches = model, batches
        self.passes: dict[tuple[int, int], Pass] = {}

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Read]:
        """Keys and values of each, the shortest ones first to be read."""
        of_width = dict[int, list[int]]()
        for number, one in enumerate(prompts):
            of_width.setdefault(self.width(len(one)), []).append(number)
        found = dict[int, Read]()
        for width, numbers in sorted(of_width.items()):
            rows = self.rows(width, len(numbers))
            for first in range(0, len(numbers), rows):
                some = numbers[first : first + rows]
                read = self._pass(rows, width, len(some))
                found.update(zip(some, read([prompts[number] for number in some]), strict=True))
        return [found[number] for number in range(len(prompts))]

    def width(self, length: int) -> int:
        """What a prompt of so many tokens is filled up to."""
        return min(round_up(max(1, length), UNIT), self.model.max_seq_length)

    def rows(self, width: int, prompts: int) -> int:
        """How many of so many prompts are read at a time."""
        if self.batches is None:
            return max(1, SHORT // width)
        return next((rows for rows in self.batches if rows >= prompts), self.batches[-1])

    def _pass(self, rows: int, width: int, filled: int) -> Pass:
        capture = width <= SHORT and rows * width <= CAPTURED
        if not capture:
            return Pass(self.model, filled, width, capture=False)
        if (rows, width) not in self.passes:
            with torch.inference_mode(mode=False), torch.no_grad():
                self.passes[rows, width] = Pass(self.model, rows, width, capture=True)
        return self.passes[rows, width]
