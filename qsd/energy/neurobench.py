"""The metrics of NeuroBench (Yik et al., 2025) under their names, of a converted network."""

from dataclasses import dataclass, fields
from typing import Any

import torch

from qsd.spiking.network import SpikingNetwork


@dataclass
class NeuroBench:
    """The counts that the metrics are made of, of all images together where they depend on images.

    Attributes:
        weights: Number of weights of the converted network.
        zeros: Weights that are zero.
        bits: Bits of weights, scales and biases at their real width.
        cells: Neurons times the time steps in which they may fire.
        spikes: Spikes of all neurons.
        updates: Changes of membranes: one for the charge of each step, one for each spike.
        macs: Multiply-accumulates of layers that see images or other analog values.
        additions: Accumulates of spikes; weights that are zero count as synapses.
        dense: Synapses of all layers in all time steps.
    """

    weights: float = 0.0
    zeros: float = 0.0
    bits: float = 0.0
    cells: float = 0.0
    spikes: float = 0.0
    updates: float = 0.0
    macs: float = 0.0
    additions: float = 0.0
    dense: float = 0.0

    @classmethod
    def of_weights(cls, spiking: SpikingNetwork) -> "NeuroBench":
        """The counts that do not depend on images.

        Args:
            spiking: The converted network.
        """
        counts = cls()
        for layer in spiking.layers().values():
            counts.bits += layer.stored_bits(spiking.trained.bits, spiking.merged_bits)
            for weight in layer.kernels():
                counts.weights += weight.numel()
                counts.zeros += weight.numel() - int(torch.count_nonzero(weight))
        return counts

    def add(self, other: "NeuroBench") -> None:
        """Add the counts of another part of the network, measured on the same images.

        Args:
            other: The counts of the part.
        """
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))

    def metrics(self, images: int) -> dict[str, Any]:
        """The metrics by their names: shares, bytes, and numbers per image.

        Args:
            images: Number of images.
        """
        return {
            "footprint": self.bits / 8,
            "connection_sparsity": self.zeros / self.weights if self.weights else 0.0,
            "activation_sparsity": 1 - self.spikes / self.cells if self.cells else 0.0,
            "synaptic_operations": {
                "Effective_MACs": self.macs / images,
                "Effective_ACs": self.additions / images,
                "Dense": self.dense / images,
            },
            "membrane_updates": self.updates / images,
        }
