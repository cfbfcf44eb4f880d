"""Prices of the operations and the traffic of one layer."""

from dataclasses import asdict

from qsd.energy.accounts import Row
from qsd.energy.comparison import break_even
from qsd.energy.lemaire import lemaire_pj
from qsd.energy.prices import Prices
from qsd.energy.table import Energy, LayerEnergy
from qsd.spiking.layers.movement import FLOWS, NETWORKS, Flow, Network

_MJ = 1e-9  # mJ in a pJ


def price(layer: LayerEnergy, row: Row, energy: Energy, papers: float) -> None:
    """Turn the operations of a layer in all runs into numbers per image, and price them.

    Args:
        layer: The layer; it is completed in place.
        row: Its traffic in all runs.
        energy: The measurement, for prices and the number of images.
        papers: Firing rate times T times dense operations, in all runs.
    """
    images, prices = energy.images, energy.prices
    for numbers in (layer.additions, layer.macs):
        numbers.update({key: value / images for key, value in numbers.items()})
    layer.spikes /= images
    if layer.zero_skipping is not None:
        layer.zero_skipping /= images
    mac, ac = prices.mac_pj * _MJ, prices.ac_pj * _MJ
    integer = layer.macs["integer"]
    layer.energy_mj = {
        "merged": layer.macs["merged"] * mac + layer.additions["merged"] * ac,
        "unmerged": layer.macs["unmerged"] * mac + layer.additions["unmerged"] * ac,
        "papers": integer * mac if layer.kind in ("stem", "resize", "other") else papers / images * ac,
        "integer": integer * mac,
        "float_twin": integer * prices.float_mac_pj * _MJ,
        "lemaire": sum(share * lemaire_pj(words) for share, words in row.words()) * _MJ / images,
    }
    _price_memory(layer, row, energy)


def _price_memory(layer: LayerEnergy, row: Row, energy: Energy) -> None:
    """Fill in the bits of a layer, their energy, and the firing rates below which spikes win."""
    prices, images, ends = energy.prices, energy.images, {}
    for network in NETWORKS:
        for flow in FLOWS:
            moved = row.moved(network, flow)
            layer.moved.setdefault(network, {})[flow] = {key: bits / images for key, bits in asdict(moved).items()}
            memory = row.pj(network, flow, prices)
            layer.memory_mj.setdefault(network, {})[flow] = [pj * _MJ / images for pj in memory]
            silent, busy = _arithmetic_pj(layer, network, flow, prices)
            layer.arithmetic_mj.setdefault(network, {})[flow] = busy * _MJ
            asleep = row.pj(network, flow, prices, silent=True)[0] / images
            ends[network, flow] = (silent, busy), (asleep, memory[0] / images)
    layer.break_even = dict.fromkeys(("arithmetic", *FLOWS))
    if layer.kind not in ("synapse", "product"):
        return
    mine = ends[energy.network, "reuse"][0]
    layer.break_even["arithmetic"] = break_even(mine, ends["integer", "reuse"][0], layer.rate)
    for flow in FLOWS:
        spiking, integer = (_both(*ends[network, flow]) for network in (energy.network, "integer"))
        layer.break_even[flow] = break_even(spiking, integer, layer.rate)


def _both(arithmetic: tuple[float, float], memory: tuple[float, float]) -> tuple[float, float]:
    return arithmetic[0] + memory[0], arithmetic[1] + memory[1]


def _arithmetic_pj(layer: LayerEnergy, network: Network, flow: Flow, prices: Prices) -> tuple[float, float]:
    """Energy of the arithmetic in pJ, without any spike and with those that fell."""
    if network in ("merged", "unmerged"):
        fixed = layer.macs[network] * prices.mac_pj
        return fixed, fixed + layer.additions[network] * prices.ac_pj
    if network == "float_twin":
        return (layer.macs["integer"] * prices.float_mac_pj,) * 2
    if flow == "reuse" or layer.kind not in ("synapse", "product"):
        return (layer.macs["integer"] * prices.mac_pj,) * 2
    effective = layer.macs["effective"] * prices.mac_pj
    # Means of spike counts are never skipped.
    skips = layer.macs["effective"] != layer.macs["integer"]
    return layer.macs["unmerged"] * prices.mac_pj if skips else effective, effective
