from itertools import chain

import numpy as np
import pytest

from qsd.data import EvalSampler, TrainSampler, stratified_split
from qsd.errors import QsdError

WORLDS = [1, 2, 3, 4, 8]


def train(length, seed=0, epoch=0, world=1, rank=0):
    sampler = TrainSampler(range(length), seed, world, rank)
    sampler.set_epoch(epoch)
    return sampler


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [8, 9, 15, 16, 17, 31, 100])
def test_evaluation_sees_every_image_once(length, world):
    samplers = [EvalSampler(range(length), world, rank) for rank in range(world)]
    seen = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(indices) for indices in seen]
    assert sorted(chain(*seen)) == list(range(length))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


def test_evaluation_with_fewer_images_than_processes_is_an_error():
    with pytest.raises(QsdError, match=r"3 image\(s\) cannot be evaluated by 4 processes.*--trainer.devices 3"):
        EvalSampler(range(3), 4, 0)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("length", [1, 3, 8, 9, 15, 100])
def test_training_shares_are_equal_and_disjoint(length, world):
    samplers = [train(length, epoch=3, world=world, rank=rank) for rank in range(world)]
    seen = [[index for _, index in sampler] for sampler in samplers]
    assert {len(indices) for indices in seen} == {len(sampler) for sampler in samplers} == {max(1, length // world)}
    together = list(chain(*seen))
    assert set(together) <= set(range(length))
    assert len(set(together)) == (len(together) if length >= world else length)


def test_all_images_are_used_where_they_divide():
    assert sorted(index for rank in range(4) for _, index in train(32, world=4, rank=rank)) == list(range(32))


def test_order_is_a_function_of_seed_and_epoch():
    orders = {(seed, epoch): tuple(train(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    # also (0, 1) and (1, 0), which torch's `seed + epoch` would make the same
    assert len({tuple(index for _, index in order) for order in orders.values()}) == 9
    assert all({epoch for epoch, _ in order} == {key[1]} for key, order in orders.items())
    assert orders[1, 2] == tuple(train(50, 1, 2))


def test_order_is_fixed_for_ever():
    # stored: a release that changes these numbers breaks the resumption of running experiments
    assert list(train(8, seed=1, epoch=2)) == [(2, index) for index in [6, 4, 7, 1, 2, 5, 0, 3]]


def test_global_batches_do_not_depend_on_the_number_of_processes():
    one = list(train(24))
    two = [list(train(24, world=2, rank=rank)) for rank in range(2)]
    for step in range(4):
        together = two[0][3 * step : 3 * step + 3] + two[1][3 * step : 3 * step + 3]
        assert sorted(together) == sorted(one[6 * step : 6 * step + 6])


def test_skip_leaves_out_the_start_and_keeps_the_length():
    sampler = train(10)
    whole = list(sampler)
    sampler.skip = 4
    assert list(sampler) == whole[4:]
    assert len(sampler) == 10


@pytest.mark.parametrize("sizes", [(700, 100, 200), (1, 999), (333, 333, 334), (10, 20)])
def test_stratified_split(sizes):
    labels = np.random.RandomState(1).choice(5, 1000, p=[0.4, 0.3, 0.2, 0.07, 0.03])
    parts = stratified_split(labels, sizes)
    assert [len(part) for part in parts] == list(sizes)
    together = np.concatenate(parts)
    assert len(np.unique(together)) == sum(sizes)
    for part in parts:
        exact = np.bincount(labels, minlength=5) * len(part) / 1000
        assert np.abs(np.bincount(labels[part], minlength=5) - exact).max() < 2
