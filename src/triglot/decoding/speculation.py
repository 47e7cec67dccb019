"""Speculative decoding: several drafted tokens are read at one step, and those that would have been chosen are kept.

The text is the one that is made without drafts: each token is chosen from the same logits, by the same draw of the
row's own generator, and compared with the draft (the exact form of Leviathan et al. 2023 for a given stream of random
numbers). A wrong draft costs a little time, never the text.
"""

from collections.abc import Collection, Container, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triglot.decoding.rules import Rule
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Chooser, Steps, Token, closed_up
from triglot.errors import ConfigError, require


@runtime_checkable
class SteppingBack(Steps, Protocol):
    """Steps that read several tokens at once and can forget the last ones."""

    def extend(self, tokens: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new vocab"]:
        """Feed each row its next tokens; logits of the one after each."""
        ...

    def forget(self, counts: Int[Tensor, " rows"]) -> None:
        """Forget so many of the last tokens of each row."""
        ...


@runtime_checkable
class Draft(Protocol):
    """What guesses how a text goes on."""

    def __call__(self, text: Sequence[int], count: int) -> list[int]:
        """At most `count` tokens that may follow."""
        ...


class NGrams:
    """What followed the last time that the text ended as it ends now (prompt lookup, Saxena 2023).

    The longest ending of at most `longest` tokens that stood there before decides, and its latest place.
    """

    def __init__(self, longest: int = 3) -> None:
        require(longest >= 1, "longest", "at least 1", longest, ConfigError)
        self.longest = longest

    def __call__(self, text: Sequence[int], count: int) -> list[int]:
        text = list(text)
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            ending = text[-size:]
            for start in range(len(text) - size - 1, -1, -1):
                if text[start : start + size] == ending:
                    return text[start + size : start + size + count]
        return []


@torch.inference_mode()
def speculate(
    logits: Float[Tensor, "rows vocab"],
    steps: SteppingBack,
    sampler: Sampler,
    limits: Sequence[int],
    drafts: Sequence[Draft],
    prompts: Sequence[Sequence[int]],
    *,
    count: int = 4,
    eos_ids: Collection[int] = (),
    banned: Sequence[int] = (),
    rules: Sequence[Rule] = (),
    generators: Sequence[torch.Generator],
    top_logprobs: int = 0,
    stopped: Container[int] = (),
) -> Iterator[Token]:
    """What `search.stream` yields for each row, with up to `count` tokens of its draft read along at each step."""
    require(count >= 1, "count", "at least 1", count, ConfigError)
    choose = Chooser(sampler=sampler, banned=banned, rules=rules, top_logprobs=top_logprobs)
    texts: list[list[int]] = [[] for _ in prompts]
    left, live = list(limits), [row for row, limit in enumerate(limits) if limit > 0]
    if len(live) < len(limits):
        steps.select(torch.tensor(live, dtype=torch.long))
        logits = logits[live]
    guesses: list[list[int]] = [[] for _ in live]
    after = logits[:, None]  # of each row: logits after its last token, and after each guess that follows it
    while live:
        kept = []  # of each row: how many of its guesses came true
        for place, row in enumerate(live):
            began = len(texts[row])
            for at, guess in enumerate([*guesses[place], None][: left[row]]):
                [token] = choose(after[place, at, None], [row], [texts[row]], [generators[row]]).tokens()
                texts[row].append(token.id)
                yield token
                if row in stopped or token.id in eos_ids or token.id != guess:
                    break
            made = len(texts[row]) - began
            left[row] = 0 if texts[row][-1] in eos_ids or row in stopped else left[row] - made
            kept.append(made - 1)
        read = after.size(1) - 1
        steps.forget(torch.tensor([read - number for number in kept]))
        going = closed_up([left[row] > 0 for row in live])
        if len(going) < len(live):
            steps.select(torch.tensor(going, dtype=torch.long))
            live = [live[place] for place in going]
        guesses = [
            drafts[row]([*prompts[row], *texts[row]], min(count, left[row] - 1)) if left[row] > 1 else []
            for row in live
        ]
        width = 1 + max(map(len, guesses), default=0)
        if live:
            fed = [[texts[row][-1], *guess] for row, guess in zip(live, guesses, strict=True)]
            after = steps.extend(torch.tensor([one + one[-1:] * (width - len(one)) for one in fed]))
