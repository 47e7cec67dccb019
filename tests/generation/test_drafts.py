"""Guesses change how fast a text comes, never the text, whatever else is asked of it."""

import pytest
import torch

from triglot.errors import ConfigError
from triglot.generation.drafts import ModelDraft
from triglot.generation.engine import Engine
from triglot.generation.ready import Ready
from triglot.generation.steps import start_texts
from triglot.tokenizer import Tokenizer

PROMPTS = ["", "To be", "ü", "a longer prompt, to be sure", "x"]


@pytest.fixture(scope="module")
def guessing(make, writer):
    """The writer with a draft model that is nearly right, and one that looks up n-grams."""
    other = make("decoder_only")
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else 0)
    draft = Ready(other.model, other.config, other.tokenizers)
    return {"model": Engine(writer.model, writer.config, writer.tokenizers, draft=draft), "lookup": writer}


@pytest.mark.parametrize("by", ["model", "lookup"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "past_context": "slide", "max_new_tokens": 60},
        {"temperature": 1.3, "top_k": 20, "n": 2, "top_logprobs": 3},
        {"temperature": 0.5, "stop": ["e", "ab"], "no_repeat_ngram": 2, "min_new_tokens": 4, "banned_words": ["a"]},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {50: 3.0}},
    ],
)
def test_a_text_is_the_same_with_guesses(guessing, writer, by, options):
    for count in (1, 4):
        assert guessing[by].generate(PROMPTS, seed=3, speculate=count, **options) == writer.generate(
            PROMPTS, seed=3, **options
        )


def test_a_stream_is_the_same_with_guesses(guessing, writer):
    for engine in guessing.values():
        assert list(engine.stream("To be", speculate=3, stop=["q"])) == list(writer.stream("To be", stop=["q"]))


def test_a_draft_model_guesses_its_own_greedy_text_whatever_it_was_asked_before(writer):
    draft = ModelDraft(writer._ready.prepared)
    draw = torch.Generator().manual_seed(1)
    text = [5, 6, 7]
    for _ in range(12):
        count = int(torch.randint(1, 5, (), generator=draw))
        guesses = draft(text, count)
        read = list(text)
        for guess in guesses:
            logits, _ = start_texts(writer._ready.prepared, [read], 37)
            assert guess == int(logits.argmax())
            read.append(guess)
        kept = int(torch.randint(0, count + 1, (), generator=draw))
        text = [*text, *guesses[:kept], 9][-20:]
    longer = torch.randint(3, 90, (50,), generator=draw).tolist()
    assert draft(longer, 3) == ModelDraft(writer._ready.prepared)(longer[-18:], 3)


def test_what_can_not_guess_is_refused(make, writer):
    other = make("decoder_only", tokenizer=Tokenizer.train("char", ["abc"]))
    with pytest.raises(ConfigError, match="`the draft's vocabulary` must be the model's own tokens"):
        Engine(
            writer.model,
            writer.config,
            writer.tokenizers,
            draft=Ready(other.model, other.config, other.tokenizers),
        )
    half = make("decoder_only")
    half.model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match="`speculate` must be 0 unless .* in fp32, but is 3 instead"):
        Engine(half.model, half.config, half.tokenizers).generate(["a"], speculate=3)
    with pytest.raises(ConfigError, match="`speculate` must be at least 0, but is -1 instead"):
        writer.generate(["a"], speculate=-1)
