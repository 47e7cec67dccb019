"""Positions: the papers' formulas, written out naively in double precision, are the oracle."""

import itertools
import math

import pytest
import torch

from triglot.layers.embedding import Embedding
from triglot.layers.positions import LearnedPositions, PositionalEncoding, RotaryPositions, rotate, sinusoids
from triglot.layers.relative_positions import RelativePositions

BATCH, LENGTH = 2, 5


def naive_table(length: int, d_model: int) -> torch.Tensor:
    table = torch.zeros(length, d_model, dtype=torch.float64)
    for position in range(length):
        for column in range(d_model):
            angle = position / 10_000 ** ((column - column % 2) / d_model)
            table[position, column] = math.cos(angle) if column % 2 else math.sin(angle)
    return table


@pytest.mark.parametrize("d_model", [1, 2, 7, 22, 23])
def test_sinusoids_are_the_papers_at_even_and_odd_widths(d_model):
    torch.testing.assert_close(sinusoids(101, d_model).double(), naive_table(101, d_model), atol=1e-5, rtol=0)


def test_sinusoids_far_out_err_by_what_an_angle_in_single_precision_does():
    """The document's table has the same error; ours agrees with it (test_document)."""
    table, naive = sinusoids(5000, 22)[4990:].double(), naive_table(5000, 22)[4990:]
    torch.testing.assert_close(table, naive, atol=5000 * 2**-23, rtol=0)


def test_adds_the_table_to_each_row_then_drops():
    x = torch.randn(BATCH, LENGTH, 23)
    encoding = PositionalEncoding(23, 11).eval()
    torch.testing.assert_close(encoding(x) - x, naive_table(LENGTH, 23).float().expand_as(x), atol=1e-5, rtol=0)
    assert not torch.equal(encoding.train()(x), encoding(x))
    assert torch.equal(PositionalEncoding(23, 11, dropout=0.0).train()(x), encoding.eval()(x))


def test_grows_past_its_table_and_keeps_what_it_had():
    x = torch.zeros(BATCH, 53, 22)
    encoding = PositionalEncoding(22, max_seq_length=7).eval()
    torch.testing.assert_close(encoding(x)[0], naive_table(53, 22).float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoding(x[:, :7])[0], naive_table(7, 22).float(), atol=1e-5, rtol=0)


def test_no_table_is_in_the_state_dict_so_another_length_loads():
    assert not PositionalEncoding(22, 7).state_dict()
    assert not RotaryPositions(10, 7).state_dict()
    Embedding(23, 22, 7, 0.0).load_state_dict(Embedding(23, 22, 101, 0.0).state_dict())
    assert set(LearnedPositions(22, 7, 0.0).state_dict()) == {"embedding.weight"}


@pytest.mark.parametrize("make", [PositionalEncoding, LearnedPositions])
def test_given_positions_choose_the_rows_of_the_table(make):
    encoding = make(22, 53, 0.0)
    x = torch.zeros(BATCH, 53, 22)
    positions = torch.tensor([[3, 11, 4], [0, 52, 1]])
    chosen = encoding(x[:, :3], positions)
    for row in range(BATCH):
        assert torch.equal(chosen[row], encoding(x)[row, positions[row]])


def test_rotation_turns_each_pair_by_position_over_theta_to_the_2i_by_width():
    rotary, head_dim, theta = RotaryPositions(10, 101, theta=500.0), 10, 500.0
    x = torch.randn(1, 1, 101, head_dim)
    turned = rotate(x, rotary(torch.arange(101)[None]))[0, 0]
    for position in (0, 1, 7, 100):
        for pair in range(head_dim // 2):
            angle = position / theta ** (2 * pair / head_dim)
            z = complex(x[0, 0, position, pair], x[0, 0, position, pair + head_dim // 2])
            z *= complex(math.cos(angle), math.sin(angle))
            assert turned[position, pair].item() == pytest.approx(z.real, abs=1e-5)
            assert turned[position, pair + head_dim // 2].item() == pytest.approx(z.imag, abs=1e-5)


def test_rotated_products_depend_on_distances_only_and_lengths_stay():
    rotary = RotaryPositions(10, 211)
    query, key = torch.randn(1, 3, 1, 10), torch.randn(1, 3, 1, 10)

    def product(i: int, j: int) -> torch.Tensor:
        at = [rotate(x, rotary(torch.tensor([[p]]))) for x, p in ((query, i), (key, j))]
        return (at[0] * at[1]).sum(-1)

    torch.testing.assert_close(product(7, 3), product(204, 200), atol=1e-4, rtol=0)
    assert (product(7, 3) - product(7, 4)).abs().max() > 1e-3
    turned = rotate(query, rotary(torch.tensor([[199]])))
    torch.testing.assert_close(turned.norm(dim=-1), query.norm(dim=-1))


def test_each_row_can_stand_elsewhere():
    rotary = RotaryPositions(10, 53)
    x = torch.randn(1, 3, LENGTH, 10).expand(BATCH, -1, -1, -1)
    starts = torch.tensor([[0], [31]])
    turned = rotate(x, rotary(starts + torch.arange(LENGTH)))
    for row in range(BATCH):
        alone = rotate(x[:1], rotary(starts[row] + torch.arange(LENGTH)[None]))
        assert torch.equal(turned[row], alone[0])


def test_sinusoids_refuse_no_width():
    with pytest.raises(ValueError, match="`d_model` must be at least 1, but is 0 instead"):
        PositionalEncoding(0)


def test_rotation_refuses_odd_heads():
    with pytest.raises(ValueError, match="`head_dim` must be even with rotary positions, but is 11 instead."):
        RotaryPositions(11, 53)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_keeps_the_dtype_it_is_given(dtype):
    rotary = RotaryPositions(10, 53)
    x = torch.randn(BATCH, 3, LENGTH, 10).to(dtype)
    assert rotate(x, rotary(torch.arange(LENGTH)[None])).dtype == dtype


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 11), (7, 20), (5, 3)])
def test_relative_positions_are_t5s(num_buckets, max_distance, both_ways):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = RelativePositions(num_buckets, max_distance, 3, both_ways=both_ways)
    positions = torch.arange(301)[None]
    distance = positions[0] - positions[0][:, None]
    buckets = t5.T5Attention._relative_position_bucket(distance, both_ways, num_buckets, max_distance)
    assert torch.equal(relative(positions, positions), relative.table.weight[buckets].permute(2, 0, 1)[None])


def test_relative_positions_of_rows_that_stand_elsewhere_are_by_their_distances():
    relative = RelativePositions(8, 11, 3, both_ways=False)
    query, key = torch.tensor([[4, 5], [9, 10]]), torch.tensor([[3, 0, 5, 4]])
    found = relative(query, key)
    for row, place, of_key in itertools.product(range(2), range(2), range(4)):
        alone = relative(query[row : row + 1, place : place + 1], key[:, of_key : of_key + 1])
        assert torch.equal(found[row, :, place, of_key], alone[0, :, 0, 0])


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative"])
@pytest.mark.parametrize("scale", [True, False])
def test_embeddings_are_scaled_and_know_their_place(positions, scale, check_fields):
    embedding = Embedding(23, 22, 53, 0.0, positions=positions, head_dim=2, scale=scale)
    tokens = torch.randint(23, (BATCH, LENGTH))
    out = embedding(tokens)
    check_fields(out)
    plain = embedding.tokens.weight[tokens] * (math.sqrt(22) if scale else 1.0)
    match positions:
        case "sinusoidal":
            torch.testing.assert_close(out.x - plain, naive_table(LENGTH, 22).float().expand_as(plain))
        case "learned":
            torch.testing.assert_close(out.x - plain, embedding.added.embedding.weight[:LENGTH].expand_as(plain))
        case _:
            assert torch.equal(out.x, plain)
    assert (out.rotation is None) == (positions != "rotary")


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "relative"])
def test_embedding_dropout_acts_in_training_only(positions, norm):
    embedding = Embedding(23, 22, 53, 0.5, positions=positions, head_dim=2, norm=norm)
    tokens = torch.randint(23, (BATCH, LENGTH))
    assert 0.2 < (embedding(tokens).x == 0).float().mean() < 0.8  # and is the last thing that happens
    assert not torch.equal(embedding(tokens).x, embedding(tokens).x)
    embedding.eval()
    assert torch.equal(embedding(tokens).x, embedding(tokens).x)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_of_embeddings_is_of_tokens_with_their_positions(kind):
    plain, normed = Embedding(23, 22, 53, 0.0), Embedding(23, 22, 53, 0.0, norm=kind, norm_eps=0.1)
    normed.tokens.weight = plain.tokens.weight
    tokens = torch.randint(23, (BATCH, LENGTH))
    norm = torch.nn.LayerNorm(22, eps=0.1) if kind == "layer" else torch.nn.RMSNorm(22, eps=0.1)
    torch.testing.assert_close(normed(tokens).x, norm(plain(tokens).x))
