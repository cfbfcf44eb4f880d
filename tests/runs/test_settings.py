"""Settings that a resumed training changes."""

import os

import pytest
import torch

from qsd.tasks.optimization import Schedule
from qsd.tasks.random_state import RandomStates
from qsd.training.optimizer_state import restore_by_name


def build(per_epoch, total, lr=0.1, **options):
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": lr, "weight_decay": 0.1}, {"params": [model.bias], "lr": lr / 10}]
    optimizer = torch.optim.AdamW(groups, **options)
    restore_by_name(optimizer, model, {"lr", "weight_decay", *options})
    return optimizer, Schedule(optimizer, lambda step: 1 - step / total, per_epoch)


def resume(before, after, steps):
    optimizer, schedule = before
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    states = optimizer.state_dict(), schedule.state_dict()
    after[0].load_state_dict(states[0])
    after[1].load_state_dict(states[1])
    return states


def rates(built):
    return [group["lr"] for group in built[0].param_groups]


def test_the_same_settings_give_the_same_rates():
    whole, first, second = build(10, 30), build(10, 30), build(10, 30)
    resume(first, second, 20)
    for _ in range(20):
        whole[1].step()
    assert rates(second) == rates(whole)
    whole[1].step()
    second[1].step()
    assert rates(second) == rates(whole)


def test_another_rate_and_other_options_count_from_now_on():
    after = build(10, 30, lr=0.4, betas=(0.8, 0.9))
    resume(build(10, 30), after, 15)
    assert rates(after) == pytest.approx([0.2, 0.02])
    assert after[0].param_groups[0]["betas"] == (0.8, 0.9)
    after[1].step()
    assert rates(after) == pytest.approx([0.4 * 14 / 30, 0.04 * 14 / 30])


def test_another_number_of_steps_in_an_epoch_keeps_the_share_of_the_epochs():
    # three epochs of 10 steps; after two of them, the third one has 5 steps, of three that would have 15
    after = build(5, 15)
    resume(build(10, 30), after, 20)
    for left in range(4, -1, -1):
        after[1].step()
        assert rates(after)[0] == pytest.approx(0.1 * left / 15)
    again = build(5, 15)  # resumed once more, with the same batches
    again[1].load_state_dict(after[1].state_dict())
    assert again[1].last_epoch + again[1].shift == 15


def test_another_seed_keeps_its_own_random_states(monkeypatch):
    states = RandomStates()
    for seed, kept in (("1", True), ("2", False)):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        states.on_load_checkpoint(None, None, {"random_states": [{}], "random_seed": "1"})
        assert (states._states is not None) == kept
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert "PL_GLOBAL_SEED" not in os.environ
    states.on_load_checkpoint(None, None, {"random_states": [{}]})  # of version 0.1.0
    assert states._states is not None
