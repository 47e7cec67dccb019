"""Going on from texts with a decoder-only model, past its context too, until each text has its end.

A text goes on from the last half of the context when its own is full, whenever that of another one is: what it becomes
does not depend on its company.
"""

from collections.abc import Container, Iterator, Sequence
from operator import add
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from triglot.decoding.logits import Scored
from triglot.decoding.rules import Rule, Within
from triglot.decoding.search import ScoredSteps, Steps, Token, stream
from triglot.decoding.speculation import SteppingBack, speculate
from triglot.errors import ConfigError, DeadEndError, require
from triglot.generation.captured import start_captured
from triglot.generation.compiled import start_compiled
from triglot.generation.options import Sampling
from triglot.generation.ready import Ready, batches, pad
from triglot.generation.results import Ended, Generation
from triglot.generation.scoring import prompt_ids
from triglot.generation.steps import start_texts
from triglot.generation.stops import StoppingStream
from triglot.tokenizer import Message, SpecialIds

Prompt = str | Sequence[Message]
"""A text, or a conversation."""


class Draft:
    """A text that is being written."""

    def __init__(
        self, number: int, prompt: Sequence[int], limit: int, seed: int, text: StoppingStream, ids: SpecialIds
    ) -> None:
        self.number = number
        """Of its prompt, counted from 1."""
        self.limit, self.generator = limit, torch.Generator().manual_seed(seed)
        self.tokens: list[Token] = []
        self.ids: list[int] = []
        self._read, self._text, self._pieces, self._ends = list(prompt), text, list[str](), ids.ends

    def take(self, token: Token) -> str:
        """What this token shows to be text: nothing that a later one could take back."""
        self.tokens.append(token)
        self.ids.append(token.id)
        self._read.append(token.id)
        piece = self._text.push(token.id)
        if self.ended is not None:
            piece += self._text.flush()
        self._pieces.append(piece)
        return piece

    @property
    def ended(self) -> Ended | None:
        """Why the text is at its end, if it is."""
        if self._text.finished:
            return "stop"
        if self.ids and self.ids[-1] in self._ends:
            return "end"
        return "limit" if len(self.ids) >= self.limit else None

    def context(self, longest: int) -> list[int]:
        """What the model reads: all, or the last half of the context once that is full."""
        if len(self._read) >= longest:
            self._read = self._read[-(longest // 2) :]
        return self._read

    def result(self, *, alternatives: bool) -> Generation:
        """What was written."""
        assert self.ended is not None
        return Generation(
            "".join(self._pieces),
            self.ids,
            [token.log_prob for token in self.tokens],
            self.ended,
            self._text.stop,
            [list(token.alternatives) for token in self.tokens] if alternatives else None,
        )


class Stream(Iterator[str]):
    """A text as it comes, in pieces none of which is empty."""

    def __init__(self, draft: Draft, pieces: Iterator[str]) -> None:
        self._draft, self._pieces = draft, filter(None, pieces)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def ended(self) -> Ended | None:
        """Why the text is at its end; None while it is not."""
        return self._draft.ended


def drafts_of(ready: Ready, prompts: Sequence[Prompt], how: Sampling) -> tuple[list[Draft], list[Rule]]:
    """The texts that are to be written, those of a prompt side by side, and their rules; raises what is not possible.

    Without `max_new_tokens` a text is as long as the run says, and no longer than fits the context.
    """
    if how.speculate:
        ready.guesser(how.speculate)  # which refuses where there can be none
    contexts = _contexts(ready, prompts)
    limits = [_limit(ready, number, len(ids), how) for number, ids in enumerate(contexts, 1) for _ in range(how.n)]
    contexts = [ids for ids in contexts for _ in range(how.n)]
    tokenizer, seeds = ready.tokenizers.target, how.seeds(len(contexts))
    drafts = [
        Draft(1 + place // how.n, ids, limit, seed, StoppingStream(tokenizer, how.stop, ids), tokenizer.ids)
        for place, (ids, limit, seed) in enumerate(zip(contexts, limits, seeds, strict=True))
    ]
    return drafts, how.rules(tokenizer, contexts)


def _contexts(ready: Ready, prompts: Sequence[Prompt]) -> list[list[int]]:
    """What the model reads of each prompt."""
    tokenizer = ready.tokenizers.target
    chats = {
        number: tokenizer.encode(tokenizer.apply_chat_template(one))
        for number, one in enumerate(prompts)
        if not isinstance(one, str)
    }
    texts = prompt_ids(ready.config, tokenizer, [one if isinstance(one, str) else "" for one in prompts])
    return [chats.get(number, ids) for number, ids in enumerate(texts)]


def _limit(ready: Ready, number: int, length: int, how: Sampling) -> int:
    """How many tokens may follow prompt `number`, of so many tokens."""
    longest = ready.writer.max_len
    require(longest >= 2, "max_seq_length", "at least 2 to generate", longest, ConfigError)
    limit = how.max_new_tokens or ready.config.generation.max_new_tokens
    if how.past_context == "slide":
        return limit
    room, beyond = longest - length, f'(the context is {longest}; past_context "slide" goes on beyond)'
    rule = f"at most {longest - 1} tokens long {beyond}"
    require(room >= 1, f"prompt {number}", rule, length, ConfigError)
    rule = f"at most {room} after the {length} tokens of prompt {number} {beyond}"
    require(how.max_new_tokens is None or limit <= room, "max_new_tokens", rule, limit, ConfigError)
    return min(limit, room)


def write_all(ready: Ready, drafts: Sequence[Draft], how: Sampling, rules: Sequence[Rule]) -> None:
    """Write each text to its end, as many together as memory is meant for."""
    longest = ready.writer.max_len
    for numbers in batches([min(len(one.context(longest)) + one.limit, longest) for one in drafts]):
        own = [Within(rule, numbers) for rule in rules]
        for _ in write(ready, [drafts[number] for number in numbers], how, own):
            pass


@torch.inference_mode()
def write(ready: Ready, drafts: Sequence[Draft], how: Sampling, rules: Sequence[Rule]) -> Iterator[str]:
    """Write texts to their ends, side by side; pieces of text as they come, some of them empty."""
    while numbers := [number for number, one in enumerate(drafts) if one.ended is None]:
        live = [drafts[number] for number in numbers]
        before = [list(one.ids) for one in live]
        yield from _write_on(ready, live, how, [Within(rule, numbers, before) for rule in rules])


def _write_on(ready: Ready, live: Sequence[Draft], how: Sampling, rules: Sequence[Rule]) -> Iterator[str]:
    """Write texts on until each is at its end or its context is full; what was read is let go of then."""
    longest = ready.writer.max_len
    contexts = [list(one.context(longest)) for one in live]
    limits = [min(one.limit - len(one.ids), longest - len(ids)) for one, ids in zip(live, contexts, strict=True)]
    first, steps = _start(ready, contexts, limits)
    stopped = set[int]()
    tokens = _tokens(ready, how, first, steps, limits, contexts, rules, [one.generator for one in live], stopped)
    try:
        for token in tokens:
            draft = live[token.row]
            piece = draft.take(token)
            if draft.ended is not None:
                stopped.add(token.row)
            yield piece
    except DeadEndError as error:
        raise DeadEndError(error.request, f"the text after prompt {live[error.request].number}") from error


def _tokens(
    ready: Ready,
    how: Sampling,
    first: Float[Tensor, "texts vocab"] | Scored,
    steps: Steps | ScoredSteps,
    limits: Sequence[int],
    contexts: Sequence[Sequence[int]],
    rules: Sequence[Rule],
    generators: Sequence[torch.Generator],
    stopped: Container[int],
) -> Iterator[Token]:
    """Tokens of all texts as they are chosen, with guesses or without."""
    shared: dict[str, Any] = {
        "eos_ids": ready.tokenizers.target.ids.ends,
        "banned": ready.banned,
        "rules": rules,
        "top_logprobs": how.top_logprobs,
        "stopped": stopped,
    }
    if not how.speculate:
        return stream(first, steps, how.sampler, limits, generator=generators, **shared)
    drafts = [ready.guesser(how.speculate) for _ in contexts]
    assert isinstance(steps, SteppingBack)
    assert isinstance(first, Tensor)
    return speculate(
        first, steps, how.sampler, limits, drafts, contexts, count=how.speculate, generators=generators, **shared
    )


def _start(
    ready: Ready, contexts: Sequence[list[int]], limits: Sequence[int]
) -> tuple[Float[Tensor, "texts vocab"] | Scored, Steps | ScoredSteps]:
    """Logits after each context, of which equal ones are read once, and what goes on from there."""
    if (captured := ready.captured) is not None:
        return start_captured(captured, contexts, list(map(add, map(len, contexts), limits)))
    places = {ids: place for place, ids in enumerate(dict.fromkeys(map(tuple, contexts)))}
    texts = [list(ids) for ids in places]
    most = max(len(ids) + limit for ids, limit in zip(contexts, limits, strict=True))
    first: Tensor
    steps: Steps | ScoredSteps
    prepared, compiled = ready.prepared, ready.compiled
    if prepared is not None and compiled is not None:
        first, steps = start_compiled(compiled, prepared, texts, most, len(contexts))
    elif prepared is not None:
        first, steps = start_texts(prepared, texts, most)
    else:
        prompts = pad(texts, ready.model)
        lengths = torch.tensor([len(text) for text in texts], device=prompts.device)
        first, steps = ready.writer.start(prompts, lengths, most - prompts.size(1))
    if len(texts) == len(contexts):
        return first, steps
    rows = torch.tensor([places[tuple(ids)] for ids in contexts], device=first.device)
    steps.select(rows)
    return first[rows], steps
