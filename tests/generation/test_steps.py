"""A prepared decoder computes what its model computes, and gives each row the same bits in any company."""

import itertools
import math
import random
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.conftest import HAS_COMPILER, KERNELS, needs_compiler
from triglot.config import BlockOptions
from triglot.decoding.beam import BeamSearch
from triglot.decoding.logits import Scaled, in_full
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate
from triglot.generation.held import keep_rows
from triglot.generation.int8 import multiplies_bytes
from triglot.generation.prepared import SHIFT, Prepared, filled_up_projection
from triglot.generation.steps import Sentences, SentenceSteps, search, start_texts
from triglot.layers import packed
from triglot.layers.linear import has_onednn
from triglot.layers.masks import create_padding_mask
from triglot.layers.packed import multiplies_int8, multiplies_tiles, pack
from triglot.models.decoder_only import DecoderLLM
from triglot.models.encoder_decoder import Transformer

PAD, BOS, EOS, VOCAB, LONGEST = 0, 1, 2, 60, 97
PRECISIONS = ["fp32", "bf16", "int8", "int4"]


def make_translator(options) -> Transformer:
    torch.manual_seed(0)
    options = replace(options, window=None)  # which language models alone have
    model = Transformer(VOCAB, VOCAB, 24, 3, 4, 40, LONGEST, 0.1, options=options)
    return model.eval()


def make_language_model(options, by_kernels: bool = False) -> DecoderLLM:
    """Where it is for kernels, as wide as those of norms and activations are for."""
    torch.manual_seed(0)
    d_model, d_ff = (32, 64) if by_kernels else (24, 40)
    return DecoderLLM(VOCAB, d_model, 4, 3, d_ff, LONGEST, options=options).eval()


by_kernels = pytest.mark.parametrize("by_kernels", KERNELS)


def texts(seed: int, number: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(number)]


@torch.no_grad()
@by_kernels
def test_translation_steps_are_the_models(options, by_kernels):
    model, sources = make_translator(options), texts(1, 3)
    targets = torch.randint(VOCAB, (3, 35), generator=torch.Generator().manual_seed(2))
    src = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sources], batch_first=True)
    plain = model.start(src, create_padding_mask(src), 90)
    prepared = Prepared(model, by_kernels=by_kernels)
    steps = SentenceSteps(prepared, [Sentences(prepared, sources, 1, 90)])
    for tokens in targets.T:
        found = torch.cat(list(steps.step(tokens)))
        torch.testing.assert_close(found[:, :VOCAB], plain.step(tokens), rtol=1e-4, atol=2e-5)


@torch.no_grad()
@by_kernels
def test_hypotheses_go_on_from_the_parents_that_they_are_given(options, by_kernels):
    model, sources = make_translator(options), texts(1, 3)
    draw = torch.Generator().manual_seed(3)
    src = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sources], batch_first=True)
    plain = model.start(src, create_padding_mask(src), 90)
    prepared = Prepared(model, by_kernels=by_kernels)
    steps = SentenceSteps(prepared, [Sentences(prepared, sources, 4, 90)])
    live, width = torch.arange(3), 1
    for number in range(20):
        tokens = torch.randint(VOCAB, (width * len(live),), generator=draw)
        found = torch.cat(list(steps.step(tokens)))
        torch.testing.assert_close(found[:, :VOCAB], plain.step(tokens), rtol=1e-4, atol=2e-5)
        live = torch.tensor([2, 0]) if number == 10 else torch.arange(len(live))
        rows = (live[:, None] * width + torch.randint(width, (len(live), 4), generator=draw)).flatten()
        plain.select(rows)
        steps.select(rows)
        width = 4


@torch.no_grad()
@by_kernels
@pytest.mark.parametrize("window", [None, 11])
def test_text_steps_are_the_models(options, window, by_kernels):
    model, prompts = make_language_model(replace(options, window=window), by_kernels), texts(3, 5)
    lengths = torch.tensor([len(ids) for ids in prompts])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
    expected, plain = model.start(padded, lengths, 50)
    found, steps = start_texts(Prepared(model, by_kernels=by_kernels), prompts, 90)
    for number in range(40):
        torch.testing.assert_close(found[:, :VOCAB], expected, rtol=1e-4, atol=2e-5)
        tokens = expected.argmax(1)
        if number == 20:
            kept = torch.tensor([4, 0, 2, 0])
            plain.select(kept)
            steps.select(kept)
            tokens = tokens[kept]
        expected, found = plain.step(tokens), steps.step(tokens)


@torch.no_grad()
@by_kernels
@pytest.mark.parametrize("window", [None, 11])
def test_tokens_that_are_read_together_have_the_bits_of_those_read_one_by_one(options, window, by_kernels):
    model, prompts = make_language_model(replace(options, window=window), by_kernels), texts(3, 5)
    prepared = Prepared(model, by_kernels=by_kernels)
    (_, together), (_, apart) = (start_texts(prepared, prompts, 90) for _ in range(2))
    tokens = torch.randint(3, VOCAB, (5, 7), generator=torch.Generator().manual_seed(2))
    one_by_one = torch.stack([apart.step(of_all) for of_all in tokens.T], 1)
    assert together.extend(tokens).equal(one_by_one)


def test_what_is_no_token_and_what_is_banned_never_comes(options):
    prepared = Prepared(make_translator(options), banned=(PAD, BOS))
    logits = prepared.logits(torch.randn(3, 24))
    assert logits[:, VOCAB:].eq(-torch.inf).all()
    assert logits[:, [PAD, BOS]].eq(-torch.inf).all()
    assert logits[:, EOS:VOCAB].isfinite().all()


@cache
def with_many_words(precision: str, *, has_bias: bool = False) -> Prepared:
    """Of a vocabulary whose logits are worth their quantised rows."""
    torch.manual_seed(0)
    model = Transformer(VOCAB, 5000, 32, 2, 4, 40, LONGEST, 0.0).eval()
    prepared = Prepared(model, precision, (PAD, BOS))
    assert precision != "int8" or "int8" in prepared.used
    prepared.has_bias = has_bias
    return prepared


@torch.inference_mode()
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_logits_in_parts_are_those_of_all_rows(precision, rows):
    prepared, hidden = with_many_words(precision), torch.randn(37, 32, generator=torch.Generator().manual_seed(1))
    parts = list(prepared.logits_in_parts(hidden, rows))
    assert [len(in_full(part)) for part in prepared.logits_in_parts(hidden, rows)] == [
        min(rows, 37 - first) for first in range(0, 37, rows)
    ]
    to_be_scaled = multiplies_int8() and precision in ("int8", "int4")
    assert all(isinstance(part, Scaled) == to_be_scaled for part in parts)
    assert torch.equal(torch.cat([in_full(part) for part in parts]), prepared.logits(hidden))


@pytest.mark.skipif(not multiplies_int8(), reason="whole numbers are scaled at once on this processor")
def test_a_search_over_logits_that_are_still_to_be_scaled_finds_what_one_over_all_of_them_does():
    sources, how = texts(5, 12), BeamSearch(beam=4, eos_ids=[EOS], nbest=4)
    scaled, full = (
        search(with_many_words("int8", has_bias=has_bias), sources, [20] * 12, how, BOS) for has_bias in (False, True)
    )
    assert [[text.ids for text in of_one] for of_one in scaled] == [[text.ids for text in of_one] for of_one in full]
    for ours, expected in zip(itertools.chain(*scaled), itertools.chain(*full), strict=True):
        assert ours.log_probs == pytest.approx(expected.log_probs, abs=5e-5)  # sums of 20 in fp32
        assert max(ours.log_probs) <= 0


# The likeliest tokens alone

IN_KERNELS = ["fp32", *["bf16"] * multiplies_tiles(), *["int8"] * multiplies_bytes()]


@needs_compiler
@pytest.mark.parametrize("precision", IN_KERNELS)
@pytest.mark.parametrize("beam", [1, 4])
def test_a_search_by_kernels_finds_what_one_by_operations_does(precision, beam, monkeypatch):
    monkeypatch.setattr(packed, "SMALL", 0)  # for kernels no projection is too small for whole numbers
    sources, how = texts(5, 12), BeamSearch(beam=beam, eos_ids=[EOS], nbest=beam)
    model = with_powers(20.0)  # of unlike logits, which rounding does not exchange
    ours, others = (Prepared(model, precision, (PAD, BOS), by_kernels=by_kernels) for by_kernels in (True, False))
    assert ours.top is not None
    assert others.top is None
    found, expected = (search(one, sources, [20] * 12, how, BOS) for one in (ours, others))
    alike, exact = 0, precision == "fp32"
    for one, other in zip(found, expected, strict=True):
        alike += (same := [text.ids for text in one] == [text.ids for text in other])
        if same:
            for text, as_known in zip(one, other, strict=True):
                assert text.log_probs == pytest.approx(as_known.log_probs, abs=1e-3 if exact else 0.5)
    assert alike == 12 if exact else alike > 6


@needs_compiler
@pytest.mark.parametrize("scored", [True, False])
def test_greedy_search_by_kernels_tells_log_p_where_it_is_wanted(scored):
    prepared = Prepared(with_powers(), "fp32", (PAD, BOS), by_kernels=True)
    how = BeamSearch(beam=1, eos_ids=[EOS], scored=scored)
    ruled = replace(how, banned=[3], scored=True)  # which wants all logits
    for [text], [other] in zip(
        *(search(prepared, texts(5, 9), [12] * 9, one, BOS) for one in (how, ruled)), strict=True
    ):
        assert all(map(math.isnan, text.log_probs)) != scored
        if scored and 3 not in text.ids:
            assert text.ids == other.ids
            assert 3 not in other.ids


# Powers in the place of logits


def with_powers(scale: float = 1.0) -> Transformer:
    """Its projection has no bias, which powers would round."""
    torch.manual_seed(0)
    model = Transformer(VOCAB, 5000, 32, 2, 4, 40, LONGEST, 0.0, options=BlockOptions(output_bias=False)).eval()
    with torch.no_grad():
        model.projection.weight.mul_(scale)
    return model


SCALES = 15.0, 200.0


def prepared_for_powers(scale: float, precision: str = "bf16", by_kernels: bool = False) -> Prepared:
    return Prepared(with_powers(scale), precision, (PAD, BOS), by_kernels=by_kernels)


needs_onednn = pytest.mark.skipif(not has_onednn(), reason="PyTorch was built without oneDNN")


@needs_onednn
@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 8, 40])
def test_powers_in_parts_are_those_of_the_logits(rows):
    prepared = Prepared(model := with_powers(), "bf16", (PAD, BOS))
    hidden = torch.randn(37, 32, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    parts = list(prepared.powers_in_parts(hidden, rows))
    assert [len(part) for part in parts] == [min(rows, 37 - first) for first in range(0, 37, rows)]
    powers, real = torch.cat([part.values for part in parts]).float(), slice(BOS + 1, 5000)
    exact = hidden @ model.projection.weight.bfloat16().float().T  # which `logits` rounds
    torch.testing.assert_close(powers[:, real].log() + SHIFT, exact[:, real], rtol=0, atol=4.1e-3)
    assert powers[:, prepared.never].eq(0).all()
    some = torch.tensor([0, len(parts[-1]) - 1])
    assert parts[-1].logits(some).equal(prepared.logits(hidden)[-len(parts[-1]) :][some])


@needs_onednn
@pytest.mark.parametrize("scale", SCALES)
def test_a_search_over_powers_finds_what_one_over_logits_in_fp32_does(scale):
    """Also where the powers of many rows are nothing that σ can give."""
    model, sources = with_powers(scale), texts(5, 12)
    how = BeamSearch(beam=4, eos_ids=[EOS], nbest=4)
    over_powers, over_logits = (Prepared(model, "bf16") for _ in range(2))
    over_logits.powers, over_logits.head = None, pack(*filled_up_projection(model.projection, []), "fp32")
    found, expected = (search(one, sources, [20] * 12, how, BOS) for one in (over_powers, over_logits))
    alike = 0
    for ours, others in zip(found, expected, strict=True):
        known = {tuple(one.ids): one.log_probs for one in others}
        for one in ours:
            assert max(one.log_probs) <= 0
            if tuple(one.ids) in known:
                alike += 1
                assert one.log_probs == pytest.approx(known[tuple(one.ids)], abs=0.02 * scale)
    assert alike > 36, alike  # of 48


def test_what_has_a_bias_or_other_numbers_gives_no_powers():
    assert Prepared(Transformer(VOCAB, 500, 32, 2, 4, 40, LONGEST, 0.0), "bf16").powers is None
    assert Prepared(with_powers(), "fp32").powers is None


# In any company

bits_alone = pytest.mark.usefixtures("without_shape_checks")
"""For searches by the hundred, most of whose time the checks would take; one of each kind is checked."""

CONFIGS = {
    "pre-rms-rotary": {"norm_order": "pre", "norm": "rms", "positions": "rotary", "bias": False},
    "post-learned-grouped": {"positions": "learned", "num_kv_heads": 2},
    "experts": {"activation": "gelu", "experts": {"num_experts": 5, "d_ff": 11, "router": "sigmoid", "shared": 1}},
    "t5": {
        "norm_order": "pre", "norm": "rms", "positions": "relative", "relative_buckets": 12, "relative_distance": 20,
        "activation": "geglu_tanh", "bias": False, "head_dim": 7, "scale_attention": False, "scale_output": True,
    },
    "qwen3-window": {
        "norm_order": "pre", "norm": "rms", "positions": "rotary", "activation": "swiglu", "num_kv_heads": 2,
        "bias": False, "qkv_bias": True, "head_dim": 8, "qk_norm": "head", "window": 11,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_position": 31},
        "experts": {"num_experts": 5, "d_ff": 11},
    },
    "norms-of-width": {
        "norm_order": "pre", "positions": "rotary", "qk_norm": "width", "activation": "silu", "window": 40
    },
    "bart": {"positions": "learned", "embedding_norm": True, "activation": "gelu_tanh", "qk_norm": "head"},
}  # fmt: skip


@cache
def prepared_models(name: str, precision: str, by_kernels: bool = False):
    from triglot.config import BlockOptions
    from triglot.recipe import from_dict

    options = from_dict(BlockOptions, CONFIGS[name])
    models = make_translator(options), make_language_model(options, by_kernels)
    return [Prepared(model, precision, (PAD, BOS), by_kernels=by_kernels) for model in models]


def translations(name, precision, sources: list[list[int]], beam, limits: list[int], places, by_kernels=False):
    prepared, _ = prepared_models(name, precision, by_kernels)
    how = BeamSearch(beam=beam, eos_ids=[EOS], nbest=beam)
    return search(prepared, sources, limits, how, BOS, places)


@torch.no_grad()
def continuations(name, precision, prompts: list[list[int]], seeds: list[int], limits: list[int], sampler, by_kernels):
    _, prepared = prepared_models(name, precision, by_kernels)
    first, steps = start_texts(prepared, prompts, LONGEST)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generate(first, steps, sampler, limits, eos_ids=[EOS], generator=generators)


FOR_POWERS = [partial(prepared_for_powers, scale) for scale in SCALES]
FOR_KERNELS = [
    partial(prepared_for_powers, scale, precision, by_kernels=True)
    for scale in SCALES
    for precision in IN_KERNELS
    if True in KERNELS
]
requests = st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 40)), min_size=1, max_size=9)


@bits_alone
@settings(deadline=None, max_examples=40)
@given(requests, st.randoms(use_true_random=False), st.sampled_from(sorted(CONFIGS)), st.sampled_from(PRECISIONS),
       st.sampled_from([1, 2, 5]), st.integers(1, 9), st.sampled_from(KERNELS))  # fmt: skip
@example([(230, 24), (102, 19), (104, 24), (349, 10), (779, 24)], random.Random(0), "experts", "fp32", 1, 5, False)
def test_a_translation_is_the_same_bits_in_any_company(asked, draw, name, precision, beam, places, by_kernels):
    sources, limits = [texts(seed, 1)[0] for seed, _ in asked], [limit for _, limit in asked]
    find = partial(translations, name, precision, beam=beam, by_kernels=by_kernels)
    alone = [find([ids], limits=[limit], places=1)[0] for ids, limit in zip(sources, limits, strict=True)]
    order = draw.sample(range(len(asked)), len(asked))
    mixed = find([sources[row] for row in order], limits=[limits[row] for row in order], places=places)
    assert mixed == [alone[row] for row in order]


@pytest.mark.parametrize(
    ("precision", "by_kernels"),
    [(precision, False) for precision in PRECISIONS] + [(precision, True) for precision in IN_KERNELS if HAS_COMPILER],
)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_searches_of_unlike_texts_keep_to_the_shapes_that_are_named(name, precision, by_kernels):
    given_texts, limits = [texts(seed, 1)[0] for seed in range(5)], [3, 20, 1, 9, 6]
    for beam in (1, 3):
        found = translations(name, precision, given_texts, beam, limits, 2, by_kernels)
        assert all(len(of_one[0].ids) <= limit for of_one, limit in zip(found, limits, strict=True))
    for sampler in (Sampler(temperature=0.0), Sampler(top_k=7, top_p=0.9)):
        written = continuations(name, precision, given_texts, list(range(5)), limits, sampler, by_kernels)
        assert all(len(one.ids) <= limit for one, limit in zip(written, limits, strict=True))


@bits_alone
@settings(deadline=None, max_examples=20)
@given(
    requests,
    st.randoms(use_true_random=False),
    st.sampled_from([partial(with_many_words, "int8"), *FOR_POWERS, *FOR_KERNELS]),
    st.sampled_from([1, 2, 5]),
    st.integers(1, 9),
)
def test_a_translation_of_many_words_is_the_same_bits_in_any_company(asked, draw, make, beam, places):
    """In whole numbers, by powers, and by kernels."""
    prepared, how = make(), BeamSearch(beam=beam, eos_ids=[EOS], nbest=beam, patience=1.0)
    sources, limits = [texts(seed, 1)[0] for seed, _ in asked], [limit for _, limit in asked]
    asked_alone = zip(sources, limits, strict=True)
    alone = [search(prepared, [ids], [limit], how, BOS)[0] for ids, limit in asked_alone]
    order = draw.sample(range(len(asked)), len(asked))
    mixed = search(prepared, [sources[row] for row in order], [limits[row] for row in order], how, BOS, places)
    assert mixed == [alone[row] for row in order]


@bits_alone
@settings(deadline=None, max_examples=40)
@given(requests, st.randoms(use_true_random=False), st.sampled_from(sorted(CONFIGS)), st.sampled_from(PRECISIONS),
       st.sampled_from([Sampler(), Sampler(temperature=0.0), Sampler(top_k=7, top_p=0.9)]),
       st.sampled_from(KERNELS))  # fmt: skip
def test_a_continuation_is_the_same_bits_in_any_company(asked, draw, name, precision, sampler, by_kernels):
    find = partial(continuations, name, precision, sampler=sampler, by_kernels=by_kernels)
    prompts, seeds, limits = [texts(seed, 1)[0] for seed, _ in asked], *map(list, zip(*asked, strict=True))
    rows = range(len(asked))
    alone = [find([prompts[r]], [seeds[r]], [limits[r]])[0] for r in rows]
    order = draw.sample(rows, len(asked))
    mixed = find(*([of_all[r] for r in order] for of_all in (prompts, seeds, limits)))
    assert mixed == [alone[row] for row in order]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_kept_rows_are_those_that_indexing_takes(rows):
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(keep_rows(x.clone(), 1, torch.tensor(rows)), x[:, rows])


@pytest.mark.skipif(not multiplies_int8(), reason="whole numbers are scaled at once on this processor")
@pytest.mark.parametrize("scored", [True, False])
def test_greedy_search_over_logits_that_are_still_to_be_scaled_finds_what_one_over_all_of_them_does(scored):
    sources, how = texts(6, 12), BeamSearch(beam=1, eos_ids=[EOS], patience=1.0, scored=scored)
    scaled, full = (
        search(with_many_words("int8", has_bias=has_bias), sources, [20] * 12, how, BOS) for has_bias in (False, True)
    )
    assert [text.ids for [text] in scaled] == [text.ids for [text] in full]
    assert all(len(text.ids) == 20 or text.ids[-1] == EOS for [text] in scaled)
