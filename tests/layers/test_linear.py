"""A projection is nn.Linear, in every precision and with its gradients."""

import pytest
import torch
from torch import nn

from triglot.layers.linear import Linear, project

BATCH, LENGTH, INPUTS, OUTPUTS = 3, 7, 11, 13


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64, torch.bfloat16])
def test_gives_the_bits_of_nn_linear_and_its_gradients(bias, precision):
    ours = Linear(INPUTS, OUTPUTS, bias=bias)
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(BATCH, LENGTH, INPUTS)
    if precision == torch.float64:
        ours, plain, x = ours.double(), plain.double(), x.double()
    results = []
    for layer in (ours, plain):
        start = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            result = layer(start)
        result.float().square().sum().backward()
        results.append([result.detach(), start.grad, *(weight.grad for weight in layer.parameters())])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other)
    assert torch.equal(results[0][0], results[1][0])


def test_frozen_weights_get_no_gradient():
    layer = Linear(INPUTS, OUTPUTS)
    layer.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(BATCH, INPUTS)).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((OUTPUTS,), float(BATCH)))


def test_the_plain_product_is_the_same_as_the_one_that_adds_the_bias_itself():
    x, weight, bias = (torch.randn(size).bfloat16() for size in ((BATCH, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,)))
    assert torch.equal(project(x, weight, bias), nn.functional.linear(x, weight, bias))
