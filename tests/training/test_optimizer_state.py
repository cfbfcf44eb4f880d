"""Optimizer states restored by the names of parameters, for any optimizer of timm."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from qsd import QsdError
from qsd.training.optimizer_state import add_names, restore_by_name


class Pair(nn.Module):
    """Two layers of equal shapes, in either order."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        layers = {name: nn.Linear(3, 3) for name in ("first", "second")}
        for name in order:
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.second(self.first(x).tanh())


def groups(model):
    weights = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.dim() == 1]}]


def trained(model, name, steps=3, state=None):
    """The optimizer after some steps on the model's own loss."""
    optimizer = create_optimizer_v2(groups(model), opt=name, lr=0.01)
    restore_by_name(optimizer, model)
    if state is not None:
        optimizer.load_state_dict(state)
    x = torch.linspace(-1, 1, 12).view(4, 3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "adafactor", "lookahead_adamw"])
def test_a_training_goes_on_the_same_after_parameters_have_moved(name):
    whole = Pair(["first", "second"])
    trained(whole, name, steps=6)
    before = Pair(["first", "second"])
    state = trained(before, name).state_dict()
    after = Pair(["second", "first"])
    after.load_state_dict(before.state_dict())
    trained(after, name, state=state)
    for key, parameter in whole.named_parameters():
        torch.testing.assert_close(after.get_parameter(key), parameter, rtol=1e-6, atol=1e-8)


def without_names(optimizer):
    state = optimizer.state_dict()
    state.pop("optimizer")
    for group in state["param_groups"]:
        group.pop("param_names")
    return state


def test_a_state_without_names_is_not_restored_by_position():
    state = without_names(trained(Pair(["first", "second"]), "adamw"))
    with pytest.raises(QsdError, match="no names of parameters"):
        trained(Pair(["second", "first"]), "adamw", state=state)


def test_names_follow_from_the_order_of_the_state_dict():
    before = Pair(["first", "second"])
    optimizer = trained(before, "adamw")
    moments = {key: optimizer.state[p]["exp_avg"] for key, p in before.named_parameters()}
    state = without_names(optimizer)
    after = Pair(["second", "first"])
    resumed = create_optimizer_v2(groups(after), opt="adamw", lr=0.01)
    restore_by_name(resumed, after)
    add_names(state, before.state_dict(), resumed)
    resumed.load_state_dict(state)
    for key, parameter in after.named_parameters():
        assert torch.equal(resumed.state[parameter]["exp_avg"], moments[key]), key


@pytest.mark.parametrize(("saved", "current"), [("adamw", "lamb"), ("sgd", "adamw")])
def test_the_state_of_another_optimizer_is_refused(saved, current):
    model = Pair(["first", "second"])
    optimizer = trained(model, saved)
    with pytest.raises(QsdError, match="this training uses"):
        trained(model, current, state=optimizer.state_dict())
    other = create_optimizer_v2(groups(model), opt=current, lr=0.01)
    restore_by_name(other, model)
    with pytest.raises(QsdError, match="another optimizer"):
        add_names(without_names(optimizer), model.state_dict(), other)


def test_other_groups_are_refused():
    model = Pair(["first", "second"])
    state = trained(model, "adamw").state_dict()
    optimizer = create_optimizer_v2(model.parameters(), opt="adamw", lr=0.01)
    restore_by_name(optimizer, model)
    with pytest.raises(QsdError, match="other parameter groups"):
        optimizer.load_state_dict(state)
