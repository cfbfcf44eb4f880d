"""Firing rates of a network's neurons, and the entropy of its attention's spike counts."""

from collections.abc import Callable, Collection
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from qsd.information import InformationMeter
from qsd.neurons import SpikeNeuron


class SpikeMeter:
    """Measure all neurons of a network in its forward passes, from construction until `close`.

    A compiled network runs uncompiled as long as it is measured.

    Args:
        network: Any module.
        entropies: Measure the entropy of attention's spike counts, too.
    """

    def __init__(self, network: nn.Module, entropies: bool = True) -> None:
        neurons = {name: m for name, m in network.named_modules() if isinstance(m, SpikeNeuron)}
        # Spikes, and the number of time steps in which neurons could fire.
        self._sums = {name: torch.zeros(2, dtype=torch.float64) for name in neurons}
        self._hooks = ExitStack()
        self._hooks.enter_context(torch.compiler.set_stance("force_eager"))
        self._information = InformationMeter(network) if neurons and entropies else None
        if self._information is not None:
            self._hooks.callback(self._information.remove)
        for name, neuron in neurons.items():
            self._hooks.callback(neuron.register_forward_hook(self._hook(name)).remove)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(neuron: SpikeNeuron, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            with torch.no_grad():
                counts = neuron.counts(*inputs)
                spikes = counts.sum(dtype=torch.float64)
                sums = torch.stack([spikes, torch.full_like(spikes, counts.numel() * neuron.time_steps)])
                self._sums[name] = self._sums[name].to(sums.device) + sums

        return hook

    def close(self) -> None:
        """Stop measuring. Further calls have no effect."""
        self._hooks.close()

    def metrics(
        self, layers: Collection[str] | None = None, add: Callable[[Tensor], Tensor] = lambda sums: sums
    ) -> dict[str, float]:
        """The measured metrics.

        Args:
            layers: Neurons whose rates are returned beside that of the whole network; ``None`` for all.
            add: Sum of a tensor over all processes. Every process calls it equally often.

        Returns:
            ``spikes/rate``: spikes per neuron and time step over the whole network, from 0 to 1;
            ``spikes/rate/<neuron>`` by layer; ``spikes/entropy/<attention>.q_neuron`` (and ``k``, ``v``): entropy of
            the counts in bits, at most ``log2(T + 1)``. Empty if no neuron ran.
        """
        self.close()
        sums = {name: add(values) for name, values in self._sums.items()}
        if self._information is not None:
            for meter in self._information.meters.values():
                meter.reduce(add)
        total = sum((values.cpu() for values in sums.values()), torch.zeros(2, dtype=torch.float64))
        if not total[1]:
            return {}
        found = {"spikes/rate": (total[0] / total[1]).item()}
        for name, (spikes, steps) in sums.items():
            if steps and (layers is None or name in layers):
                found[f"spikes/rate/{name}"] = (spikes / steps).item()
        if self._information is not None:
            for signal in self._information.signals():
                if signal.entropy is not None:
                    found[f"spikes/entropy/{signal.layer}.{signal.projection[0]}_neuron"] = signal.entropy
        return found
