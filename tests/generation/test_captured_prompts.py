"""Prompts are read as the model reads them, and by default each as if alone; here nothing is captured."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.generation import captured_prompts
from triglot.generation.captured_prompts import UNIT, PromptReader
from triglot.models.decoder_only import DecoderLLM

VOCAB, LONGEST = 60, 2 * UNIT + 9
pytestmark = pytest.mark.usefixtures("without_shape_checks")
some_prompts = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=LONGEST), min_size=1, max_size=9)


def make_model() -> DecoderLLM:
    torch.manual_seed(0)
    return DecoderLLM(VOCAB, 24, 4, 2, 40, LONGEST).eval()


MODEL = make_model()


@pytest.mark.parametrize("batches", [None, (1, 3)], ids=["default", "together"])
@settings(deadline=None, max_examples=20)
@given(prompts=some_prompts)
@torch.no_grad()
def test_each_prompt_is_read_as_the_model_reads_it(batches, prompts):
    read = PromptReader(MODEL, batches)
    for _ in range(2):  # what a pass has kept of the prompts before changes nothing
        for prompt, found in zip(prompts, read(prompts), strict=True):
            cache = MODEL.start_cache(1, len(prompt))
            if prompt:
                MODEL.run(torch.tensor([prompt]), cache=cache)
            torch.testing.assert_close(found[0], cache.keys[:, 0])
            torch.testing.assert_close(found[1], cache.values[:, 0])
        prompts = prompts[::-1]


@settings(deadline=None, max_examples=20)
@given(prompts=some_prompts, data=st.data())
@torch.no_grad()
def test_by_default_a_prompt_has_the_same_bits_in_any_company(prompts, data):
    read = PromptReader(MODEL)
    together = read(prompts)
    which = data.draw(st.integers(0, len(prompts) - 1))
    [alone] = read([prompts[which]])
    assert alone.equal(together[which])


def test_short_prompts_of_few_widths_are_captured_and_large_passes_are_not(monkeypatch):
    asked = []

    class Noted(captured_prompts.Pass):
        def __init__(self, model, rows, width, *, capture):
            asked.append((rows, width, capture))
            super().__init__(model, rows, width, capture=capture)

    monkeypatch.setattr(captured_prompts, "Pass", Noted)
    monkeypatch.setattr(captured_prompts, "SHORT", 2 * UNIT)
    read = PromptReader(MODEL)
    for _ in range(2):
        read([[1] * length for length in (3, UNIT, UNIT, UNIT + 1, 2 * UNIT + 1, LONGEST)])
    longer = (1, LONGEST, False)
    assert asked == [(2, UNIT, True), (1, 2 * UNIT, True), longer, longer, longer, longer]
    asked.clear()
    monkeypatch.setattr(captured_prompts, "CAPTURED", 3 * UNIT)
    read = PromptReader(MODEL, (1, 3))
    read([[1], [2], [3], [4], [1] * (2 * UNIT), [2] * (2 * UNIT)])
    assert asked == [(3, UNIT, True), (2, 2 * UNIT, False)]
