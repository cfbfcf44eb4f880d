"""Muon with sums in float32 against the same iteration in float64."""

import numpy as np
import pytest
import torch
from timm.optim import Muon, create_optimizer_v2, muon

import qsd.training  # noqa: F401, makes the optimizer known


def orthogonalized(matrix, steps=5):
    """Five steps of the quintic iteration of Jordan et al. (2024), from its published coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / np.linalg.norm(matrix)
    x, turned = (x.T, True) if x.shape[0] > x.shape[1] else (x, False)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if turned else x


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 4, 3, 3)])
def test_a_weight_moves_as_the_iteration_in_float64_says(shape):
    torch.manual_seed(0)
    weight, vector = torch.nn.Parameter(torch.zeros(shape)), torch.nn.Parameter(torch.zeros(5))
    weight.grad, vector.grad = torch.randn(shape), torch.randn(5)
    optimizer = create_optimizer_v2([weight, vector], opt="muon32", lr=0.1, momentum=0.9, ns_coefficients="original")
    assert isinstance(optimizer, Muon)
    before = muon.zeropower_via_newtonschulz
    optimizer.step()
    assert muon.zeropower_via_newtonschulz is before
    matrix = 0.1 * weight.grad.double().flatten(1).numpy()  # momentum 0.9 from nothing
    expected = -0.1 * 0.2 * max(matrix.shape) ** 0.5 * orthogonalized(matrix)
    # Rounding of float32 is 6e-8; timm's own optimizer, in bfloat16, is some 1e-2 away.
    np.testing.assert_allclose(weight.detach().flatten(1).numpy(), expected, atol=1e-5 * np.abs(expected).max())
    torch.testing.assert_close(vector.detach(), -0.1 * vector.grad.sign(), rtol=1e-4, atol=0)  # AdamW's first step
