"""One converted network in several threads, and its copies."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qsd import audit_spike_driven, measure_energy
from qsd.spiking import count_spikes, to_spike_driven
from tests.helpers.networks import dense_network

USES = {
    "count domain": lambda spiking, images: spiking(images),
    "counts": lambda spiking, images: sum(counts.sum() for counts in count_spikes(spiking, images).values()),
    "lossless steps": lambda spiking, images: spiking.simulate(images).logits,
    "early steps": lambda spiking, images: spiking.simulate(images, delay=0, record="head*").logits,
    "clock": lambda spiking, images: spiking.stream([images]).logits[0],
    "latency": lambda spiking, _: torch.tensor([spiking.latency(0), spiking.latency(5), spiking.interval(2)]),
    "energy": lambda spiking, images: torch.tensor(measure_energy(spiking, images, progress=False).total),
    "audit": lambda spiking, images: torch.tensor(len(audit_spike_driven(spiking, images).operations)),
}


def test_calls_from_several_threads_do_not_touch_each_other():
    spiking = to_spike_driven(dense_network("csdformer_4_256", time_steps=2))
    images = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    jobs = [(use, i) for i in range(len(images)) for use in USES]
    expected = {job: USES[job[0]](spiking, images[job[1]]) for job in jobs}
    spiking._timings.clear()  # so that threads trace the network while others run it
    start = threading.Barrier(4)

    def work(offset):
        start.wait()
        mine = jobs[offset::4] + jobs[:offset]
        return [(job, USES[job[0]](spiking, images[job[1]])) for job in mine]

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(4)):
            for job, result in results:
                assert torch.equal(result, expected[job]), job


@pytest.mark.parametrize("name", ["qsd_tiny", "csdformer_4_256"])
def test_copies_and_pickles_give_the_same_bits(name):
    spiking = to_spike_driven(dense_network(name, time_steps=2))
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    saved = io.BytesIO()
    torch.save(spiking, saved)
    saved.seek(0)
    copies = [copy.deepcopy(spiking), pickle.loads(pickle.dumps(spiking)), torch.load(saved, weights_only=False)]
    for use in ("count domain", "early steps", *(["clock"] if name == "csdformer_4_256" else [])):
        expected = USES[use](spiking, images)
        assert all(torch.equal(USES[use](other, images), expected) for other in copies), use
    assert all(other.runtime is not spiking.runtime for other in copies)
