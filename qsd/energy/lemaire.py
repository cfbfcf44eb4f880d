"""The analytical model of Lemaire et al. (2022), which papers use beside the count of operations.

Lemaire, Cordone, Castagnetti, Novac, Courtois and Miramond, "An Analytical Estimation of Spiking Neural Networks
Energy Efficiency", ICONIP 2022: 32-bit integer operations (0.1 pJ an addition, 3.1 pJ a multiplication), addresses that
are computed for every spike, and 32-bit accesses to a memory of its own for weights, potentials and spikes. The energy
of an access is interpolated linearly between 8 KiB, 32 KiB and 1 MiB (10, 20, 100 pJ), and stays at the last value
beyond.
"""

from itertools import pairwise

from qsd.spiking.layers.movement import Words

ADD_PJ, MULTIPLY_PJ = 0.1, 3.1
_POINTS = ((0.0, 0.0), (2048.0, 10.0), (8192.0, 20.0), (262144.0, 100.0))  # words of 32 bits, pJ


def access_pj(capacity: float) -> float:
    """Energy in pJ of one access.

    Args:
        capacity: Words of 32 bits that the memory holds.
    """
    capacity = min(max(capacity, 0.0), _POINTS[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(_POINTS) if capacity <= pair[1][0])
    return y0 + (y1 - y0) * (capacity - x0) / (x1 - x0)


def lemaire_pj(words: Words) -> float:
    """Energy in pJ of operations and accesses.

    Args:
        words: Their numbers.
    """
    mac = ADD_PJ + MULTIPLY_PJ
    operations = (words.additions + words.addressing_additions) * ADD_PJ + (words.macs + words.addressing_macs) * mac
    return operations + sum(number * access_pj(capacity) for capacity, number in words.accesses.items())
