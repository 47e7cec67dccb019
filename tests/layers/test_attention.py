"""What holds for attention, whatever its weights; torch.nn.MultiheadAttention is the oracle."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triglot.layers.attention import MultiHeadAttention, attention_weights
from triglot.layers.positions import RotaryPositions

BATCH, QUERIES, KEYS, HEADS, D_MODEL = 2, 5, 7, 3, 33  # different primes (times heads): no two axes can be confused
HALF = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = {"atol": 2e-6, "rtol": 0}

pytestmark = pytest.mark.usefixtures("fused_kernel")  # where weights are not needed


@pytest.fixture
def layer() -> MultiHeadAttention:
    return MultiHeadAttention(D_MODEL, HEADS)


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.rand(BATCH, 1, QUERIES, KEYS) < 0.6
    mask[0, :, 2] = False  # one query may attend to nothing
    mask[1, :, :, 0] = True
    return mask


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, QUERIES, D_MODEL), torch.randn(BATCH, KEYS, D_MODEL)


def copied_from(ours: MultiHeadAttention) -> nn.MultiheadAttention:
    """Torch's layer with the weights of ours; grouped keys and values repeated for each query head."""
    d_model, biased = ours.query.in_features, ours.query.bias is not None
    theirs = nn.MultiheadAttention(d_model, ours.num_heads, batch_first=True, bias=biased).eval()

    def widened(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.unflatten(0, (ours.num_kv_heads, ours.head_dim))
        return heads.repeat_interleave(ours.num_heads // ours.num_kv_heads, 0).flatten(0, 1)

    with torch.no_grad():
        weights = [ours.query.weight, widened(ours.key.weight), widened(ours.value.weight)]
        theirs.in_proj_weight.copy_(torch.cat(weights))
        if biased:
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, widened(ours.key.bias), widened(ours.value.bias)]))
        theirs.out_proj.load_state_dict(ours.output.state_dict())
    return theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (3, 1), (4, 2)])
@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_torch_with_the_same_weights(num_heads, num_kv_heads, bias, need_weights, mask, check_fields):
    d_model = 11 * num_heads
    ours = MultiHeadAttention(d_model, num_heads, num_kv_heads=num_kv_heads, bias=bias).eval()
    theirs = copied_from(ours)
    query, memory = torch.randn(BATCH, QUERIES, d_model), torch.randn(BATCH, KEYS, d_model)
    mask[0, :, 2, 4] = True  # torch makes NaN of a query that has nothing to attend to
    hidden = ~mask.expand(BATCH, num_heads, QUERIES, KEYS).flatten(0, 1)
    expected, weights = theirs(query, memory, memory, attn_mask=hidden, average_attn_weights=False)
    result = ours(query, memory, memory, mask, need_weights=need_weights)
    check_fields(result)
    torch.testing.assert_close(result.output, expected, **BLOCK)
    if need_weights:
        torch.testing.assert_close(result.weights, weights, **BLOCK)
    else:
        assert result.weights is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_bias_is_added_to_scores_gradients_included(need_weights, pays, causal, mask, inputs, monkeypatch):
    monkeypatch.setattr("triglot.layers.attention.fused_kernel_pays", lambda query, key: pays)
    layer = MultiHeadAttention(D_MODEL, HEADS).eval()
    theirs = copied_from(layer)
    query, memory = (inputs[1], inputs[1]) if causal else inputs
    bias = torch.randn(1, HEADS, query.size(1), KEYS, requires_grad=True)
    mask[0, :, 2, 4] = True
    allowed = torch.ones(KEYS, KEYS, dtype=torch.bool).tril() if causal else mask
    added = bias.masked_fill(~allowed, -math.inf).expand(BATCH, -1, -1, -1).flatten(0, 1)
    expected = theirs(query, memory, memory, attn_mask=added)[0]
    masking = {"causal": True} if causal else {"mask": mask}
    found = layer(query, memory, memory, **masking, bias=bias, need_weights=need_weights).output
    torch.testing.assert_close(found, expected, **BLOCK)
    gradients = [torch.autograd.grad(out.square().sum(), [bias], retain_graph=True)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pays", [True, False])
def test_a_query_that_has_nothing_to_attend_to_gets_zeros_whatever_the_bias(pays, inputs, monkeypatch):
    monkeypatch.setattr("triglot.layers.attention.fused_kernel_pays", lambda query, key: pays)
    query, memory = inputs
    layer, bias = MultiHeadAttention(D_MODEL, HEADS, bias=False).eval(), torch.randn(1, HEADS, QUERIES, KEYS)
    nothing = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    assert not layer(query, memory, memory, nothing, bias=bias, need_weights=False).output.any()


@pytest.mark.parametrize("head_dim", [5, 11, 20])
def test_heads_can_be_of_any_width_and_scores_unscaled(head_dim, inputs):
    query, memory = inputs
    layer = MultiHeadAttention(D_MODEL, HEADS, num_kv_heads=1, head_dim=head_dim, scale=False, qkv_bias=False).eval()
    assert layer.query.bias is layer.key.bias is layer.value.bias is None
    assert layer.output.bias is not None
    q, k, v = layer.query(query), layer.key(memory), layer.value(memory)
    heads = [torch.softmax(part @ k.mT, -1) @ v for part in q.split(head_dim, -1)]
    expected = layer.output(torch.cat(heads, -1))
    for need_weights in (True, False):
        found = layer(query, memory, memory, need_weights=need_weights).output
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["head", "width"])
def test_queries_and_keys_are_normalised_before_they_are_rotated(kind, inputs):
    x, head_dim = inputs[1], 8
    layer = MultiHeadAttention(D_MODEL, 4, num_kv_heads=2, head_dim=head_dim, qk_norm=kind, norm_eps=0.1).eval()
    plain = MultiHeadAttention(D_MODEL, 4, num_kv_heads=2, head_dim=head_dim).eval()
    for norm in (layer.query_norm, layer.key_norm):
        nn.init.normal_(norm.weight)
    q, k = (
        F.rms_norm(part.unflatten(-1, (-1, len(norm.weight))), norm.weight.shape, norm.weight, 0.1).flatten(-2)
        for part, norm in ((layer.query(x), layer.query_norm), (layer.key(x), layer.key_norm))
    )
    assert len(layer.key_norm.weight) == (head_dim if kind == "head" else 2 * head_dim)
    plain.load_state_dict({name: one for name, one in layer.state_dict().items() if "norm" not in name})
    monkey = {"query": q, "key": k}
    for name, value in monkey.items():
        getattr(plain, name).forward = lambda _, value=value: value
    rotation = RotaryPositions(head_dim, 100)(torch.arange(KEYS)[None])
    torch.testing.assert_close(layer(x, x, x, rotation=rotation), plain(x, x, x, rotation=rotation), **BLOCK)


@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_gradients_of_the_fused_path_are_those_of_the_written_out_one(num_kv_heads, mask, inputs):
    layer = MultiHeadAttention(D_MODEL, HEADS, num_kv_heads=num_kv_heads).eval()
    results = []
    for need_weights in (True, False):
        query, memory = (tensor.clone().requires_grad_() for tensor in inputs)
        output = layer(query, memory, memory, mask, need_weights=need_weights).output
        wanted = [query, memory, *layer.parameters()]
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_stands_for_the_look_ahead_mask(layer, inputs, need_weights):
    x = inputs[1]
    look_ahead = torch.ones(KEYS, KEYS, dtype=torch.bool).tril()
    layer.eval()
    expected = layer(x, x, x, look_ahead, need_weights=need_weights)
    result = layer(x, x, x, causal=True, need_weights=need_weights)
    torch.testing.assert_close(result.output, expected.output, **BLOCK)
    with pytest.raises(ValueError, match="`mask` must be None when `causal` is set"):
        layer(x, x, x, look_ahead, causal=True)


@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_the_output_is_one_whichever_path_is_taken(num_kv_heads, mask, inputs, monkeypatch):
    layer = MultiHeadAttention(D_MODEL, HEADS, num_kv_heads=num_kv_heads).eval()
    query, memory = inputs
    outputs = []
    for pays in (True, False):
        monkeypatch.setattr("triglot.layers.attention.fused_kernel_pays", lambda query, key, pays=pays: pays)
        result = layer(query, memory, memory, mask, need_weights=False)
        assert result.weights is None
        outputs.append(result.output)
    torch.testing.assert_close(*outputs, **BLOCK)


def test_long_sequences_take_the_fused_kernel(monkeypatch, layer):
    monkeypatch.undo()  # the choice is the library's own again
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (calls.append(a), kernel(*a, **k))[1])
    x = torch.randn(1, 1009, D_MODEL)
    output = layer.eval()(x, x, x, causal=True, need_weights=False).output
    assert len(calls) == 1
    torch.testing.assert_close(output, layer(x, x, x, causal=True).output, **BLOCK)


def test_weights_are_a_distribution_over_allowed_keys_even_in_training(layer, mask, inputs):
    query, memory = inputs
    weights = layer.train()(query, memory, memory, mask).weights
    assert not weights[~mask.expand_as(weights)].any()
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).float().expand(BATCH, HEADS, QUERIES))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_only(inputs, need_weights):
    query, memory = inputs
    layer = MultiHeadAttention(D_MODEL, HEADS, dropout=0.5)
    first, second = (layer.train()(query, memory, memory, need_weights=need_weights).output for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (layer.eval()(query, memory, memory, need_weights=need_weights).output for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("need_weights", [True, False])
def test_what_may_not_be_attended_to_changes_nothing(layer, mask, inputs, need_weights):
    query, memory = inputs
    mask[..., 3] = False
    other = memory.clone()
    other[:, 3] = 1e4
    one, two = (layer.eval()(query, m, m, mask, need_weights=need_weights).output for m in (memory, other))
    assert torch.equal(one, two)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", HALF)
def test_a_query_that_may_attend_to_nothing_gets_zeros_and_finite_gradients(layer, inputs, mask, dtype, need_weights):
    layer = layer.to(dtype)
    query, memory = (tensor.to(dtype).requires_grad_() for tensor in inputs)
    out = layer(query, memory, memory, mask, need_weights=need_weights)
    assert torch.equal(out.output[0, 2], layer.output.bias)  # nothing but the bias of the last projection
    if need_weights:
        assert not out.weights[0, :, 2].any()
        assert out.weights.dtype == dtype
    out.output.float().square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in (query, memory, *layer.parameters()))


@pytest.mark.parametrize("dtype", HALF[1:])
@pytest.mark.parametrize("need_weights", [True, False])
def test_half_precision_is_near_full_precision_under_a_mask(layer, inputs, mask, dtype, need_weights):
    query, memory = inputs
    layer.eval()
    expected = layer(query, memory, memory, mask, need_weights=need_weights).output
    halved = layer.to(dtype)(
        query.to(dtype), memory.to(dtype), memory.to(dtype), mask, need_weights=need_weights
    ).output
    torch.testing.assert_close(halved.float(), expected, atol=3e-2, rtol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_scores_that_half_precision_cannot_hold_before_scaling_do_no_harm(dtype):
    query = torch.full((1, 1, 2, 64), 36.0, dtype=dtype)  # 64 · 36² = 82,944: above fp16's 65,504; a 1/8 of it is not
    weights = attention_weights(query, query)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))


def test_weights_are_the_softmax_of_scaled_products():
    query, key = torch.randn(BATCH, HEADS, QUERIES, 11), torch.randn(BATCH, HEADS, KEYS, 11)
    weights = attention_weights(query, key)
    for row in range(QUERIES):
        scores = [math.exp(float(query[1, 2, row] @ key[1, 2, column]) / math.sqrt(11)) for column in range(KEYS)]
        naive = torch.tensor([score / sum(scores) for score in scores])
        torch.testing.assert_close(weights[1, 2, row], naive)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_takes_masks_of_rank_2_to_4(layer, rank):
    x = torch.randn(BATCH, QUERIES, D_MODEL)
    look_ahead = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril()
    mask = look_ahead[(None,) * (rank - 2)]
    weights = layer(x, x, x, mask).weights
    assert not weights.triu(1).any()
    fused, plain = (layer.eval()(x, x, x, mask, need_weights=need).output for need in (False, True))
    torch.testing.assert_close(fused, plain, **BLOCK)


def test_a_mask_may_differ_by_head(layer, inputs):
    query, memory = inputs
    mask = torch.ones(1, HEADS, QUERIES, KEYS, dtype=torch.bool)
    mask[:, 1, :, 2:] = False
    weights = layer(query, memory, memory, mask).weights
    assert not weights[:, 1, :, 2:].any()
    assert weights[:, [0, 2]].all()


def test_refuses_a_mask_whose_batch_would_fall_on_the_heads(layer, inputs):
    query, memory = inputs
    mask = torch.ones(BATCH, QUERIES, KEYS, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`mask` must be .* but is \[2, 5, 7\] instead\."):
        layer(query, memory, memory, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8, torch.bfloat16])
def test_refuses_a_mask_that_is_not_bool(layer, inputs, dtype, without_shape_checks):
    query, memory = inputs
    mask = torch.ones(QUERIES, KEYS, dtype=dtype)
    with pytest.raises(ValueError, match=r"`mask` must be bool, True = may attend, but is torch\.\w+ instead\."):
        layer(query, memory, memory, mask)


def test_refuses_a_width_its_heads_cannot_share():
    with pytest.raises(ValueError, match="`d_model` must be at least 1, but is 0 instead"):
        MultiHeadAttention(0, 3)
    with pytest.raises(ValueError, match=r"`d_model` must be divisible by num_heads \(3\), but is 32 instead\."):
        MultiHeadAttention(32, 3)
    with pytest.raises(ValueError, match=r"`num_kv_heads` must be a divisor of num_heads \(3\), but is 2 instead\."):
        MultiHeadAttention(33, 3, num_kv_heads=2)


@pytest.mark.parametrize("num_heads", [0, -3])
def test_refuses_no_heads(num_heads):
    with pytest.raises(ValueError, match="`num_heads` must be at least 1"):
        MultiHeadAttention(32, num_heads)
    with pytest.raises(ValueError, match="`num_kv_heads` must be a divisor"):
        MultiHeadAttention(32, 4, num_kv_heads=num_heads)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_refuses_a_dropout_that_is_no_rate(dropout):
    with pytest.raises(ValueError, match="`dropout` must be at least 0 and below 1"):
        MultiHeadAttention(32, 4, dropout)


def test_weights_with_rotation_depend_on_distances_only(inputs):
    layer, rotary = MultiHeadAttention(HEADS * 10, HEADS).eval(), RotaryPositions(10, 100)
    x = torch.randn(BATCH, KEYS, HEADS * 10)
    near, far = (layer(x, x, x, rotation=rotary(torch.arange(start, start + KEYS)[None])) for start in (0, 61))
    torch.testing.assert_close(near.weights, far.weights, atol=1e-5, rtol=0)
    unrotated = layer(x, x, x)
    assert (near.weights - unrotated.weights).abs().max() > 1e-3


@pytest.mark.parametrize("need_weights", [True, False])
def test_runs_under_autocast(layer, inputs, mask, need_weights):
    query, memory = inputs
    layer.eval()
    expected = layer(query, memory, memory, mask, need_weights=need_weights).output
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(query, memory, memory, mask, need_weights=need_weights).output
    torch.testing.assert_close(output.float(), expected, atol=3e-2, rtol=0)
