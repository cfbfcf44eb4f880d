"""Bits that operations outside of layers move: means over positions, interpolation, and what no layer accounts for."""

from qsd.spiking.layers.movement import NETWORKS, Moved, Movement, Network, Signal, Traffic


def sums_movement(
    images: float, passes: float, values: float, outputs: float, additions: float, signal: Signal
) -> Movement:
    """Sums over positions, of spikes or of currents, which come in every time step.

    Args:
        images: Number of images.
        passes: Number of images times the steps of their windows.
        values: Values of the input per image.
        outputs: Sums per image.
        additions: Additions of the spiking network: one for each spike, or for each current in every step.
        signal: Range of the values, summed over the window.
    """
    total = signal.times(max(1.0, values / outputs))
    parts: dict[Network, list[Traffic]] = {}
    for network in NETWORKS:
        spiking, sums = network in ("merged", "unmerged"), total.bits(network)
        times, added = (passes, additions) if spiking else (images, images * values)
        value = 1 if spiking and signal.sources else signal.bits(network)  # Spikes have one bit in each step.
        events = Moved(0.0, added * sums, added * sums, added * value)
        written = times * outputs * sums
        reuse = Moved(0.0, written if spiking else 0.0, written, times * values * value)
        parts[network] = [Traffic(values * value + outputs * sums, events, reuse)]
    return Movement(parts, total)


def once_movement(images: float, values: float, outputs: float, signal: Signal) -> Movement:
    """An operation on currents that are summed over the window: its input is read and its output is written once.

    Args:
        images: Number of images.
        values: Values of the input per image.
        outputs: Values of the output per image.
        signal: Range of the values.
    """
    parts: dict[Network, list[Traffic]] = {}
    for network in NETWORKS:
        bits = signal.bits(network)
        read, written = images * values * bits, images * outputs * bits
        events, reuse = (Moved(activations_read=read, activations_written=written) for _ in range(2))
        parts[network] = [Traffic((values + outputs) * bits, events, reuse)]
    return Movement(parts, signal)
