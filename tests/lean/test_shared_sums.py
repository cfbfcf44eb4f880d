"""A learned neuron and the norm in front of it need the same sums over the batch; the neuron computes them for both."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qsd import set_lean
from qsd.layers import LinearChain, QuantConv2d
from qsd.neurons import LsqNeuron


class Network(nn.Module):
    def __init__(self, amplitude=None):
        super().__init__()
        self.chain = LinearChain(conv=QuantConv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4))
        self.neuron = LsqNeuron(4, amplitude)


def alone(network, x):
    return network.neuron(network.chain(x))


def with_a_second_consumer(network, x):
    y = network.chain(x)
    return network.neuron(y) + y.sin()


def with_a_hook_that_returns_another_gradient(network, x):
    y = network.chain(x)
    y.register_hook(lambda grad: 3 * grad)
    return network.neuron(y)


def with_a_hook_that_changes_the_gradient(network, x):
    y = network.chain(x)
    y.register_hook(lambda grad: grad.mul_(3))
    return network.neuron(y)


def twice(network, x):
    """One norm, called for two batches that go through one neuron each."""
    first, second = network.chain(x), network.chain(x.flip(0) * 2)
    return network.neuron(first) + network.neuron(second).cos()


def with_frozen_weights(network, x):
    network.chain.norm.requires_grad_(False)
    return network.neuron(network.chain(x))


def of_a_frozen_input(network, x):
    network.chain.conv.requires_grad_(False)
    return network.neuron(network.chain(x.detach()))


def gradients(case, lean, amplitude=None):
    torch.manual_seed(0)
    network = set_and_train(Network(amplitude), lean)
    x = torch.randn(4, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    output = case(network, x)
    weights = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).view(output.shape)
    (output * weights).sum().backward()
    return {"x": x.grad, **{name: p.grad for name, p in network.named_parameters()}}


def set_and_train(network, lean):
    network.double().train()
    set_lean(network, lean)
    return network


CASES = [
    alone,
    with_a_second_consumer,
    with_a_hook_that_returns_another_gradient,
    with_a_hook_that_changes_the_gradient,
    twice,
    with_frozen_weights,
    of_a_frozen_input,
]


@pytest.mark.parametrize("amplitude", [None, 1.0])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_plain_layers(case, amplitude):
    plain, lean = (gradients(case, choice, amplitude) for choice in (False, True))
    assert {name for name, g in plain.items() if g is None} == {name for name, g in lean.items() if g is None}
    for name, gradient in plain.items():
        if gradient is not None:
            assert gradient.abs().sum() > 0, name
            # float64: sums of 120 products in another order
            torch.testing.assert_close(lean[name], gradient, rtol=1e-11, atol=1e-11, msg=name)


class Calls(TorchDispatchMode):
    """Counts the backward passes of norms."""

    def __init__(self):
        super().__init__()
        self.norms = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.norms += func is torch.ops.aten.native_batch_norm_backward.default
        return func(*args, **(kwargs or {}))


def test_the_sums_are_made_once():
    network = set_and_train(Network(), True)
    output = network.neuron(network.chain(torch.randn(4, 3, 6, 5, dtype=torch.float64)))
    with Calls() as calls:
        output.sum().backward()
    assert calls.norms == 1


def test_a_graph_is_differentiated_again():
    network = set_and_train(Network(), True)
    loss = network.neuron(network.chain(torch.randn(4, 3, 6, 5, dtype=torch.float64))).square().sum()
    parameters = list(network.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters)):
        assert torch.equal(a, b)
