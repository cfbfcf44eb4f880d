"""Networks over the frames of recordings: memories, conversion, one clock, and a task that needs time."""

import itertools
from fractions import Fraction

import pytest
import timm
import torch
from torch.nn import functional as F

from qsd import QsdError, audit_spike_driven, count_spikes, to_spike_driven
from qsd.layers.frames import FRAME_MODES, FrameAxis
from qsd.layers.steps import step_names
from qsd.models.frames import FrameOptions
from qsd.neurons import SpikeNeuron
from qsd.recurrence import FrameMemory
from qsd.spiking.clock import Clock
from qsd.spiking.layers import DelayedNeuron, HalfEvenNeuron
from qsd.spiking.results import Trace
from qsd.spiking.runtime import Runtime
from tests.helpers import sample
from tests.helpers.networks import dense_network, small

NAMES = ["qsd_tiny", "csdformer_4_256", "e_spikeformer_tiny", "e_spikeformer_83m"]


# -- one neuron, against its recursion in exact fractions --------------------------------------------------------------


def exact_counts(frames, threshold, decay, time_steps, half_even=False):
    """Counts of a train of inputs, one for each frame, by the published recursion."""
    potential, count, counts = Fraction(0), 0, []
    for number, z in enumerate(frames):
        left = decay * (potential - count) if number else 0
        potential = left + Fraction(z, threshold)
        floor = (potential + Fraction(1, 2)).__floor__()
        if half_even and potential + Fraction(1, 2) == floor and floor % 2:
            floor -= 1
        count = min(max(floor, 0), time_steps)
        counts.append(count)
    return counts


def trains(frames, steps, values):
    """All trains of integer currents, ``[number, F, steps]``."""
    return torch.tensor(list(itertools.product(values, repeat=frames * steps))).view(-1, frames, steps)


CASES = [  # T, frames, currents, code, rounding
    (1, 3, range(-3, 5), "unary", "half_up"),
    (2, 2, range(-3, 5), "unary", "half_up"),
    (2, 3, range(-1, 3), "unary", "half_even"),
    (3, 2, range(-1, 3), "unary", "half_up"),
    (2, 2, range(-3, 5), "binary", "half_up"),
    (3, 3, range(-1, 3), "binary", "half_up"),
    (3, 2, range(-3, 5), "binary", "half_even"),
]


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 1.0])
def test_steps_and_clock_equal_the_recursion_for_all_short_trains(decay):
    for time_steps, frames, values, code, rounding in sample([CASES[0], CASES[2], CASES[4], CASES[6]], CASES):
        trained = SpikeNeuron(time_steps, threshold=2.0, rounding=rounding)
        trained.memory = FrameMemory(frames, decay)
        runtime = Runtime(time_steps, code)
        kind = HalfEvenNeuron if rounding == "half_even" else DelayedNeuron
        neuron = kind(trained, "n", runtime.code.lossless_delay, runtime)
        currents = trains(frames, runtime.code.steps, values)
        sums = currents.sum(2)
        expected = torch.tensor(
            [exact_counts(z, 2, Fraction(decay), time_steps, rounding == "half_even") for z in sums.tolist()]
        )
        rows = currents.double().permute(2, 1, 0)  # [steps, F, B]
        with runtime.running("step", trace=Trace(torch.empty(0), 0)) as run:
            neuron.step(False, rows.flatten())
        case = (time_steps, frames, code, rounding)
        assert torch.equal(run.trace.counts["n"].view(frames, -1).T.long(), expected), case
        assert torch.equal(trained.counts(sums.T.double().flatten()).view(frames, -1).T.long(), expected), case
        with runtime.running("count"):
            assert torch.equal(neuron.count(sums.T.double().flatten()).view(frames, -1).T.long(), expected), case
        found = []
        interval = neuron.busy_steps()
        with runtime.running("clock"), runtime.counting(lambda _, counts, found=found: found.append(counts)):
            clock = Clock(runtime.code.steps, 2 * frames, interval, frames)
            for _ in range((2 * frames - 1) * interval + interval):
                clock.advance()
                number, step = clock.image(0)
                inside = 1 <= step <= runtime.code.steps
                x = rows[step - 1, number % frames] if inside else torch.zeros(len(currents), dtype=torch.float64)
                neuron.tick(clock.window("n", 0, False), x.clone())
        twice = torch.stack(found, 1).long()
        assert torch.equal(twice, torch.cat([expected, expected], 1)), (case, "a recording sees the one before it")


def test_the_gradient_runs_through_time_by_the_decay():
    neuron = SpikeNeuron(4, threshold=1.0, amplitude=1.0)
    neuron.memory = FrameMemory(3, 0.5)
    x = torch.tensor([1.2, 0.7, 1.1], requires_grad=True)  # all potentials lie between 0 and T
    neuron(x)[2].backward()
    assert x.grad.tolist() == [0.25, 0.5, 1.0]


# -- networks ----------------------------------------------------------------------------------------------------------


def over_frames(name, mode, frames=3, events=True, decay=0.5):
    channels = 2 * frames if mode == "channels" else 2
    model = dense_network(name, depth=2, in_chans=channels)
    FrameOptions(frames, mode, decay, events).apply(model)
    return model


def recordings(number, frames=3, side=32):
    return torch.poisson(torch.full((number, frames, 2, side, side), 0.8)).double()


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_every_family_are_the_same_counts_in_all_forms(name):
    x = recordings(2)
    for mode, code in sample([("membrane", "unary")], [(m, c) for m in FRAME_MODES for c in ("unary", "binary")]):
        model = over_frames(name, mode)
        spiking = to_spike_driven(model, code=code)
        expected, counted, trace = count_spikes(model, x), count_spikes(spiking, x), spiking.simulate(x, record="*")
        assert "event_counts" in expected
        for neuron, counts in expected.items():
            assert torch.equal(counts, counted[neuron]), (mode, code, neuron)
            assert torch.equal(counts, trace.counts[neuron].double()), (mode, code, neuron)
        torch.testing.assert_close(trace.logits, model(x), rtol=1e-9, atol=1e-9)
        audit = audit_spike_driven(spiking, x)
        assert not any(o.stem for o in audit.operations)
        assert audit.spike_driven or name == "e_spikeformer_83m"
        if name in ("qsd_tiny", "csdformer_4_256"):
            _check_clock(spiking, x, trace, mode)


def _check_clock(spiking, x, trace, mode):
    """Two recordings after one another give what each gives alone, frame by frame."""
    stream = spiking.stream([x[:1], x[1:]], record="*")
    frames = 1 if mode == "channels" else 3
    torch.testing.assert_close(torch.cat(stream.logits), trace.logits, rtol=1e-9, atol=1e-9)
    assert stream.finished[0] == spiking.latency()
    for neuron, counts in trace.counts.items():
        alone = counts.unflatten(0, (frames, 2)).transpose(0, 1).flatten(0, 1)
        assert torch.equal(torch.cat(stream.counts[neuron]), alone), neuron


def test_decay_0_is_average_and_one_frame_is_an_image():
    x = recordings(2)
    torch.manual_seed(0)
    model = over_frames("qsd_tiny", "membrane", decay=0.0)
    expected = model(x)
    for module in model.modules():
        if isinstance(module, SpikeNeuron):
            module.memory = None
    assert torch.equal(model(x), expected)
    image = dense_network("csdformer_4_256", in_chans=2)
    frame = recordings(2, 1)
    expected = image(frame[:, 0])
    FrameOptions(1, "membrane", 0.7).apply(image)
    assert torch.equal(image(frame), expected)


def test_a_sample_does_not_see_its_neighbours_nor_what_ran_before():
    x = recordings(4)
    model = over_frames("qsd_tiny", "membrane", decay=0.9)
    spiking = to_spike_driven(model)
    expected = [network(x) for network in (model, spiking)]
    alone = spiking.simulate(x[2:3])
    order = torch.tensor([3, 1, 0, 2])
    for network, logits in zip((model, spiking), expected):
        torch.testing.assert_close(network(x[2:3]), logits[2:3], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(network(x[order]), logits[order], rtol=1e-12, atol=1e-12)

    def fail(*_):
        raise RuntimeError("stop")

    for network, head in ((model, model.head), (spiking, spiking.network.head)):
        handle = head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            network(x)
        with pytest.raises(RuntimeError, match="stop"):
            spiking.simulate(x) if network is spiking else network(x.flip(0))
        handle.remove()
    assert torch.equal(model(x), expected[0])
    assert torch.equal(spiking(x), expected[1])
    again = spiking.simulate(x[2:3])
    assert all(torch.equal(counts, again.counts[name]) for name, counts in alone.counts.items())


def test_wrong_arguments_and_inputs_are_refused():
    with pytest.raises(QsdError, match="over_frames='mean' is unknown"):
        small("qsd_tiny", frames=2, over_frames="mean")
    with pytest.raises(QsdError, match="needs the number of frames"):
        small("qsd_tiny", over_frames="membrane")
    with pytest.raises(QsdError, match=r"decay=1\.5 is not from 0 to 1"):
        small("qsd_tiny", frames=2, over_frames="membrane", decay=1.5)
    with pytest.raises(QsdError, match="a float twin has none"):
        small("qsd_tiny_ann", frames=2, over_frames="membrane")
    with pytest.raises(QsdError, match=r"recordings \[B, F, C, H, W\] with F=2"):
        small("qsd_tiny", frames=2)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(QsdError, match="frames=0 is not from"):
        FrameAxis(0)


def test_a_registered_network_is_rebuilt_with_its_frames():
    model = small("qsd_tiny", in_chans=2, frames=3, over_frames="channels", events=True)
    again = timm.create_model("qsd_tiny", **model.registered["arguments"])
    assert (again.in_chans, again.frame_axis.frames) == (6, 3)
    assert model.registered["arguments"]["in_chans"] == 2


# -- a task that needs time --------------------------------------------------------------------------------------------


def _moving_bars(number, generator):
    """Bars that move over three frames, and the same frames in reversed order; labels 0 and 1."""
    frames = torch.zeros(number, 3, 1, 8, 8)
    start = torch.randint(0, 4, (number,), generator=generator)
    row = torch.randint(0, 6, (number,), generator=generator)
    for k in range(number):
        for f in range(3):
            frames[k, f, 0, row[k] : row[k] + 3, start[k] + 2 * f] = 2.0
    labels = torch.arange(number) % 2
    return torch.where(labels.view(-1, 1, 1, 1, 1) == 1, frames.flip(1), frames), labels, frames


def _order_network(mode):
    torch.manual_seed(0)
    sizes = {"embed_dims": (16, 16, 16, 16), "num_heads": 2, "depth": 2, "strides": (2, 1, 2, 1, 1), "layer_scale": 0.5}
    return timm.create_model(
        "qsd_tiny", **sizes, num_classes=2, in_chans=1, frames=3, over_frames=mode, decay=0.8, events=True
    )


def test_the_order_of_frames_is_seen_by_membranes_alone():
    generator = torch.Generator().manual_seed(0)
    (x, y, _), (_, _, forward) = _moving_bars(256, generator), _moving_bars(64, generator)
    test_x, test_y = torch.cat([forward, forward.flip(1)]), torch.arange(2).repeat_interleave(64)
    average = _order_network("average").eval()
    with torch.no_grad():
        torch.testing.assert_close(average(test_x), average(test_x.flip(1)), rtol=1e-5, atol=1e-6)
        assert (average(test_x).argmax(1) == test_y).double().mean() == 0.5, "identical outputs are right half the time"
    model = _order_network("membrane")
    steps = step_names(model)
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if name not in steps], 0.02)
    # A rate that falls to zero lets the running statistics reach those of the final weights.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 50)
    order = torch.Generator().manual_seed(1)
    for _ in range(50):
        chosen = torch.randperm(256, generator=order)[:32]
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        assert (model(test_x).argmax(1) == test_y).double().mean() >= 0.95
