"""Linear layers whose results don't depend on the batch."""

import pytest
import torch
from torch import nn

from gigdiff.exactness import PerSampleLinear, rows_stand_alone


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (80, 64), (2, 5, 64)])
def test_the_same_function_and_the_same_bits_in_any_batch(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 96, bias=bias), torch.randn(16, *shape)
    with torch.no_grad(), PerSampleLinear():
        together = layer(x)
        assert together.shape == (16, *shape[:-1], 96)
        assert rows_stand_alone(layer, (x,), (3,)) and rows_stand_alone(layer, (x,), (0, 9))
    torch.testing.assert_close(together, layer(x))
    with PerSampleLinear():
        torch.testing.assert_close(layer(x[0, ..., :]), layer(x)[0])


def test_gradients_are_those_of_a_linear_layer():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 4), torch.randn(5, 3, 8)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    with PerSampleLinear():
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_mean_over_the_batch_does_not_stand_alone():
    x = torch.randn(4, 3)
    assert rows_stand_alone(lambda y: y * 2, (x,), (1, 2))
    assert not rows_stand_alone(lambda y: y - y.mean(0), (x,), (1,))
