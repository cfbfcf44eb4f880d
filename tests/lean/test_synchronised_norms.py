"""Norms that share their statistics with other processes: the results of one process with the whole batch."""

import copy
import threading

import pytest
import torch
from torch import distributed, nn

from qsd import set_lean
from qsd.layers import QuantConv2d, conv_norm, rep_conv
from qsd.lean import group_of
from qsd.neurons import LsqNeuron, SpikeNeuron
from tests.helpers import long
from tests.helpers.networks import randomize_norms
from tests.helpers.processes import run_in_two


class Processes:
    """Two processes, each a thread, that exchange tensors in the place of `torch.distributed`."""

    def __init__(self, monkeypatch):
        self.barrier, self.values, self.rank = threading.Barrier(2, timeout=60), {}, threading.local()
        monkeypatch.setattr(distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(distributed, "get_world_size", lambda group: 2)
        monkeypatch.setattr(distributed, "all_gather", self.gather)

    def gather(self, parts, value, group):
        assert group is self
        self.values[self.rank.value] = value.clone()
        self.barrier.wait()
        for rank, part in enumerate(parts):
            part.copy_(self.values[rank])
        self.barrier.wait()

    def run(self, function, arguments):
        results, errors = [None, None], []

        def process(rank):
            self.rank.value = rank
            try:
                results[rank] = function(*arguments[rank])
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=process, args=[rank]) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


def trained(model, images, cotangent):
    images = images.clone().requires_grad_()
    output = model(images)
    (output * cotangent).sum().backward()
    return output.detach(), images.grad, [p.grad for p in model.parameters()], list(model.buffers())


@pytest.mark.parametrize("images_of_first", [2, 0])  # of five
@pytest.mark.parametrize(
    "layers",
    [
        lambda: [SpikeNeuron(4), rep_conv(4, layer_scale=0.5), SpikeNeuron(4), QuantConv2d(4, 3, 1)],
        lambda: [conv_norm(4, 6, 1), LsqNeuron(4), conv_norm(6, 4, 3)],
    ],
    ids=["fixed", "learned"],
)
def test_two_processes_have_the_results_of_one_with_all_images(layers, images_of_first, monkeypatch):
    model = randomize_norms(nn.Sequential(*layers()), weight=(0.01, 2)).double().train()
    images = torch.randn(5, 4, 6, 5, dtype=torch.float64)
    whole = copy.deepcopy(model)
    set_lean(whole, False)
    cotangent = torch.randn_like(whole.eval()(images))
    output, images_grad, gradients, buffers = trained(whole.train(), images, cotangent)
    processes = Processes(monkeypatch)
    set_lean(model, True)
    sizes = [images_of_first, 5 - images_of_first]
    parts = zip(images.split(sizes), cotangent.split(sizes))
    copies = [nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model), None) for _ in range(2)]
    for norm in (m for c in copies for m in c.modules() if isinstance(m, nn.SyncBatchNorm)):
        norm.process_group = processes
        assert group_of(norm) is processes
    results = processes.run(trained, [(model, *part) for model, part in zip(copies, parts)])
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.cat([r[0] for r in results]), output, **close)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), images_grad, **close)
    for name, *parts, expected in zip(dict(model.named_parameters()), *(r[2] for r in results), gradients):
        torch.testing.assert_close(sum(parts), expected, **close, msg=lambda m: f"{name}: {m}")  # noqa: B023
    for first, second, expected in zip(*(r[3] for r in results), buffers):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected, **close)


@long  # the same in real processes
@pytest.mark.skipif(not distributed.is_gloo_available(), reason="gloo is not built in")
def test_processes_share_statistics_by_gloo():
    run_in_two("synchronised_norms.py", timeout=240)
