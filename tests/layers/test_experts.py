"""However experts are computed, it is what the plain loop over them computes, gradients included."""

import threading
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triglot.layers import experts as experts_module
from triglot.layers.activations import Activation, is_gated
from triglot.layers.experts import BACKENDS, Assigned, Weights, best, can_group, mix

WIDTH, INNER, EXPERTS = 16, 24, 5
others = pytest.mark.parametrize("backend", sorted(BACKENDS.keys() - {"loop"}))
every = pytest.mark.parametrize("backend", sorted(BACKENDS))
activations = pytest.mark.parametrize("activation", get_args(Activation))


def traced(test):
    """A test that compiles: without the shape types' hook and what torch's own compiler warns of."""
    for warning in (
        "The .grad attribute of a Tensor that is not a leaf:UserWarning",
        ".*should not be instantiated. Methods on autograd functions are all static:DeprecationWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{warning}")(test)
    return pytest.mark.usefixtures("without_shape_checks")(test)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.05, torch.float16: 0.005}


def stack_of(activation: str, bias: bool, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Weights:
    inner = 2 * INNER if is_gated(activation) else INNER
    shapes = [(EXPERTS, inner, WIDTH), (EXPERTS, WIDTH, INNER), (EXPERTS, inner), (EXPERTS, WIDTH)]
    parts = [torch.randn(shape, dtype=dtype).div_(shape[-1] ** 0.5) for shape in shapes]
    leaves = [part.requires_grad_() for part in parts]
    return Weights(leaves[0], leaves[1], *(leaves[2:] if bias else (None, None)), activation, dropout)


def assigned_to(tokens: int, k: int, num_experts: int = EXPERTS, kept: float = 0.7) -> Assigned:
    """Some choices are not kept; experts from `num_experts` on have no tokens."""
    experts = torch.rand(tokens, num_experts).argsort(-1)[:, :k]
    return Assigned(experts, torch.rand(tokens, k), torch.rand(tokens, k) < kept, None)


def output_and_gradients(x, assigned, stack, backend, dtype=torch.float32) -> list[torch.Tensor]:
    leaves = [x.to(dtype).requires_grad_(), assigned.weights.to(dtype).requires_grad_()]
    weights = [part for part in stack[:4] if part is not None]
    output = mix(leaves[0], assigned._replace(weights=leaves[1]), stack, backend)
    if not output.requires_grad:  # of the few that were chosen, none was
        return [output, *map(torch.zeros_like, [*leaves, *weights])]
    upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * upstream).sum(), [*leaves, *weights])]


@others
@activations
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_every_way_is_the_loop_gradients_included(backend, activation, bias, dtype, k):
    x, stack = torch.randn(37, WIDTH, dtype=dtype), stack_of(activation, bias, dtype)
    if backend == "grouped" and not can_group(x, stack):
        pytest.skip("grouped products have no fp64")
    assigned = assigned_to(37, k, num_experts=4)  # the last expert is empty
    found, expected = (output_and_gradients(x, assigned, stack, one, dtype) for one in (backend, "loop"))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == dtype
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype] * other.abs().max().item(), rtol=TOLERANCE[dtype])


@others
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 9), st.integers(1, EXPERTS), st.floats(0, 1), st.integers(0, 2**31))
def test_any_assignment_is_computed_as_by_the_loop(backend, tokens, k, kept, seed):
    torch.manual_seed(seed)
    x, stack, assigned = torch.randn(tokens, WIDTH), stack_of("gelu", bias=True), assigned_to(tokens, k, kept=kept)
    found, expected = (output_and_gradients(x, assigned, stack, one) for one in (backend, "loop"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@every
def test_without_tokens_outputs_are_empty_and_gradients_zero(backend):
    stack = stack_of("swiglu", bias=True)
    output, *gradients = output_and_gradients(torch.randn(0, WIDTH), assigned_to(0, 2), stack, backend)
    assert output.shape == (0, WIDTH)
    assert not any(gradient.any() for gradient in gradients)


@every
def test_what_is_not_kept_is_not_read_even_where_it_is_no_number(backend):
    x, stack, assigned = torch.randn(9, WIDTH), stack_of("gelu", bias=True), assigned_to(9, 2, kept=1.0)
    assigned.kept[3:5] = False
    x[3:5], assigned.weights[3:5] = torch.nan, torch.nan
    output, of_x, _, *of_weights = output_and_gradients(x, assigned, stack, backend)
    assert not output[3:5].any()
    assert all(part.isfinite().all() for part in (output, of_x, *of_weights))


@others
def test_a_token_that_is_no_number_harms_no_other(backend):
    x, stack, assigned = torch.randn(9, WIDTH), stack_of("gelu", bias=True), assigned_to(9, 2, kept=1.0)
    clean = mix(x, assigned, stack, backend)
    x[4], assigned.weights[4] = torch.nan, torch.nan
    harmed = mix(x, assigned, stack, backend)
    assert harmed[4].isnan().all()
    others = torch.arange(9) != 4
    torch.testing.assert_close(harmed[others], clean[others])


@every
def test_dropout_keeps_the_mean_and_the_gradient_knows_what_was_dropped(backend):
    x, assigned = torch.randn(7, WIDTH), assigned_to(7, 2)
    stack = stack_of("relu", bias=False, dropout=0.5)

    def output(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return mix(x, assigned, stack, backend)

    direction, leaf = torch.randn_like(x), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(output(leaf).sum(), leaf)
    there, back = (output(x + sign * 1e-3 * direction).sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (there - back) / 2e-3, rtol=2e-2, atol=2e-2)
    plain = mix(x, assigned, stack._replace(dropout=0.0), backend)
    assert not torch.allclose(output(x), plain)
    means = torch.stack([mix(x, assigned, stack, backend) for _ in range(600)]).mean(0)
    torch.testing.assert_close(means, plain, atol=0.25, rtol=0.2)


@traced
def test_the_way_with_fixed_shapes_compiles_into_one_graph():
    torch.compiler.reset()
    x, stack, assigned = torch.randn(12, WIDTH), stack_of("gelu", bias=True), assigned_to(12, 2)
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    expected = mix(x, assigned, stack, "loop")
    torch.testing.assert_close(compiled(x, assigned, stack, "capacity"), expected)
    torch.testing.assert_close(compiled(x, assigned._replace(most=12), stack), expected)
    free = torch.compile(mix, backend="aot_eager")  # in as many graphs as it takes
    torch.testing.assert_close(free(x, assigned, stack), expected)


@traced
@pytest.mark.parametrize(("backend", "dtype"), [("capacity", torch.float32), ("grouped", torch.bfloat16)])
def test_what_compiles_into_one_graph_has_the_gradients_of_the_loop(backend, dtype, monkeypatch):
    torch.compiler.reset()
    x, stack, assigned = torch.randn(12, WIDTH, dtype=dtype), stack_of("gelu", True, dtype), assigned_to(12, 2)
    expected = output_and_gradients(x, assigned, stack, "loop", dtype)
    monkeypatch.setitem(globals(), "mix", torch.compile(mix, fullgraph=True, backend="aot_eager"))
    for one, other in zip(output_and_gradients(x, assigned, stack, backend, dtype), expected, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype] * other.abs().max().item(), rtol=TOLERANCE[dtype])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_threads_that_share_the_experts_compute_what_one_does(activation, kept, monkeypatch):
    assigned, stack = assigned_to(EXPERTS * 100, 3, kept=kept), stack_of(activation, bias=True, dropout=0.0)
    x, names = torch.randn(EXPERTS * 100, WIDTH), set[str]()
    both_at_work = threading.Barrier(2)  # or else one thread may have done all before the other one wakes

    def product(*given):
        if (name := threading.current_thread().name) not in names:
            names.add(name)
            both_at_work.wait(timeout=60)
        original(*given)

    original = experts_module._product
    monkeypatch.setattr(experts_module, "_product", product)
    shared = output_and_gradients(x, assigned, stack, "segments")
    assert len(names) == 2
    monkeypatch.setattr(experts_module, "_product", original)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    alone = output_and_gradients(x, assigned, stack, "segments")
    torch.testing.assert_close(shared, alone, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.set_num_threads(2)
        torch.testing.assert_close(mix(x, assigned, stack, "segments"), shared[0], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_told(monkeypatch):
    monkeypatch.setattr(experts_module, "_product", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mix(torch.randn(500, WIDTH), assigned_to(500, 2), stack_of("gelu", bias=True), "segments")


def test_places_that_are_known_to_be_enough_are_all_that_are_made():
    x, stack = torch.randn(12, WIDTH), stack_of("gelu", bias=True)
    assigned = assigned_to(12, 1, kept=1.0)
    most = int(torch.bincount(assigned.experts.flatten()).max())
    torch.testing.assert_close(mix(x, assigned._replace(most=most), stack, "capacity"), mix(x, assigned, stack, "loop"))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_makes_products_of_its_own_type_and_gradients_of_the_weights(backend, dtype):
    x, stack, assigned = torch.randn(9, WIDTH, requires_grad=True), stack_of("gelu", bias=True), assigned_to(9, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = mix(x, assigned, stack, backend)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert x.grad is not None
    assert {x.grad.dtype, *(part.grad.dtype for part in stack[:4])} == {torch.float32}


def test_the_fastest_way_is_chosen_by_what_is_asked():
    x, stack = torch.randn(64, WIDTH), stack_of("gelu", bias=True)
    many, one = assigned_to(64, 2), assigned_to(1, 2)
    assert best(x, many, stack) == best(x, one, stack) == "segments"
    with torch.no_grad():
        assert best(x[:1], one, stack) == "few"
        assert best(x, many, stack) == "segments"


def test_groups_are_refused_by_name_where_they_cannot_be():
    with pytest.raises(ValueError, match=r"`backend` must be another for fp64 .* but is 'grouped for torch.float64 "):
        mix(torch.randn(3, WIDTH).double(), assigned_to(3, 2), stack_of("gelu", True, torch.float64), "grouped")


def test_segments_keep_no_more_than_hidden_rows_and_outputs(monkeypatch):
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens, k = 64, 2
    x, stack = torch.randn(tokens, WIDTH, requires_grad=True), stack_of("gelu", bias=True)
    own = sum(part.untyped_storage().nbytes() for part in stack[:4]) + x.untyped_storage().nbytes()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        experts_module.segments(x, assigned_to(tokens, k, kept=1.1), stack)
    rows = tokens * k
    assert sum(kept.values()) <= own + 4 * (rows * INNER + rows)
