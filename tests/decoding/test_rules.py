"""Rules do what naive loops over lists do, and what transformers' processors do; what is impossible stays so."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.decoding.rules import (
    BannedWords,
    CountPenalty,
    ForcedPrefix,
    LogitBias,
    MinLength,
    NoRepeatNGram,
    RepetitionPenalty,
    Rule,
    apply,
)
from triglot.errors import ConfigError

VOCAB, FILLED, EOS = 7, 11, 2  # the last columns fill the vocabulary up and are no tokens
IDS = st.integers(0, VOCAB - 1)
TEXTS = st.lists(st.lists(IDS, max_size=13), min_size=1, max_size=5)


def make_logits(rows: int, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(rows, FILLED, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, VOCAB:] = -math.inf
    logits[:, 1] = -math.inf  # banned already
    return logits


def check(rule: Rule, texts: list[list[int]], naive) -> None:
    """`naive` turns a row's list of logits, its text and its request into new logits."""
    logits, requests = make_logits(len(texts)), [3 * row + 1 for row in range(len(texts))]
    before = logits.clone()
    found = rule(logits, texts, requests)
    assert torch.equal(logits, before)
    assert found[before == -math.inf].eq(-math.inf).all()
    expected = [naive(row, *of) for row, *of in zip(before.tolist(), texts, requests, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))
    order = list(reversed(range(len(texts))))
    turned = rule(logits[order], [texts[row] for row in order], [requests[row] for row in order])
    assert torch.equal(turned[order], found)


def without(logits: list[float], banned) -> list[float]:
    return [-math.inf if token in banned else value for token, value in enumerate(logits)]


@settings(deadline=None, max_examples=25)
@given(TEXTS, st.integers(0, 9))
def test_no_end_before_the_least_length(texts, least):
    check(MinLength([EOS], least), texts, lambda logits, text, _: without(logits, [EOS] * (len(text) < least)))


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.integers(1, 4))
def test_no_ngram_is_completed_twice_unless_nothing_else_is_possible(texts, size):
    def naive(logits, text, _):
        seen = {tuple(text[at : at + size]) for at in range(len(text) - size + 1)}
        left = without(logits, [t for t in range(VOCAB) if (*text, t)[-size:] in seen])
        return left if max(left) > -math.inf else logits

    check(NoRepeatNGram(size), texts, naive)


@settings(deadline=None, max_examples=25)
@given(TEXTS, st.floats(0.25, 4.0), st.booleans(), st.data())
def test_what_came_before_in_prompt_or_text_is_penalised_once(texts, penalty, with_prompts, data):
    some = st.lists(st.lists(IDS, max_size=5), min_size=3 * len(texts), max_size=3 * len(texts))
    prompts = data.draw(some) if with_prompts else None

    def naive(logits, text, request):
        seen = [*text, *(prompts[request] if prompts else [])]
        worse = [value * penalty if value < 0 else value / penalty for value in logits]
        return [worse[t] if t in seen else logits[t] for t in range(FILLED)]

    check(RepetitionPenalty(penalty, prompts), texts, naive)


@settings(deadline=None, max_examples=25)
@given(TEXTS, st.floats(-2.0, 2.0), st.floats(-2.0, 2.0))
def test_presence_is_subtracted_once_and_frequency_for_every_time(texts, presence, frequency):
    def naive(logits, text, _):
        return [v - text.count(t) * frequency - (text.count(t) > 0) * presence for t, v in enumerate(logits)]

    check(CountPenalty(presence, frequency), texts, naive)


@settings(deadline=None, max_examples=25)
@given(TEXTS, st.dictionaries(IDS, st.sampled_from([-math.inf, -7.5, 0.0, 3.0])))
def test_biases_are_added(texts, bias):
    check(LogitBias(bias), texts, lambda logits, *_: [v + bias.get(t, 0.0) for t, v in enumerate(logits)])


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.lists(st.lists(st.integers(3, 5), min_size=1, max_size=4), max_size=9))
def test_a_banned_word_is_never_completed(texts, words):
    def naive(logits, text, _):
        return without(logits, [t for t in range(VOCAB) if any([*text, t][-len(word) :] == word for word in words)])

    check(BannedWords(words), texts, naive)


@settings(deadline=None, max_examples=25)
@given(TEXTS, st.data())
def test_a_forced_beginning_leaves_only_its_next_token_and_then_everything(texts, data):
    prefixes = data.draw(st.lists(st.lists(IDS, max_size=9), min_size=3 * len(texts), max_size=3 * len(texts)))

    def naive(logits, text, request):
        if len(text) >= len(prefixes[request]):
            return logits
        return [v if t == prefixes[request][len(text)] else -math.inf for t, v in enumerate(logits)]

    check(ForcedPrefix(prefixes), texts, naive)


SAME_LENGTH = st.integers(1, 13).flatmap(
    lambda n: st.lists(st.lists(IDS, min_size=n, max_size=n), min_size=1, max_size=5)
)
NAMES = ["MinNewTokensLength", "NoRepeatNGram", "RepetitionPenalty", "NoBadWords", "SequenceBias"]


@settings(deadline=None, max_examples=100)
@given(SAME_LENGTH, st.sampled_from(NAMES), st.data())
def test_rules_are_the_processors_of_transformers(texts, name, data):
    processors = pytest.importorskip("transformers.generation.logits_process")
    prompt = data.draw(st.lists(IDS, max_size=3)) if name in ("MinNewTokensLength", "RepetitionPenalty") else []
    rule: Rule
    match name:
        case "MinNewTokensLength":
            least = data.draw(st.integers(0, 13))
            rule, arguments = MinLength([EOS], least), (len(prompt), least, EOS)
        case "NoRepeatNGram":
            arguments = (data.draw(st.integers(1, 4)),)
            rule = NoRepeatNGram(*arguments)
        case "RepetitionPenalty":
            arguments = (data.draw(st.floats(0.25, 4.0)),)
            rule = RepetitionPenalty(*arguments, [prompt] * len(texts))
        case "NoBadWords":
            arguments = (data.draw(st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=5)),)
            rule = BannedWords(*arguments)
        case _:
            bias = data.draw(st.dictionaries(IDS, st.floats(-9, 9), min_size=1))
            rule, arguments = LogitBias(bias), ([[[token], value] for token, value in bias.items()],)
    theirs = getattr(processors, f"{name}LogitsProcessor")(*arguments)
    logits = make_logits(len(texts))
    expected = theirs(torch.tensor([prompt + text for text in texts]), logits)
    gives_way = (expected == -math.inf).all(1) if name == "NoRepeatNGram" else torch.zeros(len(texts), dtype=bool)
    found = rule(logits, texts, list(range(len(texts))))
    torch.testing.assert_close(found[~gives_way], expected[~gives_way])


def test_rules_are_applied_in_their_order_and_leave_a_distribution():
    logits, texts = make_logits(3), [[3, 4, 3], [3], [5, 5]]
    rules = [RepetitionPenalty(1.3), CountPenalty(0.5, 0.25), NoRepeatNGram(2), MinLength([EOS], 3)]
    expected = logits
    for rule in rules:
        expected = rule(expected, texts, [0, 1, 2])
    found = apply(rules, logits, texts, [0, 1, 2])
    assert torch.equal(found, expected)
    assert not torch.equal(found, apply(rules[::-1], logits, texts, [0, 1, 2]))
    torch.testing.assert_close(found.softmax(1).sum(1), torch.ones(3))


def test_a_forced_beginning_may_repeat_itself():
    rules = [ForcedPrefix([[3, 3, 3, 3]]), NoRepeatNGram(1)]
    for length in range(4):
        left = apply(rules, make_logits(1), [[3] * length], [0])[0]
        assert left.isfinite().nonzero().tolist() == [[3]]
    assert apply(rules, make_logits(1), [[3] * 4], [0])[0, 3] == -math.inf


class Broken:
    def __call__(self, logits, texts, requests, /):
        return logits - logits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinLength([-1], 3), "`eos_ids` must be of ids, which are at least 0, but is -1 instead."),
        (lambda: MinLength([EOS], -1), "`min_new_tokens` must be at least 0, but is -1 instead."),
        (lambda: NoRepeatNGram(0), "`size` must be at least 1, but is 0 instead."),
        (lambda: RepetitionPenalty(0.0), "`penalty` must be above 0 and finite, but is 0.0 instead."),
        (lambda: RepetitionPenalty(1.5, [[-2]]), "`prompts` must be of ids, which are at least 0, but is -2 instead."),
        (lambda: CountPenalty(math.nan), "`presence` must be finite, but is nan instead."),
        (lambda: CountPenalty(0.0, math.inf), "`frequency` must be finite, but is inf instead."),
        (lambda: LogitBias({3: math.inf}), "`bias` must be of numbers below infinity, but is inf instead."),
        (lambda: LogitBias({-3: 1.0}), "`bias` must be of ids, which are at least 0, but is -3 instead."),
        (lambda: BannedWords([[3], []]), "`words` must be sequences of at least one id, but is [] instead."),
        (lambda: ForcedPrefix([[-1]]), "`prefixes` must be of ids, which are at least 0, but is -1 instead."),
        (
            lambda: apply([ForcedPrefix([[3]])], make_logits(2), [[], []], [0, 1]),
            "`prefixes` must be one for each of at least 2 requests, but is 1 instead.",
        ),
        (
            lambda: apply([LogitBias({FILLED: 1.0})], make_logits(1), [[]], [0]),
            "`ids that a rule names` must be below the number of logits (11), but is 11 instead.",
        ),
        (
            lambda: apply([Broken()], make_logits(1), [[]], [0]),
            "`what Broken returns` must be numbers, but is 'NaN' instead.",
        ),
    ],
)  # fmt: skip
def test_refuses_rules_that_make_no_sense(make, message):
    with pytest.raises(ConfigError) as refusal:
        make()
    assert str(refusal.value) == message
