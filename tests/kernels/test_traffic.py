"""The table of bytes in the documentation, computed."""

import torch
from torch import nn

from qsd import functional
from qsd.functional import HALF_UP
from qsd.kernels import switch
from qsd.lean.codes import fire
from qsd.lean.norms import two_norms
from qsd.lean.spikes import fixed_spikes, learned_spikes
from qsd.lsq import lsq_backward, lsq_values
from tests.helpers import ROOT
from tests.helpers.kernels import interpreted, moved_bytes

SIZE = 8192


def cases(dtype):
    """Names, the least bytes for each element, and the work."""
    size, code = dtype.itemsize, 0.5
    x = torch.randn(SIZE).to(dtype)
    grad, threshold = torch.randn(SIZE).to(dtype), torch.tensor(0.3)
    weight, step = torch.randn(8, SIZE // 8).to(dtype), torch.ones(8, dtype=dtype)
    leaf = x.clone().requires_grad_()
    learned = threshold.clone().requires_grad_()

    def backward(neuron, *steps):
        output = neuron()
        return lambda: torch.autograd.grad(output, [leaf, *steps], grad)

    output, layout, codes = fire(x, 4, None, 0.25)
    images = x.view(8, 4, 16, 16).requires_grad_()
    norms = two_norms(images, nn.BatchNorm2d(4, dtype=dtype), nn.BatchNorm2d(4, dtype=dtype))
    return {
        "forward pass, evaluation": (2 * size, lambda: functional.fixed_spikes(x, 4, None, 0.25, HALF_UP)),
        "forward pass with codes": (2 * size + code, lambda: fire(x, 4, None, 0.25)),
        "backward pass": (2 * size + code, backward(lambda: fixed_spikes(leaf, 4, None, 0.25))),
        "backward pass, learned": (3 * size, backward(lambda: learned_spikes(leaf, learned, learned, 4), learned)),
        "decoding": (size + code, lambda: layout.values(codes, dtype)),
        "two norms, backward": (3 * size, lambda: torch.autograd.grad(norms, images, grad.view_as(images))),
        "comparison": (0.0, lambda: layout.matches(codes, output)),
        "weights": (2 * size, lambda: lsq_values(weight, step, -8, 7, dtype)),
        "weights, backward": (3 * size, lambda: lsq_backward(weight, weight, step, -8, 7)),
    }


def table(monkeypatch):
    """The rows of the documentation's table."""
    columns = []
    for dtype in (torch.float32, torch.bfloat16):
        for devices in ([], ["cpu"]):
            monkeypatch.setattr(switch, "devices", frozenset(devices))
            columns.append({name: (least, moved_bytes(work) / SIZE) for name, (least, work) in cases(dtype).items()})
    rows = []
    for name in columns[0]:
        plain, fused, plain_half, fused_half = (column[name] for column in columns)
        numbers = [fused[0], fused[1], plain[1], fused_half[0], fused_half[1], plain_half[1]]
        rows.append(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return rows


def test_the_documentation_has_the_bytes_that_operators_move(monkeypatch):
    interpreted(monkeypatch)
    rows = table(monkeypatch)
    page = (ROOT / "docs/kernels.md").read_text()
    missing = [row for row in rows if row not in page]
    assert not missing, "\n".join(rows)
    above = {
        "comparison": 4.6,
        "two norms, backward": 12.1,
    }  # the kernels move next to nothing above the least elsewhere
    for row in rows:
        name, least, fused, plain = row.split("|")[1:5]
        assert float(fused) <= float(least) + above.get(name.strip(), 0.1)
        assert float(plain) >= (1.3 if "norms" in name else 1.5) * float(fused)
