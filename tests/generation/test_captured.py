"""A captured step computes what the model does, of texts in any places; here it is not captured, which takes a GPU."""

import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import VARIANTS
from triglot.config import BlockOptions
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import ScoredSteps, Steps, generate
from triglot.generation.captured import HELD, KEPT, SLOTS, Captured, can_be_captured, start_captured
from triglot.generation.engine import Engine
from triglot.models.decoder_only import DecoderLLM
from triglot.recipe import from_dict

VOCAB, LONGEST = 60, 97
PROMPTS = [[7], [5, 9, 3], list(range(3, 40)), [5, 9, 3]]
DENSE = [name for name, values in VARIANTS.items() if "experts" not in values]

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # places are Tensor or slice, by what they are


def make_model(options=None) -> DecoderLLM:
    torch.manual_seed(0)
    options = options or from_dict(BlockOptions, VARIANTS["qwen3"])
    model = DecoderLLM(VOCAB, 24, 4, 3, 40, LONGEST, options=options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6 if weight.dim() > 1 else 1)
    return model


def started(model, prompts, most=LONGEST):
    """What the model itself knows after prompts, and what goes on."""
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in prompts], batch_first=True)
    return model.start(rows, torch.tensor([len(one) for one in prompts]), most - rows.size(1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("variant", DENSE)
@torch.no_grad()
def test_a_captured_step_is_the_models_own(variant, window, compiled, monkeypatch):
    model = make_model(from_dict(BlockOptions, VARIANTS[variant] | {"window": window}))
    monkeypatch.setattr(torch, "compile", lambda work, **options: work)  # which another test does
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected, plain = started(model, PROMPTS)
    first, steps = start_captured(Captured(model, [3], compiled=compiled), PROMPTS, [LONGEST] * 4)
    for token in (None, 8, 2, 4, 8):
        found, plainly = (first, expected) if token is None else (
            one.step(torch.full((4,), token)) for one in (steps, plain)
        )  # fmt: skip
        plainly[:, 3] = -torch.inf
        torch.testing.assert_close(found.logits[:, :VOCAB], plainly)
        torch.testing.assert_close(found.normaliser, plainly.logsumexp(1, keepdim=True))
        assert found.logits[:, VOCAB:].eq(-torch.inf).all()
        assert found.best.equal(plainly.argmax(1))
    for name, weight in model.state_dict().items():
        assert weight.equal(before[name]), name


COMPILED = """
import torch
from functools import partial
from triglot.config import BlockOptions
from triglot.generation.captured import Captured, start_captured
from triglot.models.decoder_only import DecoderLLM

graphs = []

def backend(graph, inputs, **_):
    graphs.append(graph)
    return graph.forward

torch.compile = partial(torch.compile, backend=backend)
options = BlockOptions(norm="rms", norm_order="pre", positions="rotary", activation="swiglu", num_kv_heads=2)
model = DecoderLLM(60, 24, 4, 3, 40, 97, options=options).eval()
with torch.no_grad():
    (first, steps), (expected, plain) = (
        start_captured(Captured(model, compiled=compiled), [[7], [5, 9, 3]], [64, 64]) for compiled in (True, False)
    )
    torch.testing.assert_close(first.logits, expected.logits)
    tokens = torch.tensor([1, 2])
    torch.testing.assert_close(steps.step(tokens).logits, plain.step(tokens).logits)
assert len(graphs) == 2, len(graphs)  # a block, and what follows the last
"""


def test_blocks_of_one_shape_share_what_is_compiled():
    """In a process of its own, since the compiler traces no function that checks shapes."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=100)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_texts_may_be_dropped_moved_and_repeated(data):
    model = make_model()
    with torch.no_grad():
        _, plain = started(model, PROMPTS)
        _, steps = start_captured(Captured(model), PROMPTS, [len(one) + 20 for one in PROMPTS])
        rows = len(PROMPTS)
        for _ in range(5):
            kept = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=SLOTS + 2)))
            rows, tokens = len(kept), torch.arange(len(kept))
            for one in (plain, steps):
                one.select(kept)
            torch.testing.assert_close(steps.step(tokens).logits[:, :VOCAB], plain.step(tokens))


@torch.no_grad()
def test_a_text_has_the_same_bits_in_any_company_and_any_place():
    model = make_model()
    own = Captured(model)
    prompts = [torch.randint(VOCAB, (length,)).tolist() for length in range(1, 2 * SLOTS + 5)]
    mosts = [min(LONGEST, 3 * len(one) + 9) for one in prompts]
    for order in (range(len(prompts)), torch.randperm(len(prompts)).tolist()):
        first, steps = start_captured(own, [prompts[at] for at in order], [mosts[at] for at in order])
        fed = torch.tensor([at % VOCAB for at in order])
        together = [first.logits.clone(), steps.step(fed).logits.clone()]
        for row, at in enumerate(order):
            alone, step = start_captured(own, [prompts[at]], [mosts[at]])
            assert alone.logits[0].equal(together[0][row])
            assert step.step(fed[row, None]).logits[0].equal(together[1][row])


class Nobody:
    """Who is gone at once."""


def test_a_room_is_used_again_once_its_texts_are_gone_and_few_are_kept():
    own = Captured(make_model())
    _, steps = start_captured(own, PROMPTS, [64] * 4)
    _, others = start_captured(own, PROMPTS, [64] * 4)
    first, second = own.rooms
    del steps
    gc.collect()
    start_captured(own, PROMPTS, [64] * 4)
    assert own.rooms == [second, first]
    for capacity in (128, 256, 512, 1024, 2048):
        own.room(SLOTS, SLOTS, capacity, Nobody())
    start_captured(own, PROMPTS, [64] * 4)
    assert first in own.rooms  # the last that was used
    assert second in own.rooms  # somebody is in it
    assert len(own.rooms) == 2 + KEPT
    assert others.at[0][0] is second


def test_rooms_that_nobody_is_in_make_way_where_memory_ends(monkeypatch):
    own = Captured(make_model())
    here = Nobody()
    kept, idle = own.room(SLOTS, SLOTS, 64, here), weakref.ref(own.room(SLOTS, SLOTS, 64, Nobody()))
    make, begun = own._made, list[weakref.ref]()
    kept.launch = idle().launch = None  # which refer to their rooms where nothing is captured

    def scarce(*size):
        assert not any(one() for one in begun)  # what was begun in vain is gone
        room = make(*size)
        room.launch = None
        begun.append(weakref.ref(room))
        if idle() is not None:
            raise torch.OutOfMemoryError
        return room

    monkeypatch.setattr(own, "_made", scarce)
    made = own.room(SLOTS, SLOTS, 128, here)
    assert own.rooms == [kept, made]
    assert [one() for one in begun] == [None, made]


def test_a_model_that_has_written_can_be_trained_on(make, monkeypatch):
    monkeypatch.setattr("triglot.generation.ready.can_be_captured", lambda model: True)
    engine = make("decoder_only")
    engine.generate(["a"])
    assert engine._ready.captured.rooms
    tokens = torch.randint(engine.model.vocab_size, (2, 5))
    engine.model.train()(tokens, tokens).loss.backward()


@torch.no_grad()
def test_what_fills_a_room_up_goes_on_to_its_end_and_no_further():
    model = make_model()
    _, steps = start_captured(Captured(model), [[5]], [LONGEST])
    _, plain = started(model, [[5]])
    for token in range(LONGEST - 1):
        found, expected = (one.step(torch.tensor([token % VOCAB])) for one in (steps, plain))
    torch.testing.assert_close(found.logits[:, :VOCAB], expected)
    steps.step(torch.tensor([1]))  # of a row that has ended, which nobody looks at
    assert steps.at[0][0].ends.max() == LONGEST - 1


def test_an_engine_writes_by_captured_steps_what_it_writes_without(make, monkeypatch):
    engine = make("decoder_only")
    texts = ["a b", "", "zz", "a b"]
    for options in ({"temperature": 0.0}, {"seed": 3, "n": 2}, {"past_context": "slide", "max_new_tokens": 60}):
        plain = engine.generate(texts, **options)
        steps = []

        def start(*given, kept=steps):
            found = start_captured(*given)
            kept.append(found[1])
            return found

        with monkeypatch.context() as patch:
            patch.setattr("triglot.generation.texts.start_captured", start)
            own = Captured(engine.model, engine._ready._never)
            patch.setitem(engine._ready.__dict__, "captured", own)
            found = engine.generate(texts, **options)
        assert steps
        assert [one.tokens for one in found] == [one.tokens for one in plain]
        for one, other in zip(found, plain, strict=True):
            assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_what_cannot_be_captured_is_known(make, monkeypatch):
    dense, sparse = make_model(), make_model(from_dict(BlockOptions, VARIANTS["experts"]))
    assert not can_be_captured(dense)
    monkeypatch.setattr(type(dense.lm_head.weight), "is_cuda", True)
    assert can_be_captured(dense)
    assert not can_be_captured(sparse)
    assert not can_be_captured(make("encoder_decoder").model)


def test_a_model_in_training_is_left_as_it_is(make, monkeypatch):
    engine = make("decoder_only")
    monkeypatch.setattr("triglot.generation.ready.can_be_captured", lambda model: True)
    made = [Engine(engine.model, engine.config, engine.tokenizers, in_training=one) for one in (False, True)]
    assert [one._ready.captured is None for one in made] == [False, True]


@given(texts=st.integers(1, SLOTS))
def test_places_with_memory_are_as_many_as_texts_or_more_and_few_numbers(texts):
    own = Captured.__new__(Captured)
    for own.compiled, has_kernel, numbers in ((False, True, HELD), (False, False, [SLOTS]), (True, True, (1, 8, 64))):
        own.reader = SimpleNamespace(has_kernel=has_kernel)
        assert texts <= own.held(texts) <= own.slots(texts)
        assert own.held(texts) in numbers


@pytest.mark.parametrize("compiled", [False, True])
@given(most=st.integers(1, 5000), texts=st.integers(1, 200))
def test_a_room_is_large_enough_and_of_few_sizes(compiled, most, texts):
    own = Captured.__new__(Captured)
    own.compiled, own.model = compiled, SimpleNamespace(max_seq_length=5000)
    assert most <= own.capacity(most) <= min(5000, max(256, 4 * most) if compiled else most + 255)
    assert own.slots(texts) == SLOTS if not compiled else own.slots(texts) >= min(texts, 64)
    assert (own.slots(1) == 1) == compiled


def test_the_steps_are_what_a_search_takes():
    first, steps = start_captured(Captured(make_model()), PROMPTS, [LONGEST] * 4)
    assert isinstance(steps, Steps)
    assert isinstance(steps, ScoredSteps)
    assert steps.ahead
    texts = generate(first, steps, Sampler(temperature=0.0), [3, 1, 4, 2])
    assert [len(text.ids) for text in texts] == [3, 1, 4, 2]
