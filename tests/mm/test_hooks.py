"""Hooks of mmengine's Runner."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import nn

from qsd import QsdError
from qsd.mm import NeuronInitializationHook, SpikeConv2d, SpikeStatisticsHook, StepSizeHook
from qsd.neurons import LsqNeuron


def runner(model):
    hub = MessageHub.get_instance("test_hooks")
    return SimpleNamespace(model=model, iter=6, message_hub=hub, logger=logging.getLogger(__name__))


def test_a_step_size_that_collapses_stops_the_training_and_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), SpikeConv2d(4, 4, 1))
    StepSizeHook().after_train_iter(runner(model), 0)
    model[1].proj.conv.quantizer.step.data[2] = -0.25
    with pytest.raises(QsdError, match=r"1\.proj\.conv\.quantizer is -0\.25 at iteration 7"):
        StepSizeHook().after_train_iter(runner(model), 0)


def test_a_neuron_s_step_is_watched_as_those_of_weights_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LsqNeuron(4))
    StepSizeHook().after_train_iter(runner(model), 0)
    model[1].step.data.fill_(0.0)
    with pytest.raises(QsdError, match="a step size of 1 is 0 at iteration 7"):
        StepSizeHook().after_train_iter(runner(model), 0)


def test_firing_rates_are_spikes_over_neurons_and_steps():
    # T = 4, threshold 1/4: these currents make 0, 2, 4 and 1 spikes per position, 7 of 16 possible ones.
    model = nn.Sequential(SpikeConv2d(4, 1, 1), SpikeConv2d(1, 1, 1))
    nn.init.zeros_(model[0].proj.conv.weight)
    nn.init.zeros_(model[0].proj.conv.bias)
    currents = torch.tensor([-1.0, 0.5, 3.0, 0.2]).view(1, 4, 1, 1).expand(2, 4, 3, 5)
    hook, metrics = SpikeStatisticsHook(per_layer=True), {}
    hook.before_run(runner(model))
    hook.before_val_epoch(runner(model))
    for _ in range(2):
        model(currents)
    hook.after_val_epoch(runner(model), metrics)
    assert metrics["spikes/rate/0.neuron"] == pytest.approx(7 / 16)
    # The second neuron sees zeros; it has a quarter of the first one's elements.
    assert metrics["spikes/rate"] == pytest.approx(7 / 20)
    assert runner(model).message_hub.get_scalar("val/spikes/rate").current() == pytest.approx(7 / 20)
    model(currents)  # nothing is counted outside
    assert not any(module._forward_hooks for module in model.modules())


def test_a_neuron_that_does_not_exist_is_named():
    with pytest.warns(FutureWarning, match="per_layer"):
        hook = SpikeStatisticsHook(neurons=["head"])
    with pytest.raises(QsdError, match="no neuron 'head'"):
        hook.before_run(runner(SpikeConv2d(1, 1, 1)))


def test_only_the_first_batches_are_measured():
    model, hook, metrics = SpikeConv2d(1, 1, 1), SpikeStatisticsHook(batches=1), {}
    hook.before_val_epoch(runner(model))
    for index, current in enumerate((0.5, 3.0)):  # two spikes of four, then four
        model(torch.full((1, 1, 2, 2), current))
        hook.after_val_iter(runner(model), index)
    hook.after_val_epoch(runner(model), metrics)
    assert metrics == {"spikes/rate": pytest.approx(0.5)}


class Twice(BaseModel):
    """A model with a neuron of a learned step, whose loss doubles its input first."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(LsqNeuron(4))

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return {"loss": self.backbone(2 * inputs).mean()}


def test_learned_steps_are_set_from_the_first_batch_of_a_training():
    model, images = Twice(), torch.rand(3, 8)
    hook = NeuronInitializationHook()
    hook.before_train_iter(runner(model), 0, {"inputs": images})
    expected = 2 * (2 * images).abs().mean() / 4**0.5
    assert model.backbone[0].step.item() == pytest.approx(expected.item())
    hook.before_train_iter(runner(model), 1, {"inputs": 5 * images})
    assert model.backbone[0].step.item() == pytest.approx(expected.item()), "once"


def test_learned_steps_of_a_checkpoint_are_not_replaced():
    model = Twice()
    model.backbone[0].step.data.fill_(0.3)
    hook = NeuronInitializationHook()
    hook.after_load_checkpoint(runner(model), {})
    hook.before_train_iter(runner(model), 0, {"inputs": torch.rand(3, 8)})
    assert model.backbone[0].step.item() == pytest.approx(0.3)
    model.backbone.steps_are_set = True  # weights of the backbone alone, which contain its step sizes
    NeuronInitializationHook().before_train_iter(runner(model), 0, {"inputs": torch.rand(3, 8)})
    assert model.backbone[0].step.item() == pytest.approx(0.3)
