"""Optimizer states restored by the names of parameters, for any optimizer of timm."""

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from qsd import QsdError
from qsd.tasks.optimization import parameter_groups
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
    add_names(state, before.state_dict(), resumed, after)
    resumed.load_state_dict(state)
    for key, parameter in after.named_parameters():
        assert torch.equal(resumed.state[parameter]["exp_avg"], moments[key]), key


def test_names_follow_for_groups_by_layer():
    # Version 0.1.0 had the layer scales as first parameters of a block, which came before all others of its layer.
    sizes = {"embed_dims": (8, 8, 16, 24), "num_heads": 4, "depth": 4, "num_classes": 5}
    model = timm.create_model("qsd_tiny", **sizes)
    named = dict(model.named_parameters())
    old = {}
    for name in model.state_dict():
        block, _, rest = name.partition(".attn.")
        if rest and f"{block}.layer_scale1" not in old:
            old[f"{block}.layer_scale1"] = f"{block}.attn.proj.layer_scale.gamma"
            old[f"{block}.layer_scale2"] = f"{block}.mlp.fc2.layer_scale.gamma"
        if "layer_scale" not in name:
            old[name] = name
    timms = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    layer = {id(p): index for index, group in enumerate(timms) for p in group["params"]}
    saved = {}  # groups of timm by first appearance, each split into step sizes and the others
    for present in old.values():
        if present in named:
            saved.setdefault(layer[id(named[present])], ([], []))[present.endswith(".step")].append(present)
    saved = [names for pair in saved.values() for names in pair if names]
    resumed = create_optimizer_v2(parameter_groups(model, 1.0, 0.01, 0.05, 0.5), opt="adamw", lr=1.0)
    options = {key: value for key, value in resumed.state_dict()["param_groups"][0].items() if key != "params"}
    restore_by_name(resumed, model)
    order = [name for names in saved for name in names]
    moments = {name: torch.randn_like(named[name]) for name in order}
    counters = iter(range(len(order)))
    state = {
        "state": {i: {"exp_avg": moments[name], "step": torch.tensor(1.0)} for i, name in enumerate(order)},
        "param_groups": [{**options, "params": [next(counters) for _ in names]} for names in saved],
    }
    add_names(state, old, resumed, model)
    resumed.load_state_dict(state)
    for name, moment in moments.items():
        assert torch.equal(resumed.state[named[name]]["exp_avg"], moment), name


@pytest.mark.parametrize(("saved", "current"), [("adamw", "lamb"), ("sgd", "adamw")])
def test_the_state_of_another_optimizer_is_refused(saved, current):
    model = Pair(["first", "second"])
    optimizer = trained(model, saved)
    with pytest.raises(QsdError, match="this training uses"):
        trained(model, current, state=optimizer.state_dict())
    other = create_optimizer_v2(groups(model), opt=current, lr=0.01)
    restore_by_name(other, model)
    with pytest.raises(QsdError, match="another optimizer"):
        add_names(without_names(optimizer), model.state_dict(), other, model)


def test_other_groups_are_refused():
    model = Pair(["first", "second"])
    state = trained(model, "adamw").state_dict()
    optimizer = create_optimizer_v2(model.parameters(), opt="adamw", lr=0.01)
    restore_by_name(optimizer, model)
    with pytest.raises(QsdError, match="other parameter groups"):
        optimizer.load_state_dict(state)
