"""Compiled code computes what the model computes, of one text as of several, and is compiled once."""

import platform
import shutil
import subprocess
import zipfile
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree

from tests.conftest import HAS_COMPILER, WARNS_OF_ITSELF, needs_compiler
from triglot.config import BlockOptions, ExpertOptions
from triglot.decoding.logits import Scored
from triglot.decoding.sampling import Sampler
from triglot.decoding.search import generate
from triglot.errors import ConfigError
from triglot.generation import aot, compiled
from triglot.generation.compiled import Compiled, start_compiled
from triglot.generation.int4 import called_by_compiled_code
from triglot.generation.one_token import Head, WholeLinear, row_linear
from triglot.generation.prepared import Prepared
from triglot.generation.ready import Ready
from triglot.generation.steps import start_texts
from triglot.models.decoder_only import DecoderLLM

VOCAB, LONGEST = 60, 97
PROMPTS = [[7], [5, 9, 3], list(range(3, 40))]
LLAMA = BlockOptions(norm="rms", norm_order="pre", positions="rotary", activation="swiglu", num_kv_heads=2, bias=False)
TOLERANCE = {"fp32": 2e-5, "bf16": 0.05, "int8": 0.05, "int4": 0.4}

pytestmark = [
    pytest.mark.usefixtures("without_shape_checks"),  # which the compiler cannot trace
    *WARNS_OF_ITSELF,
]


def make_model(options=LLAMA) -> DecoderLLM:
    torch.manual_seed(0)
    return DecoderLLM(VOCAB, 24, 4, 3, 40, LONGEST, options=options).eval()


def interpreted(module, inputs, dynamic, grain=None, program=None):
    """What `compile_module` compiles, or a `program` that it would compile, as PyTorch runs it."""
    leaves, structure = _pytree.tree_flatten((inputs, list(aot.state_of(module).values())))
    program = program or aot.Stateless(module)

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        rest = iter(tensors)
        filled = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        with torch.no_grad():
            return _pytree.tree_leaves(program(*_pytree.tree_unflatten(filled, structure)))

    return run


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "compile_module", interpreted)


def keep_code_in(folder, patch):
    """Compile anew, by the same script, for which PyTorch's headers are compiled once."""
    kept = aot.kept

    def kept_here(program, suffix):
        path = kept(program, suffix)
        return folder / path.name if suffix == ".pt2" else path

    patch.setattr(aot, "kept", kept_here)


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Compiles into a folder of its own."""
    if not HAS_COMPILER:
        pytest.skip("there is no C++ compiler here")
    with pytest.MonkeyPatch.context() as patch:
        keep_code_in(tmp_path_factory.mktemp("code"), patch)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)  # who could share a sum
        yield
        torch.set_num_threads(threads)


def logits_of(model, fed, prompts=PROMPTS, together=None):
    """After each of the tokens that follow all prompts, beside those of the prepared model."""
    prepared, made = Prepared(model), Compiled(model, "fp32")
    if together is not None:  # uncompiled code takes sums as it likes
        made.together = together
    _, steps = start_compiled(made, prepared, prompts, LONGEST)
    _, plain = start_texts(prepared, prompts, LONGEST)
    for token in fed:
        tokens = torch.full((len(prompts),), token)
        yield steps.step(tokens).logits, plain.step(tokens)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("together", [1, compiled.TOGETHER])
def test_tokens_are_read_as_the_model_reads_them(options, together):
    options = replace(options, window=5)
    for found, expected in logits_of(make_model(options), [4, 8, 15, 16, 23, 42], together=together):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


EXPERTS = ExpertOptions(num_experts=5, top_k=2, router="sigmoid", shared=1, every=2)


@pytest.mark.parametrize(
    "changes", [{"positions": "relative", "qk_norm": "head", "num_kv_heads": None}, {"experts": EXPERTS}]
)
@pytest.mark.parametrize("prompts", [PROMPTS[1:2], PROMPTS[1:]])
def test_what_is_exported_takes_texts_of_any_length(prompts, changes, monkeypatch):
    options = replace(LLAMA, **changes)

    def of_program(module, inputs, dynamic, grain):
        return interpreted(module, inputs, dynamic, grain, aot.exported(module, inputs, dynamic).module())

    monkeypatch.setattr(compiled, "compile_module", of_program)
    # A program's guards want two tokens before.
    for found, expected in logits_of(make_model(options), [4, 8], prompts, compiled.TOGETHER):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("precision", "inputs"), [(one, 64 if one == "int4" else 37) for one in TOLERANCE])
@needs_compiler
def test_rows_are_multiplied_as_a_linear_layer_does_it(precision, inputs, rows):
    torch.manual_seed(1)
    layer, x = torch.nn.Linear(inputs, 51), torch.randn(rows, 1, inputs)
    found = row_linear(layer.weight, layer.bias, precision)(x)
    torch.testing.assert_close(found, layer(x), rtol=0, atol=TOLERANCE[precision])


@given(st.sampled_from([1, 37, 600, 20_000]), st.booleans(), st.integers(0, 99))
def test_whole_rows_err_by_half_a_step_and_no_sum_of_them_is_too_large(inputs, equal, seed):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.full((3, inputs), -0.2) if equal else torch.randn(3, inputs, generator=draw)
    x = torch.full((2, 1, inputs), 7.0) if equal else torch.randn(2, 1, inputs, generator=draw)
    layer = WholeLinear(weight, None)
    rounded = layer.weight.double() * layer.scale[:, None].double()
    step = x.abs().amax(-1, keepdim=True) / layer.largest
    error = (layer(x) - x.double() @ rounded.T).abs()
    assert (error <= 0.51 * step * rounded.abs().sum(1)).all()
    assert 0 < layer.largest <= 2**15 - 1


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_knows_the_first_largest_logit_and_the_sum_of_many_blocks(tied):
    torch.manual_seed(2)
    model, x = DecoderLLM(300, 24, 4, 1, 40, LONGEST, options=LLAMA), torch.randn(5, 1, 24)
    if tied:
        torch.nn.init.zeros_(model.lm_head.weight)
    logits, best, normaliser = Head(model, "fp32", banned=[0, 7, 130])(x)
    assert best.tolist() == logits.argmax(1).tolist() == ([1] * 5 if tied else best.tolist())
    assert len({*(best // 128).tolist()}) > 1 or tied
    torch.testing.assert_close(normaliser, logits.logsumexp(1, keepdim=True))


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("norm", "layers", "precision"),
    [
        pytest.param("layer", 2, "fp32", marks=pytest.mark.slow),
        ("rms", 1, "int8"),
        ("rms", 1, "int4"),  # and of eight bits what four do not fit: the logits, and sums of 40
    ],
)
def test_compiled_code_says_what_its_modules_say_whatever_the_length_and_company_and_is_kept(
    norm, layers, precision, monkeypatch
):
    torch.manual_seed(0)
    model = DecoderLLM(VOCAB, 1056, 2, layers, 40, LONGEST, options=replace(LLAMA, norm=norm)).eval()
    prepared, made, plain = Prepared(model), Compiled(model, precision), Compiled(model, precision)
    assert made.together == compiled.TOGETHER
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compile_module", interpreted)
        plain._code = {rows: plain._compile(rows) for rows in (1, compiled.TOGETHER)}
    plain.together = compiled.TOGETHER  # although it takes sums as it likes
    (_, steps), (_, expected) = (start_compiled(one, prepared, PROMPTS, LONGEST) for one in (made, plain))
    for token in torch.tensor([4, 8, 15]).repeat(3, 1).T:
        found, said = steps.step(token), expected.step(token)
        for part in ("logits", "best", "normaliser"):
            torch.testing.assert_close(getattr(found, part), getattr(said, part), rtol=1e-4, atol=2e-5)

    def write(prompts, seeds, limits):
        first, steps = start_compiled(made, prepared, prompts, LONGEST)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        return generate(first, steps, Sampler(temperature=1.0), limits, generator=draws)

    prompts, limits = PROMPTS * 3, [30, 4, 9, 30, 12, 5, 9, 20, 7]  # nine texts, which become eight and in the end one
    assert write(prompts, range(9), limits) == [
        write([prompt], [seed], [limit])[0] for seed, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
    ]

    monkeypatch.setattr(aot, "_compile", lambda *_: pytest.fail("compiled again"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    loaded = list[int]()
    monkeypatch.setattr(aot, "called_by_compiled_code", lambda: loaded.append(1) or called_by_compiled_code())
    Compiled(model, precision).code(1)
    assert bool(loaded) == (precision == "int4")  # what was kept calls it, too


class Echo:
    """Has each token be its own key, value and logit."""

    together = compiled.TOGETHER

    def step(self, tokens, group):
        group._own[:] = tokens[:, None, None].float()
        return Scored(tokens[:, None].float(), tokens + 1, tokens[:, None].float() + 2)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=19), st.data())
def test_texts_go_on_from_their_own_tokens_however_they_are_chosen(lengths, data):
    prompts = [list(range(first, first + length)) for first, length in enumerate(lengths)]
    held = [torch.tensor(ids).view(1, 1, -1, 1, 1).expand(2, 3, -1, 1, 2).float() for ids in prompts]
    texts = compiled.CompiledTexts(Echo(), held, capacity=9)
    for token in range(100, 106):
        fed = [token + 10 * place for place in range(len(prompts))]
        scored = texts.step(torch.tensor(fed))
        assert scored.logits.flatten().tolist() == fed
        assert (scored.best - 1).tolist() == (scored.normaliser - 2).flatten().tolist() == fed
        prompts = [[*ids, new] for ids, new in zip(prompts, fed, strict=True)]
        for ids, (group, place) in zip(prompts, texts.places, strict=True):
            assert torch.equal(group.text(place), torch.tensor(ids).view(-1, 1, 1).expand(2, 3, -1, 1, 2))
        places = st.integers(0, len(prompts) - 1)
        kept = data.draw(st.lists(places, min_size=1, max_size=19) | st.lists(places, min_size=1, unique=True))
        texts.select(torch.tensor(kept))
        prompts = [prompts[place] for place in kept]


def test_few_calls_read_all_texts():
    for texts in range(1, 40):
        sizes = compiled.group_sizes(texts, Echo())
        assert len(sizes) == -(-texts // compiled.TOGETHER)
        assert texts <= sum(sizes)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("part", ["logits", "normaliser"])
@pytest.mark.parametrize(("differs", "together"), [(0.0, compiled.TOGETHER), (1e-6, 1)])
def test_texts_are_read_alone_where_code_for_several_takes_other_sums(part, differs, together):
    made = Compiled(make_model(), "fp32")
    code = {rows: made.code(rows) for rows in (1, compiled.TOGETHER)}

    def head(rows):
        differing = differs * (rows > 1)
        return lambda inputs: [
            torch.full((rows, 128), 0.5 + differing * (part == "logits")),
            torch.zeros(rows),
            torch.full((rows, 1), 5.0 + differing * (part == "normaliser")),
        ]

    made._code = {rows: one._replace(head=head(rows)) for rows, one in code.items()}
    assert made.together == together
    assert compiled.group_sizes(3, made) == ([1, 1, 1] if together == 1 else [together])


@needs_compiler
def test_an_engine_writes_by_compiled_code_where_it_is_asked_to(make, monkeypatch):
    plain = make("decoder_only")
    monkeypatch.setattr(compiled, "compile_module", interpreted)
    engine = make("decoder_only", compiled=True)
    asked = {"temperature": 0.7, "max_new_tokens": 60, "past_context": "slide", "n": 2}
    found, expected = engine.generate(["abc", "", "d"], **asked), plain.generate(["abc", "", "d"], **asked)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert any(one.log_probs != other.log_probs for one, other in zip(found, expected, strict=True))
    assert "".join(engine.stream("abc", seed=0, **asked | {"n": 1})) == found[0].text


def test_what_is_not_decoded_by_compiled_code_is_refused(make):
    engine = make("encoder_decoder")
    with pytest.raises(ConfigError, match="`compiled` must be left out unless the model is on a processor, in fp32"):
        Ready(engine.model.to(torch.bfloat16), engine.config, engine.tokenizers, compiled=True)


@needs_compiler
def test_four_bits_are_compiled_where_there_are_kernels_for_them(make, monkeypatch):
    monkeypatch.setattr("triglot.generation.ready.multiplies_bytes", lambda: True)
    assert make("decoder_only", compiled=True, precision="int4", d_model=32).precision == "int8 and int4"
    assert make("decoder_only", compiled=True, precision="int4").precision == "int8"  # 20 are no groups of 32
    monkeypatch.setattr("triglot.generation.ready.multiplies_bytes", lambda: False)
    with pytest.raises(ConfigError, match="`precision` must be fp32, bf16 or int8 where texts are `compiled` for a"):
        make("decoder_only", compiled=True, precision="int4")


@needs_compiler
def test_guesses_are_refused(make):
    with pytest.raises(ConfigError, match="`speculate` must be 0 where `compiled` is set, but is 2"):
        make("decoder_only", compiled=True).generate(["a"], speculate=2)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("experts", [(), (3,)])
def test_sums_of_whole_numbers_become_vectors(experts, tmp_path, monkeypatch):
    if not shutil.which("objdump") or platform.machine() != "x86_64":
        pytest.skip("there is no objdump here, or it would show another processor's names")
    layer, inputs = WholeLinear(torch.randn(*experts, 64, 64), None), [torch.randn(1, 1, 64)]
    inputs += [torch.tensor([1]) for _ in experts]
    keep_code_in(tmp_path, monkeypatch)
    run = aot.bound(aot.compile_module(layer, tuple(inputs), (None,) * len(inputs), 2**13), layer)
    torch.testing.assert_close(run(inputs)[0], layer(*inputs))
    (package,) = tmp_path.glob("*.pt2")
    with zipfile.ZipFile(package) as parts:
        (library,) = [name for name in parts.namelist() if name.endswith(".so")]
        parts.extract(library, tmp_path)
    code = subprocess.run(["objdump", "-d", tmp_path / library], capture_output=True, text=True, check=True).stdout
    assert "pmaddwd" in code or "pdpwssd" in code
