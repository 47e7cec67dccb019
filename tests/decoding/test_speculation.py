"""Drafts change how fast a text comes, never the text."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import KERNELS
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import stream
from triglot.decoding.speculation import NGrams, speculate
from triglot.errors import ConfigError
from triglot.generation.prepared import Prepared
from triglot.generation.steps import start_texts
from triglot.models.decoder_only import DecoderLLM

EOS, VOCAB = 2, 11
WAYS = list(itertools.product(("fp32", "int8"), KERNELS))
OPTIONS = {
    "rotary-grouped": {"norm_order": "pre", "norm": "rms", "positions": "rotary", "num_kv_heads": 2, "bias": False},
    "learned": {"positions": "learned", "activation": "gelu"},
    "experts": {"activation": "gelu", "experts": {"num_experts": 3, "d_ff": 11}},
}


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def prepared(request):
    from triglot.config import BlockOptions
    from triglot.recipe import from_dict

    torch.manual_seed(1)
    model = DecoderLLM(VOCAB, 24, 4, 2, 40, 128, options=from_dict(BlockOptions, OPTIONS[request.param])).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)  # a text that does not go in circles
    return {how: Prepared(model, how[0], by_kernels=how[1]) for how in WAYS}


class Guesses:
    """The right tokens, some of them changed."""

    def __init__(self, texts: dict[tuple[int, ...], list[int]], draw) -> None:
        self.texts, self.draw = texts, draw

    def __call__(self, text, count: int) -> list[int]:
        known = next(whole for prompt, whole in self.texts.items() if tuple(text[: len(prompt)]) == prompt)
        right = known[len(text) : len(text) + count]
        return [token if self.draw.random() < 0.7 else self.draw.randrange(VOCAB) for token in right]


prompts_of = st.lists(
    st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=4, unique_by=lambda ids: ids[0]
)


@settings(deadline=None, max_examples=25)
@given(
    asked=prompts_of, limits=st.lists(st.integers(0, 40), min_size=4, max_size=4), count=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 1.0]), how=st.sampled_from(WAYS), draw=st.randoms(),
    lookup=st.booleans(),
)  # fmt: skip
def test_a_text_is_the_same_bits_with_drafts_of_any_quality(
    prepared, asked, limits, count, temperature, how, draw, lookup
):
    ready, sampler, limits = prepared[how], Sampler(temperature=temperature), limits[: len(asked)]

    def generators():
        return [torch.Generator().manual_seed(row) for row in range(len(asked))]

    first, steps = start_texts(ready, asked, 80)
    plain = sorted(
        stream(first, steps, sampler, limits, eos_ids=[EOS], generator=generators()), key=lambda one: one.row
    )
    whole = {tuple(ids): ids + [t.id for t in plain if t.row == row] for row, ids in enumerate(asked)}
    drafts = [NGrams() if lookup else Guesses(whole, draw)] * len(asked)
    first, steps = start_texts(ready, asked, 80)
    found = speculate(first, steps, sampler, limits, drafts, asked, count=count, eos_ids=[EOS], generators=generators())
    assert sorted(found, key=lambda one: one.row) == plain


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5), st.integers(1, 6))
def test_a_guess_followed_the_longest_known_ending_the_last_time(text, longest, count):
    def follows(size: int) -> list[int] | None:
        starts = [start for start in range(len(text) - size) if text[start : start + size] == text[len(text) - size :]]
        return text[starts[-1] + size :][:count] if starts else None

    naive = [found for size in range(min(longest, len(text) - 1), 0, -1) if (found := follows(size))]
    assert NGrams(longest)(text, count) == (naive[0] if naive else [])


def test_a_step_reads_all_right_guesses_at_once(prepared):
    ready, prompt, calls = prepared["int8", False], [3, 4, 5], []
    first, steps = start_texts(ready, [prompt], 60)
    texts = list(stream(first, steps, Sampler(temperature=0.0), [25], generator=[torch.Generator()]))
    whole = prompt + [token.id for token in texts]
    first, steps = start_texts(ready, [prompt], 60)
    extend = steps.extend
    steps.extend = lambda tokens: calls.append(tokens.size(1)) or extend(tokens)

    def draft(text, count):
        return whole[len(text) : len(text) + count]

    list(speculate(first, steps, Sampler(temperature=0.0), [25], [draft], [prompt], generators=[torch.Generator()]))
    assert calls == [5, 5, 5, 5, 4]


def test_numbers_below_one_are_refused(prepared):
    with pytest.raises(ConfigError, match="longest` must be at least 1"):
        NGrams(0)
    first, steps = start_texts(prepared["int8", False], [[3]], 60)
    generators = [torch.Generator()]
    with pytest.raises(ConfigError, match="count` must be at least 1"):
        list(speculate(first, steps, Sampler(), [1], [NGrams()], [[3]], count=0, generators=generators))
