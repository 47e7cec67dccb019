"""Searches under rules find what naive ones over lists find, in any company; a filled-up vocabulary stays unseen."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from triglot.decoding.beam import BeamSearch, beam_search
from triglot.decoding.rules import (
    BannedWords,
    CountPenalty,
    ForcedPrefix,
    LogitBias,
    MinLength,
    NoRepeatNGram,
    RepetitionPenalty,
    Rule,
)
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import Decoded, generate, stream
from triglot.errors import ConfigError

BOS, EOS, VOCAB, FILLED = 1, 2, 7, 13
BANNED = (0, BOS)
GREEDY = Sampler(temperature=0.0)


class Table:
    """A bigram model: the logits after a token, a table for each sentence; columns from VOCAB on are no tokens."""

    def __init__(self, tables: Tensor) -> None:
        self.tables, self.row_of = tables, torch.arange(len(tables))  # [sentences, VOCAB, FILLED]

    def step(self, tokens: Tensor) -> Tensor:
        return self.tables[self.row_of, tokens]

    def select(self, rows: Tensor) -> None:
        self.row_of = self.row_of[rows]


def tables(sentences: int, seed: int) -> Tensor:
    made = torch.randn(sentences, VOCAB, FILLED, generator=torch.Generator().manual_seed(seed)) * 2
    made[..., VOCAB:] = -math.inf
    return made


def distribution(table: Tensor, ids: list[int], rules: list[Rule], request: int) -> Tensor:
    """log p of what follows one text."""
    logits = table[([BOS, *ids])[-1]].clone()[None]
    logits[:, list(BANNED)] = -math.inf
    for rule in rules:
        logits = rule(logits, [ids], [request])
    return logits[0].log_softmax(0)


def log_probs(table: Tensor, ids: list[int], rules: list[Rule], request: int) -> list[float]:
    return [distribution(table, ids[:n], rules, request)[token].item() for n, token in enumerate(ids)]


def run(made: Tensor, rules: list[Rule], limit, sampler: Sampler = GREEDY, **options) -> list[Decoded]:
    steps = Table(made)
    first = steps.step(torch.full((len(made),), BOS))
    return generate(first, steps, sampler, limit, eos_ids=[EOS], banned=BANNED, rules=rules, **options)


def run_beam(made: Tensor, rules: list[Rule], limit, beam: int, **options) -> list[list[Decoded]]:
    steps = Table(made)
    first = steps.step(torch.full((len(made),), BOS))
    options = {"beam": beam, "banned": BANNED, "rules": rules, **options}
    return beam_search(first, steps, BeamSearch(eos_ids=[EOS], **options), limit)


SENTENCES = 5
SOME_IDS = st.lists(st.sampled_from([3, 5, 6]), max_size=3)  # no banned word ends in these
IDS_OF_EACH = st.lists(SOME_IDS, min_size=SENTENCES, max_size=SENTENCES)


@st.composite
def possible_rules(draw) -> list:
    """Functions from the numbers of sentences to a rule for them; together they leave every text a token."""
    prefixes, prompts = draw(IDS_OF_EACH), draw(IDS_OF_EACH)
    makers = [
        lambda rows: RepetitionPenalty(1.5, [prompts[row] for row in rows]),
        lambda rows: CountPenalty(0.75, 0.25),
        lambda rows: LogitBias({3: 1.5, EOS: -0.5}),
        lambda rows: BannedWords([[4, 5, 4], [3, 4]]),
        lambda rows: NoRepeatNGram(2),
        lambda rows: MinLength([EOS], 3),
    ]
    chosen = draw(st.lists(st.sampled_from(makers), unique=True))
    return [lambda rows: ForcedPrefix([prefixes[row] for row in rows]), *chosen]


def make(makers, rows=range(SENTENCES)) -> list[Rule]:
    return [maker(rows) for maker in makers]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), possible_rules(), st.lists(st.integers(0, 9), min_size=SENTENCES, max_size=SENTENCES))
def test_greedy_takes_the_likeliest_token_of_what_the_rules_leave(seed, makers, limits):
    made, rules = tables(SENTENCES, seed), make(makers)
    for row, result in enumerate(run(made, rules, limits)):
        ids: list[int] = []
        while len(ids) < limits[row] and ids[-1:] != [EOS]:
            ids.append(int(distribution(made[row], ids, rules, row).argmax()))
        assert result.ids == ids
        assert result.log_probs == pytest.approx(log_probs(made[row], ids, rules, row), abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), possible_rules(), st.sampled_from([GREEDY, Sampler(temperature=1.3, min_p=0.1)]))
def test_a_row_under_rules_does_not_depend_on_its_mates(seed, makers, sampler):
    made = tables(SENTENCES, seed)
    generators = [torch.Generator().manual_seed(row) for row in range(SENTENCES)]
    together = run(made, make(makers), 9, sampler, generator=generators)
    for row in range(SENTENCES):
        own = [torch.Generator().manual_seed(row)]
        assert run(made[[row]], make(makers, [row]), 9, sampler, generator=own) == [together[row]]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), possible_rules(), st.integers(1, 5), st.sampled_from(["power", "gnmt"]))
def test_a_sentence_under_rules_alone_is_the_sentence_in_company(seed, makers, beam, lengths):
    made, options = tables(SENTENCES, seed), {"beam": beam, "nbest": beam, "lengths": lengths}
    together = run_beam(made, make(makers), 9, **options)
    for row in range(SENTENCES):
        assert run_beam(made[[row]], make(makers, [row]), 9, **options) == [together[row]]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), possible_rules())
def test_a_beam_of_one_under_rules_is_greedy(seed, makers):
    made, rules = tables(SENTENCES, seed), make(makers)
    for [found], expected in zip(run_beam(made, rules, 9, beam=1), run(made, rules, 9), strict=True):
        assert (found.ids, found.truncated) == (expected.ids, expected.truncated)
        assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 999), possible_rules(), st.sampled_from(["power", "gnmt"]))
def test_a_beam_as_wide_as_all_texts_finds_the_best_that_the_rules_leave(seed, makers, lengths):
    table, rules, limit, nbest = tables(1, seed)[0], make(makers), 4, 5
    [found] = run_beam(table[None], rules, limit, beam=4**limit, nbest=nbest, lengths=lengths, length_penalty=0.6)
    live, exact = [((), 0.0)], []
    for n in range(1, limit + 1):
        grown = []
        for ids, sum_ in live:
            after = distribution(table, list(ids), rules, 0).tolist()
            grown += [((*ids, token), sum_ + value) for token, value in enumerate(after) if value > -math.inf]
        exact += [sum_ / (n if lengths == "power" else (5 + n) / 6) ** 0.6 for ids, sum_ in grown if ids[-1] == EOS]
        live = [one for one in grown if one[0][-1] != EOS]
    exact = sorted(exact, reverse=True)[:nbest]
    assert [one.score(0.6, lengths) for one in found if not one.truncated] == pytest.approx(exact, abs=1e-4)


def test_a_forced_token_costs_nothing():
    made, prefix = tables(1, 0), [6, 3, 3]
    [[best]] = run_beam(made, [ForcedPrefix([prefix])], 9, beam=3)
    assert best.ids[:3] == prefix
    assert best.log_probs[:3] == [0.0, 0.0, 0.0]
    assert best.log_prob < 0


class Spy:
    """A rule that changes nothing and remembers the texts and requests that it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def __call__(self, logits, texts, requests, /):
        assert len(logits) == len(texts) == len(requests)
        self.seen += zip(requests, map(list, texts), strict=True)
        return logits


@pytest.mark.parametrize("beam", [2, 5, 11])
def test_rules_are_shown_possible_texts_alone(beam):
    prefixes, spy = [[3, 5, 6], [], [6], [4, 4], [5]], Spy()
    run_beam(tables(SENTENCES, 1), [ForcedPrefix(prefixes), NoRepeatNGram(3), spy], 7, beam=beam, length_penalty=0.0)
    for request, text in spy.seen:
        assert text[: len(prefixes[request])] == prefixes[request][: len(text)]
        assert set(text) <= set(range(EOS + 1, VOCAB))
    shown = {(request, tuple(text)) for request, text in spy.seen}
    assert len(shown) == len(spy.seen)  # each of them once


def test_a_text_that_cannot_go_on_is_dropped_where_another_one_can():
    made = torch.full((1, VOCAB, FILLED), -math.inf)
    for before, after, value in [(BOS, 3, 2.0), (BOS, 4, 0.0), (3, 3, 0.0), (4, EOS, 0.0)]:
        made[0, before, after] = value
    [found] = run_beam(made, [BannedWords([[3, 3]])], 5, beam=2, nbest=2)
    assert [text.ids for text in found] == [[4, EOS]]


def test_impossible_rules_are_an_error_that_says_where():
    made = tables(2, 0)
    rules: list[Rule] = [ForcedPrefix([[3, 4], [5]]), BannedWords([[3, 4]])]
    with pytest.raises(ConfigError) as refusal:
        run(made, rules, 7)
    told = "`the number of tokens that the rules leave text 0` must be at least 1, but is 0 instead."
    assert str(refusal.value) == told
    with pytest.raises(ConfigError) as refusal:
        run_beam(made, rules, 7, beam=3)
    told = "`the number of tokens that the rules leave text 0` must be at least 1, but is 0 instead."
    assert str(refusal.value) == told


def test_fewer_alternatives_are_told_where_fewer_are_possible():
    steps = Table(tables(1, 0))
    first = steps.step(torch.tensor([BOS]))
    options = {
        "eos_ids": [EOS],
        "banned": BANNED,
        "rules": [ForcedPrefix([[5]]), MinLength([EOS], 2)],
        "top_logprobs": 9,
    }
    tokens = list(stream(first, steps, GREEDY, 2, **options))
    assert [len(token.alternatives) for token in tokens] == [1, VOCAB - EOS - 1]
    assert tokens[0].alternatives == ((5, 0.0),)


def test_refuses_a_negative_number_of_alternatives():
    with pytest.raises(ConfigError, match="`top_logprobs` must be at least 0, but is -1 instead"):
        stream(tables(1, 0)[:, BOS], Table(tables(1, 0)), GREEDY, 3, top_logprobs=-1)
