"""The batches of an epoch: a function of seed and epoch alone, so that training can go on in the middle of one."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from triglot.data.batch import IGNORED, Batch, LanguageBatch, PairBatch, pair_batch
from triglot.data.shards import Tokens
from triglot.errors import ConfigError, DataError, require
from triglot.tokenizer import SpecialIds

Ints = NDArray[np.int64]
OPEN_ROWS = 64
"""Rows that packing considers for the next document."""


@runtime_checkable
class Dataset(Protocol):
    """What a trainer or an evaluator goes through."""

    def num_batches(self, epoch: int) -> int:
        """How many batches `epoch` yields."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from the `start`-th on, without making those before it."""
        ...


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng((seed, epoch))


def _num_rows(batch_tokens: int, context: int) -> int:
    require(
        batch_tokens >= context, "train.batch_tokens", f"at least train.context ({context})", batch_tokens, ConfigError
    )
    return batch_tokens // context


def _language_batch(inputs: Ints, targets: Ints, bos: int | None, segments: Ints | None = None) -> LanguageBatch:
    if bos is not None:
        targets[targets == bos] = IGNORED  # that a text begins where another has ended is nothing to learn
    numbers = None if segments is None else torch.from_numpy(segments)
    return LanguageBatch(torch.from_numpy(inputs), torch.from_numpy(targets), numbers)


class Crops:
    """Windows cut anywhere: an epoch has one from each of num_tokens // context equal stretches, in random order."""

    def __init__(
        self, tokens: Tokens, context: int, batch_tokens: int, seed: int, ids: SpecialIds = SpecialIds()
    ) -> None:
        require(len(tokens) > context, "the training text", f"longer than {context} tokens", len(tokens), DataError)
        self.tokens, self.context, self.seed, self.ids = tokens, context, seed, ids
        self.num_rows, self.num_windows = _num_rows(batch_tokens, context), len(tokens) // context

    def num_batches(self, epoch: int) -> int:  # noqa: ARG002 all epochs are alike
        """How many batches every epoch yields; the last one may have fewer rows."""
        return -(-self.num_windows // self.num_rows)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[LanguageBatch]:
        """The batches of an epoch from the `start`-th on."""
        random = _random(self.seed, epoch)
        places = len(self.tokens) - self.context
        share = (random.permutation(self.num_windows) + random.random(self.num_windows)) / self.num_windows
        offsets = np.minimum((share * places).astype(np.int64), places - 1)
        for first in range(start * self.num_rows, self.num_windows, self.num_rows):
            chosen = offsets[first : first + self.num_rows]
            windows = np.stack([self.tokens[offset : offset + self.context + 1] for offset in chosen]).astype(np.int64)
            yield _language_batch(windows[:, :-1].copy(), windows[:, 1:].copy(), self.ids.bos)


class Windows:
    """Windows side by side: every token but the first is predicted once, in the order of the text."""

    def __init__(self, tokens: Tokens, context: int, batch_tokens: int, ids: SpecialIds = SpecialIds()) -> None:
        require(len(tokens) > 1, "the validation text", "of two tokens or more", len(tokens), DataError)
        self.tokens, self.context, self.ids = tokens, context, ids
        self.num_rows, self.num_windows = _num_rows(batch_tokens, context), -(-(len(tokens) - 1) // context)

    def num_batches(self, epoch: int) -> int:  # noqa: ARG002 all epochs are alike
        """How many batches every epoch yields."""
        return -(-self.num_windows // self.num_rows)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[LanguageBatch]:  # noqa: ARG002 all epochs are alike
        """The batches from the `start`-th on, the same in every epoch."""
        size = self.num_rows * self.context
        for first in range(start * size, len(self.tokens) - 1, size):
            stretch = self.tokens[first : first + size + 1].astype(np.int64)
            shape = -(-(len(stretch) - 1) // self.context), self.context
            inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED)
            inputs.reshape(-1)[: len(stretch) - 1] = stretch[:-1]
            targets.reshape(-1)[: len(stretch) - 1] = stretch[1:]
            yield _language_batch(inputs, targets, self.ids.bos)


class _Packing(NamedTuple):
    order: Ints
    """Pieces, row after row."""
    rows: Ints
    """Where in `order` each row begins, and the end."""


class Packed:
    """Whole documents side by side in rows of `context`, each a segment; longer ones are cut into several.

    A segment's inputs are its tokens but the last, its targets its tokens but the first, so that no target crosses a
    border; a document's pieces overlap by the one token that is a target here and an input there. Without a seed the
    documents are taken in their order.
    """

    def __init__(
        self, tokens: Tokens, context: int, batch_tokens: int, seed: int | None, ids: SpecialIds = SpecialIds()
    ) -> None:
        self.tokens, self.context, self.seed, self.ids = tokens, context, seed, ids
        self.num_rows = _num_rows(batch_tokens, context)
        begins = _document_starts(tokens, ids)
        sizes = np.diff(begins, append=len(tokens)) - 1  # pairs of an input and a target
        pieces = -(-sizes // context)
        nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.starts = np.repeat(begins, pieces) + nth * context
        self.sizes = np.minimum(np.repeat(sizes, pieces) - nth * context, context)
        require(len(self.starts) > 0, "the text", "of two tokens or more", len(tokens), DataError)
        self._packing = lru_cache(2)(self._pack)

    def num_batches(self, epoch: int) -> int:
        """How many batches `epoch` yields; it depends on how well the documents of that epoch's order fit."""
        return -(-(len(self._packing(epoch if self.seed is not None else 0).rows) - 1) // self.num_rows)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[LanguageBatch]:
        """The batches of an epoch from the `start`-th on."""
        order, rows = self._packing(epoch if self.seed is not None else 0)
        for first in range(start * self.num_rows, len(rows) - 1, self.num_rows):
            borders = rows[first : first + self.num_rows + 1]
            shape = len(borders) - 1, self.context
            inputs, targets, segments = (
                np.zeros(shape, np.int64),
                np.full(shape, IGNORED),
                np.zeros(shape, np.int64),
            )
            for row in range(shape[0]):
                at = 0
                for number, piece in enumerate(order[borders[row] : borders[row + 1]], 1):
                    end = at + self.sizes[piece]
                    text = self.tokens[self.starts[piece] : self.starts[piece] + self.sizes[piece] + 1]
                    inputs[row, at:end], targets[row, at:end], segments[row, at:end] = text[:-1], text[1:], number
                    at = end
            yield _language_batch(inputs, targets, self.ids.bos, segments)

    def _pack(self, epoch: int) -> _Packing:
        pieces = np.arange(len(self.sizes))
        if self.seed is not None:
            _random(self.seed, epoch).shuffle(pieces)
        row_of = np.array(best_fit(self.sizes[pieces].tolist(), self.context))
        rows = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        return _Packing(pieces[np.argsort(row_of, kind="stable")], rows)


def best_fit(sizes: Iterable[int], capacity: int) -> list[int]:
    """The row of each size: of the open rows the one that it fills best, else a new one."""
    open_rows: list[tuple[int, int]] = []  # (space, row), least space first
    chosen, num_rows = [], 0
    for size in sizes:
        at = bisect_left(open_rows, (size, -1))
        if at < len(open_rows):
            space, row = open_rows.pop(at)
        else:
            space, row = capacity, num_rows
            num_rows += 1
        chosen.append(row)
        if space > size:
            insort(open_rows, (space - size, row))
            if len(open_rows) > OPEN_ROWS:
                open_rows.pop(0)
    return chosen


def _document_starts(tokens: Tokens, ids: SpecialIds, block: int = 1 << 24) -> Ints:
    mark, behind = (ids.eos, 1) if ids.bos is None else (ids.bos, 0)
    parts = [np.flatnonzero(tokens[at : at + block] == mark) + at + behind for at in range(0, len(tokens), block)]
    starts = np.concatenate(parts) if parts else np.empty(0, np.int64)
    starts = starts[starts < len(tokens)]
    return (
        starts if len(starts) and starts[0] == 0 else np.concatenate([np.zeros(min(1, len(tokens)), np.int64), starts])
    )


class Ragged:
    """Rows of different lengths, end to end in one array."""

    def __init__(self, flat: NDArray[np.int32], lengths: Ints) -> None:
        self.flat, self.lengths, self.ends = flat, lengths, np.cumsum(lengths)

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> "Ragged":
        """Rows end to end."""
        held = list(rows)
        return cls(np.fromiter(chain.from_iterable(held), np.int32), np.array([len(row) for row in held], np.int64))

    @classmethod
    def joined(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of all parts, one part after another."""
        if not parts:
            return cls.of([])
        return cls(np.concatenate([part.flat for part in parts]), np.concatenate([part.lengths for part in parts]))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int | np.integer) -> NDArray[np.int32]:
        return self.flat[self.ends[row] - self.lengths[row] : self.ends[row]]


class Pairs:
    """Pairs in batches of at most `batch_tokens` = rows × longest side, of similar length.

    With a seed the batches are formed anew in every epoch, among equal lengths by chance, and come in random order;
    without, they come by length. `sources` have their special tokens, `targets` have none yet.
    """

    def __init__(
        self,
        sources: Ragged,
        targets: Ragged,
        batch_tokens: int,
        seed: int | None,
        ids: SpecialIds = SpecialIds(),
    ) -> None:
        require(len(sources) > 0, "the number of examples", "at least 1", len(sources), DataError)
        require(len(sources) == len(targets), "targets", f"as many as sources ({len(sources)})", len(targets))
        self.sources, self.targets, self.ids = sources, targets, ids
        self.batch_tokens, self.seed = batch_tokens, seed
        self.longest = np.maximum(sources.lengths, targets.lengths + 1)
        self.both = sources.lengths + targets.lengths
        longest = int(self.longest.max())
        rule = f"at least the {longest} tokens of the longest example"
        require(batch_tokens >= longest, "train.batch_tokens", rule, batch_tokens, ConfigError)
        self.cuts = _cuts(np.sort(self.longest).tolist(), batch_tokens)  # equal lengths change places, cuts do not

    def num_batches(self, epoch: int) -> int:  # noqa: ARG002 all epochs are alike
        """How many batches every epoch yields."""
        return len(self.cuts) - 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of an epoch from the `start`-th on; each example is in one of them."""
        random = None if self.seed is None else _random(self.seed, epoch)
        chance = np.arange(len(self.longest)) if random is None else random.permutation(len(self.longest))
        order = np.lexsort((chance, self.both, self.longest))
        batches = np.arange(len(self.cuts) - 1) if random is None else random.permutation(len(self.cuts) - 1)
        for batch in batches[start:]:
            rows = order[self.cuts[batch] : self.cuts[batch + 1]]
            yield pair_batch([self.sources[row] for row in rows], [self.targets[row] for row in rows], self.ids)


def _cuts(lengths: Sequence[int], batch_tokens: int) -> list[int]:
    """Where batches begin, and the end, so that rows × longest stays within the budget; `lengths` ascend."""
    cuts = [0]
    while cuts[-1] < len(lengths):
        first = cuts[-1]
        last = min(len(lengths), first + batch_tokens // lengths[first])
        ends = range(first + 1, last + 1)
        cuts.append(first + bisect_right(ends, batch_tokens, key=lambda end: (end - first) * lengths[end - 1]))
    return cuts


class FreshPairs:
    """Pairs that `make` makes anew for every epoch."""

    def __init__(self, make: Callable[[int], Pairs]) -> None:
        self._made = lru_cache(2)(make)

    def num_batches(self, epoch: int) -> int:
        """How many batches `epoch` yields."""
        return self._made(epoch).num_batches(epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The batches of an epoch from the `start`-th on."""
        return self._made(epoch).epoch(epoch, start)
