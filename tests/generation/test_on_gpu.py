"""What is written on a GPU: what a processor writes, and the same bits in any company; without one this is left out."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import WARNS_OF_ITSELF
from triglot.decoding.rules import RepetitionPenalty, Within
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate
from triglot.generation.captured import Captured, start_captured
from triglot.generation.engine import Engine
from triglot.generation.token_reader import read_block
from triglot.models.decoder_only import DecoderLLM

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
    pytest.mark.usefixtures("without_shape_checks"),
    *WARNS_OF_ITSELF,
]


def on_gpu(engine, **options) -> Engine:
    model = copy.deepcopy(engine.model).cuda()
    return Engine(model, engine.config, engine.tokenizers, **options)


TEXTS = ["a b", "", "zz", "a b", "Grüße"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"seed": 3, "n": 2}, {"seed": 1, "top_k": 9, "top_logprobs": 2}]
)
def test_a_text_becomes_there_what_it_does_here(make, compiled, options):
    if compiled and hasattr(read_block, "__wrapped__"):
        pytest.skip("the compiler traces no function that checks shapes: run this without --jaxtyping-packages")
    engine = make("decoder_only")
    here = engine.generate(TEXTS, **options)
    there = on_gpu(engine, compiled=compiled).generate(TEXTS, **options)
    assert [one.text for one in there] == [one.text for one in here]
    for one, other in zip(there, here, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)


def test_experts_write_there_what_they_do_here(make):
    engine = make("decoder_only", options={"norm_order": "pre", "experts": {"num_experts": 5, "top_k": 2}})
    here, there = (one.generate(TEXTS, temperature=0.0) for one in (engine, on_gpu(engine)))
    assert [one.text for one in there] == [one.text for one in here]


def test_a_line_becomes_there_what_it_does_here(make):
    engine = make("encoder_decoder")
    here, there = (one.translate(TEXTS, beam=4, nbest=2) for one in (engine, on_gpu(engine)))
    for one, other in zip(here, there, strict=True):
        assert [each.text for each in one] == [each.text for each in other]
        assert [each.score for each in one] == pytest.approx([each.score for each in other], abs=1e-3)


def test_scores_are_those_of_a_processor(make):
    writer, translator = make("decoder_only"), make("encoder_decoder")
    for engine, texts in ((writer, (TEXTS,)), (translator, (TEXTS, TEXTS[::-1]))):
        here, there = (one.score(*texts) for one in (engine, on_gpu(engine)))
        assert [one.log_prob for one in there] == pytest.approx([one.log_prob for one in here], abs=1e-3)


def test_a_stream_says_there_what_generate_does(make):
    engine = on_gpu(make("decoder_only"))
    [text] = engine.generate(["a"], seed=4)
    assert "".join(engine.stream("a", seed=4)) == text.text


samplings = st.fixed_dictionaries(
    {"past_context": st.just("slide"), "max_new_tokens": st.integers(1, 60)},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0]),
        "top_k": st.integers(1, 300),
        "top_p": st.floats(0.1, 1.0),
        "typical_p": st.floats(0.1, 1.0),
        "repetition_penalty": st.floats(0.5, 2.0),
        "stop": st.lists(st.text(min_size=1, max_size=2), max_size=3),
        "top_logprobs": st.integers(0, 3),
    },
)


@pytest.fixture(scope="module")
def gpu_writer(make):
    return on_gpu(make("decoder_only"))


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_text_is_the_same_bits_in_any_company_there_too(gpu_writer, data):
    options = data.draw(samplings)
    asked = data.draw(
        st.lists(st.tuples(st.text("abcde .ü€", max_size=50), st.integers(0, 99)), min_size=1, max_size=40)
    )
    together = gpu_writer.generate([one for one, _ in asked], seed=[seed for _, seed in asked], **options)
    for number in data.draw(st.lists(st.integers(0, len(asked) - 1), max_size=4, unique=True)):
        prompt, seed = asked[number]
        assert gpu_writer.generate([prompt], seed=seed, **options) == [together[number]]


@pytest.mark.parametrize("rules", [(), (RepetitionPenalty(1.3, [[]] * 30),)], ids=["", "rules"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_large_products_have_the_same_bits_in_any_company(dtype, rules):
    """Shapes at which libraries choose among many kernels."""
    torch.manual_seed(0)
    model = DecoderLLM(50_257, 768, 12, 3, 3072, 512, dropout=0.0).eval().cuda().to(dtype)
    own, prompts = Captured(model), [torch.randint(50_257, (length,)).tolist() for length in range(1, 60, 2)]
    sampler, mosts = Sampler(temperature=0.8), [len(one) + 20 for one in prompts]

    def texts(numbers):
        draws = [torch.Generator().manual_seed(number) for number in numbers]
        started = start_captured(own, [prompts[at] for at in numbers], [mosts[at] for at in numbers])
        own_rules = [Within(rule, numbers) for rule in rules]
        return generate(*started, sampler, 20, generator=draws, rules=own_rules)

    together = texts(range(len(prompts)))
    for number in (0, 7, 16, 29):
        assert texts([number]) == [together[number]]
    assert texts([29, 3]) == [together[29], together[3]]
