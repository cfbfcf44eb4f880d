"""Weight quantization as layers use it."""

import pytest
import torch
from torch.nn import functional as F

from qsd import QsdError, initialize_steps
from qsd.layers import QuantConv2d, QuantLinear, quantized_weight
from qsd.quantizers import StepSizeQuantizer


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_weights_lie_on_a_signed_grid_of_the_asked_for_bits(bits):
    layer = QuantConv2d(6, 5, 3, weight_bits=bits)
    integers = layer.quantizer.integers(layer.weight * 30)  # far out, to reach both ends
    assert integers.min() == -(2 ** (bits - 1))
    assert integers.max() == 2 ** (bits - 1) - 1
    ours = layer.quantizer(layer.weight * 30)
    torch.testing.assert_close(ours, integers * layer.quantizer.step.view(-1, 1, 1, 1))


def test_quantizing_twice_changes_nothing():
    layer = QuantLinear(30, 7, weight_bits=3)
    once = quantized_weight(layer)
    torch.testing.assert_close(layer.quantizer(once), once)


def test_steps_have_the_published_initial_value_when_the_constructor_returns():
    layer = QuantConv2d(4, 8, 3, groups=4, weight_bits=4)
    expected = 2 * layer.weight.abs().mean() / 7**0.5
    torch.testing.assert_close(layer.quantizer.step, expected.expand(8))


def test_initialize_steps_follows_new_weights_and_survives_zeros():
    layer = QuantLinear(4, 3)
    layer.weight.data.mul_(10)
    initialize_steps(layer)
    torch.testing.assert_close(layer.quantizer.step, (2 * layer.weight.abs().mean() / 7**0.5).expand(3))
    layer.weight.data.zero_()
    initialize_steps(layer)
    assert (layer.quantizer.step > 0).all()


@pytest.mark.parametrize("bits", [1, 9, 0, 4.0, True])
def test_other_widths_are_refused(bits):
    with pytest.raises(QsdError, match=r"weight_bits=.* from 2 to 8"):
        StepSizeQuantizer(bits, 3)


def test_without_bits_a_layer_is_the_plain_one_with_the_plain_state():
    conv, linear = (
        QuantConv2d(3, 4, 3, stride=2, padding=1, bias=True, weight_bits=None),
        QuantLinear(4, 2, weight_bits=None),
    )
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, 2, 1))
    assert set(conv.state_dict()) == {"weight", "bias"} == set(linear.state_dict())


def test_every_parameter_of_a_layer_gets_a_gradient():
    for layer, x in (
        (QuantConv2d(3, 4, 3, bias=True), torch.randn(2, 3, 5, 5)),
        (QuantLinear(3, 4), torch.randn(2, 3)),
    ):
        layer(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
