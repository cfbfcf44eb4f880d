"""Facts of a conversion record in words and with units, as several parts of the page name them."""

from collections.abc import Sequence

from qsd.report.record import DenseAccuracy, Metric, NeuronActivity, Record
from qsd.report.rendering import significant
from qsd.spiking.codes import Code, build_code


def main_metrics(accuracy: DenseAccuracy) -> list[Metric]:
    """The metrics of a detector or segmenter that are reported first: those at an IoU of 0.5, or means, or all.

    Args:
        accuracy: All metrics.
    """
    metrics = accuracy.metrics
    at_half = [metric for metric in metrics if metric.name.endswith("_50")]
    return at_half or [metric for metric in metrics if metric.name.startswith("m")] or metrics


def merging(record: Record) -> str:
    """The merging of convolutions.

    Args:
        record: What was measured.
    """
    merge, bits = record.conversion.merge, record.conversion.merged_bits
    words = {"all": "merged convolutions", "none": "unmerged convolutions"}.get(merge, f"only {merge} chains merged")
    return words if bits is None else f"{words} of {bits} bits"


def code(record: Record) -> Code:
    """The code of the spikes.

    Args:
        record: What was measured.
    """
    return build_code(record.conversion.code, record.model.time_steps)


def lossless_delay(record: Record) -> str:
    """The shortest lossless delay.

    Args:
        record: What was measured.
    """
    unary = record.conversion.code == "unary"
    return f"{'T − 1' if unary else '⌈log2(T + 1)⌉ − 1'} = {code(record).lossless_delay}"


def spikes_of_a_count(record: Record) -> str:
    """The spikes in which a count travels.

    Args:
        record: What was measured.
    """
    largest, steps = record.model.time_steps, code(record).steps
    if record.conversion.code == "unary":
        return f"a spike count n is n spikes in a window of T = {largest} time steps"
    return (
        f"a spike count from 0 to T = {largest} is its {steps} binary digits, most significant first, in a window of "
        f"{steps} time steps, and the currents of a spike are shifted by the place of its digit"
    )


def delays(record: Record) -> str:
    """The delay of the neurons.

    Args:
        record: What was measured.
    """
    delay = record.conversion.delay
    if delay is None:
        return f"the lossless delay {lossless_delay(record)} at every neuron"
    return f"a delay of {delay} at every neuron" if isinstance(delay, int) else "delays chosen neuron by neuron"


def evaluation(record: Record) -> str:
    """The way in which the spiking network was evaluated.

    Args:
        record: What was measured.
    """
    return "time step by time step" if record.accuracy.way == "simulate" else "in the count domain"


def measured(record: Record) -> str:
    """The images on which spikes were counted.

    Args:
        record: What was measured.
    """
    return f"Measured on {record.accuracy.images} images, {evaluation(record)}." if record.neurons else ""


def energy_measured(record: Record) -> str:
    """Images and prices of the energy.

    Args:
        record: What was measured.
    """
    energy = record.energy
    if energy is None:
        return ""
    return (
        f"Measured on {energy.images} images; preset {energy.preset}: {energy.mac_pj} pJ per MAC, "
        f"{energy.ac_pj} pJ per addition. Merged, unmerged and integer network: our counts; papers' formula: theirs."
    )


def mean_rate(neurons: Sequence[NeuronActivity]) -> float:
    """Mean firing rate over all neurons.

    Args:
        neurons: Spikes by layer, not empty.
    """
    total = sum(neuron.size for neuron in neurons)
    return sum(neuron.rate * neuron.size for neuron in neurons) / total


def in_bytes(size: float) -> str:
    """A number of bytes with its unit.

    Args:
        size: The number.
    """
    return f"{significant(size / 1e6)} MB" if size >= 1e6 else f"{significant(size / 1e3)} kB"
