"""What the chapters' experiments share: tasks that are learned in seconds, and the loop that learns them.

Models this small gain nothing by a second thread, and on one their numbers are the same from build to build.
"""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triglot import BlockOptions, DecoderLLM, Encoder, Tokenizer, Transformer, create_padding_mask
from triglot.config import TrainConfig
from triglot.data.batch import Batch, PairBatch, padded, pair_batch
from triglot.data.dataset import Packed
from triglot.data.phrases import Part, examples
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate
from triglot.layers.initialise import xavier
from triglot.objective import Objective, score_batches
from triglot.tokenizer import SpecialIds
from triglot.training.optim import learning_rate, make_optimizer
from triglot.training.session import threads

IDS = SpecialIds()
BOS, EOS, DIGIT = IDS.start, IDS.eos, 3
"""The digit 0 is the id 3."""


def learn(model: Transformer | DecoderLLM, batches: Sequence[Batch], *, rate: float = 3e-3) -> list[float]:
    """Train on each batch once, with the library's loss, optimizer and schedule; the loss of each step."""
    config = TrainConfig(max_steps=len(batches), learning_rate=rate, warmup_steps=30, schedule="linear")
    objective, losses = Objective(model), []
    optimizer = make_optimizer(model, config)
    with threads(1):
        for step, batch in enumerate(batches, 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            totals = objective(batch)
            optimizer.zero_grad()
            (totals.loss / totals.tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append((totals.nll / totals.tokens).item())
    model.eval()
    return losses


def smooth(losses: Sequence[float], over: int = 10) -> list[float]:
    """Means over so many losses at a time."""
    return [sum(losses[at : at + over]) / over for at in range(0, len(losses) - over + 1, over)]


# Symbols, to be mirrored


class Mirror(nn.Module):
    """An encoder that is asked, at each place, for the symbol that stands as far from the other end."""

    symbols, places = 32, 8

    def __init__(self, d_model: int = 32, num_layers: int = 1, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": 1, "d_ff": 2 * d_model}
        chosen = BlockOptions(**options)
        self.encoder = Encoder(self.symbols, **sizes, max_seq_length=self.places, dropout=0.0, options=chosen)
        self.projection = nn.Linear(d_model, self.symbols)
        xavier(self, embedding_std=d_model**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.encoder(x).x)


def rows_of_symbols(seed: int, rows: int) -> Tensor:
    """Rows of eight symbols, no two of a row alike."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(rows, Mirror.symbols, generator=draw).argsort(1)[:, : Mirror.places]


def learn_to_mirror(model: Mirror, steps: int, rate: float = 5e-3, warmup: int = 1) -> list[float]:
    """Train by plain Adam, at the same rate from step `warmup` to the last; the loss of each step."""
    optimizer, losses = torch.optim.Adam(model.parameters(), rate), []
    with threads(1):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / warmup)
            x = rows_of_symbols(step, 32)
            loss = F.cross_entropy(model(x).flatten(0, 1), x.flip(1).flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    return losses


# Digits, to be written backwards


def numbers(seed: int, many: int, longest: int = 8) -> list[list[int]]:
    """Rows of two to `longest` digits, as ids."""
    draw = random.Random(seed)
    return [[DIGIT + draw.randrange(10) for _ in range(draw.randint(2, longest))] for _ in range(many)]


def reversals(seed: int, steps: int, rows: int = 64) -> list[PairBatch]:
    """Sources of digits and EOS, targets the digits from the last to the first."""
    rows_of = numbers(seed, steps * rows)
    parts = [rows_of[at : at + rows] for at in range(0, len(rows_of), rows)]
    return [pair_batch([[*one, EOS] for one in part], [one[::-1] for one in part], IDS) for part in parts]


@cache
def reverser() -> tuple[Transformer, list[float]]:
    """The founding document's Transformer, small, after 300 steps of reversing; and its losses."""
    model = small_transformer()
    return model, learn(model, reversals(seed=1, steps=300))


def small_transformer() -> Transformer:
    """A `Transformer` of two layers a side for ten digits and three special tokens."""
    torch.manual_seed(1)
    return Transformer(13, 13, d_model=64, num_layers=2, num_heads=2, d_ff=128, max_seq_length=32, dropout=0.0)


def backwards(model: Transformer, rows: Sequence[Sequence[int]], longest: int = 10) -> list[list[int]]:
    """What the model writes for each row of digits, the most probable token at each step, without EOS."""
    src = padded([[*row, EOS] for row in rows])
    with threads(1), torch.no_grad():
        steps = model.start(src, create_padding_mask(src), longest)
        first = steps.step(torch.full((len(rows),), BOS))
        found = generate(first, steps, Sampler(temperature=0), longest - 1, eos_ids=[EOS])
    return [[token for token in text.ids if token != EOS] for text in found]


def right(model: Transformer, rows: Sequence[Sequence[int]]) -> int:
    """How many of these rows the model writes backwards without a mistake."""
    return sum(written == row[::-1] for row, written in zip(rows, backwards(model, rows), strict=True))


# Number words, letter by letter


@cache
def letters() -> Tokenizer:
    """An id for each letter of number words and dates."""
    return Tokenizer.train("char", phrases("train", 2000))


@cache
def phrases(part: Part, number: int) -> list[str]:
    """English numbers and dates in words."""
    return [one.source for one in islice(examples(1, "de", part), number)]


def packed(part: Part, number: int, *, context: int = 64, rows: int = 16) -> Packed:
    """Phrases side by side in rows of `context` letters, each a document of its own."""
    ids = [letters().encode(text, bos=True, eos=True) for text in phrases(part, number)]
    tokens = np.array([one for document in ids for one in document], np.uint16)
    return Packed(tokens, context, context * rows, seed=0 if part == "train" else None)


def training(steps: int) -> list[Batch]:
    """So many batches of phrases, epoch after epoch."""
    data = packed("train", 5000)
    return list(islice(chain.from_iterable(data.epoch(epoch) for epoch in count()), steps))


def small_llm(*, d_ff: int = 256, seed: int = 1, **options: Any) -> DecoderLLM:
    """A `DecoderLLM` of two layers for letters; the document's, where no options say otherwise."""
    torch.manual_seed(seed)
    sizes = {"d_model": 64, "n_heads": 4, "n_layers": 2, "d_ff": d_ff, "max_len": 128}
    return DecoderLLM(letters().vocab_size, **sizes, dropout=0.0, options=BlockOptions(**options))


@cache
def writer() -> tuple[DecoderLLM, list[float]]:
    """The founding document's language model, small, after 200 steps on phrases; and its losses."""
    model = small_llm()
    return model, learn(model, training(200))


def held_out(model: DecoderLLM, batches: Iterable[Batch] | None = None) -> float:
    """The loss on phrases that training never saw, in nats per letter."""
    with threads(1):
        found = score_batches(model, batches or packed("valid", 300).epoch(0), device=torch.device("cpu"))
    return found.mean
