"""Hooks of mmengine's Runner."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from qsd import QsdError
from qsd.mm import SpikeConv2d, SpikeStatisticsHook, StepSizeHook
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
    hook, metrics = SpikeStatisticsHook(neurons=["0.neuron"]), {}
    hook.before_run(runner(model))
    hook.before_val_epoch(runner(model))
    for _ in range(2):
        model(currents)
    hook.after_val_epoch(runner(model), metrics)
    assert metrics["spikes/0.neuron"] == pytest.approx(7 / 16)
    # The second neuron sees zeros; it has a quarter of the first one's elements.
    assert metrics["spikes/mean"] == pytest.approx(7 / 20)
    assert runner(model).message_hub.get_scalar("val/spikes/mean").current() == pytest.approx(7 / 20)
    model(currents)  # nothing is counted outside
    assert not any(module._forward_hooks for module in model.modules())


def test_a_neuron_that_does_not_exist_is_named():
    with pytest.raises(QsdError, match="no neuron 'head'"):
        SpikeStatisticsHook(neurons=["head"]).before_run(runner(SpikeConv2d(1, 1, 1)))
