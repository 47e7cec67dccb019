"""A packed projection is the projection; a row's bits are its own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triglot.layers import packed as packed_module
from triglot.layers.packed import PackedFloat, PackedInt7, PackedInt8, Packer, multiplies_int8, pack, quantise_rows

PRECISIONS = ["fp32", "bf16", "int8", "int7", "int4"]
vnni = pytest.mark.skipif(not multiplies_int8(), reason="this processor does not sum products of four bytes")
widths = st.sampled_from([(6, 11), (24, 24), (128, 384), (96, 64), (130, 77), (1040, 40)])


def made(inputs: int, outputs: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    return x * torch.rand(rows, 1, generator=generator).exp2(), weight / inputs**0.5, bias


def packed_as(precision: str, weight: torch.Tensor, bias: torch.Tensor | None):
    match precision:  # small ones as well
        case "int7":
            return PackedInt7(weight, bias)
        case "int8":
            return packed_module.pack_int8(weight, bias)
        case _:
            return pack(weight, bias, precision)


@settings(deadline=None, max_examples=50)
@given(widths, st.integers(16, 40), st.integers(0, 999), st.sampled_from(PRECISIONS), st.booleans())
def test_a_packed_projection_is_the_projection(width, rows, seed, precision, biased):
    x, weight, bias = made(*width, rows, seed)
    expected = F.linear(x, weight, bias if biased else None)
    found = packed_as(precision, weight, bias if biased else None)(x)
    error = (found - expected).norm() / expected.norm()
    assert found.dtype == torch.float32
    assert error < {"fp32": 1e-6, "bf16": 0.02, "int8": 0.03, "int7": 0.03, "int4": 0.2}[precision]


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([(6, 11), (24, 24), (130, 77), (512, 64)]), st.integers(1, 40), st.integers(0, 999))
def test_seven_bits_of_weights_are_multiplied_and_summed_exactly_where_eight_would_be_cut_off(width, rows, seed):
    _, weight, bias = made(*width, rows, seed)
    weight = weight.abs()  # pairs of products are as large as can be
    x = torch.randint(0, 128, (rows, width[0]), generator=torch.Generator().manual_seed(seed)).float()
    x[:, 0] = 127  # whole already: there is nothing to round
    packed = PackedInt7(weight, bias)
    whole = (weight * (64 / weight.amax(1))[:, None]).round()
    expected = (x.double() @ whole.double().T) * packed.scale.double() * 127 + bias.double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-6, atol=1e-6)


@vnni
@settings(deadline=None, max_examples=50)
@given(widths, st.integers(1, 40), st.integers(0, 999))
def test_whole_numbers_are_multiplied_and_summed_exactly(width, rows, seed):
    x, weight, bias = made(*width, rows, seed)
    packed, quantised = PackedInt8(weight, bias), quantise_rows(x)
    whole = (weight * (127 / weight.abs().amax(1))[:, None]).round()
    sums = (quantised.whole.double() - 128) @ whole.double().T
    expected = sums * packed.scale.double() * quantised.largest.double() + bias.double()
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-6, atol=1e-6)
    restored = (quantised.whole.float() - 128) * quantised.largest / 127
    assert ((restored - x).abs() <= quantised.largest / 127 * 0.5001).all()


@vnni
@pytest.mark.parametrize("width", [(24, 24), (130, 77), (576, 960)])
def test_a_single_row_has_the_same_bits_with_tiles_and_without(width, monkeypatch):
    x, weight, bias = made(*width, 1, 0)
    found = []
    for tiles in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda tiles=tiles: tiles)
        packed = PackedInt8(weight, bias)
        assert isinstance(packed.for_one_row, torch.ScriptObject) == tiles
        found.append(packed(x))
    many = packed(x.repeat(8, 1))[:1]
    assert all(one.equal(many) for one in found)


@vnni
def test_halves_are_rounded_alike_in_one_row_and_in_many():
    x = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0])])[None]
    packed = PackedInt8(torch.eye(255), None)
    assert packed(x).equal(packed(x.repeat(8, 1))[:1])
    assert (packed(x)[0] - x[0].round()).abs().max() < 1e-4  # half to even


@settings(deadline=None, max_examples=100)
@given(widths, st.lists(st.integers(0, 39), min_size=1, max_size=60), st.integers(0, 99), st.sampled_from(PRECISIONS))
def test_a_row_gives_the_same_bits_in_any_company(width, chosen, seed, precision):
    x, weight, bias = made(*width, 40, seed)
    packed = packed_as(precision, weight, bias)
    chosen += [0] * (packed.least_rows - len(chosen))
    assert torch.equal(packed(x[chosen]), packed(x)[chosen])


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([(1040, 768), (2048, 320)]),
    st.lists(st.integers(16, 600), min_size=1, max_size=5),
    st.sampled_from(PRECISIONS),
)
def test_rows_of_long_sums_have_the_same_bits_among_hundreds(width, sizes, precision):
    x, weight, bias = made(*width, 600, 0)
    packed = packed_as(precision, weight, bias)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # who could share a sum
    together = packed(x)
    apart = [packed(x[:size]) for size in sizes]
    torch.set_num_threads(threads)
    assert all(part.equal(together[: len(part)]) for part in apart)


@pytest.mark.parametrize("precision", ["int7", "int8"])
def test_a_row_of_zeros_gives_the_bias(precision):
    _, weight, bias = made(24, 11, 1, 0)
    assert torch.equal(packed_as(precision, weight, bias)(torch.zeros(1, 24)), bias[None])


@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_projections_side_by_side_are_each_of_them_the_first_scaled(biases):
    linears = [nn.Linear(24, 11, bias=biases[0]), nn.Linear(24, 7, bias=biases[1])]
    x = torch.randn(16, 24)
    first, second = Packer("fp32").beside(linears, scale=0.25)(x).split([11, 7], 1)
    torch.testing.assert_close(first, linears[0](x) * 0.25)
    torch.testing.assert_close(second, linears[1](x))


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_small_weights_of_int8_are_floats_of_the_type_that_is_fast(monkeypatch, fast, dtype):
    monkeypatch.setattr(packed_module, "multiplies_bf16", lambda: fast)
    packer = Packer("int8")
    assert isinstance(packer(torch.randn(512, 512), None), PackedInt8 | PackedInt7)
    assert packer.least_rows == 1
    small = packer(torch.randn(64, 96), None)
    assert isinstance(small, PackedFloat)
    assert small.dtype == dtype
    assert packer.least_rows == PackedFloat.least_rows


@pytest.mark.parametrize(("fast", "kind"), [(True, PackedInt8), (False, PackedInt7)])
def test_whole_numbers_have_the_bits_that_the_processor_multiplies_without_loss(monkeypatch, fast, kind):
    monkeypatch.setattr(packed_module, "multiplies_int8", lambda: fast)
    assert isinstance(pack(torch.randn(512, 512), None, "int8"), kind)


def test_whole_numbers_are_refused_where_nothing_multiplies_them(monkeypatch):
    monkeypatch.setattr(packed_module, "multiplies_int8", lambda: False)
    monkeypatch.setattr(packed_module, "has_fbgemm", lambda: False)
    with pytest.raises(ValueError, match=r"`precision` must be fp32 or bf16 on a processor .* but is 'int8' instead"):
        pack(torch.randn(512, 512), None, "int8")
