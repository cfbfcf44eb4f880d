"""Runs of a converted network that are recorded once and replayed: CUDA graphs, and compiled programs.

A pass launches hundreds of small kernels from Python, which takes longer than the kernels where images are few. A CUDA
graph launches all of them at once. It computes with the same kernels, so that its results are those of an ordinary run,
bit for bit. A compiled program has kernels of its own, and may round potentials otherwise. Passes of the count domain
can be compiled; the marked tensors of stepping cannot be traced.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qsd.lean import has_hooks
from qsd.precision import float32_settings
from qsd.spiking.layers import DelayedNeuron, SpikingChain
from qsd.spiking.runtime import Runtime

# A pass over images, with tensors in any structure as its result.
Pass = Callable[[Tensor], Any]


def compiled(function: Pass, images: Tensor) -> Pass:
    """A pass as a compiled program, for images of one shape.

    The program is compiled from the torch operations of one run; the Python code of layers and runtime is gone in it.

    Args:
        function: The pass.
        images: Images ``[B, ...]`` of the shape and type to compile for.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(lambda images: function(images))(images)  # a function: of methods it would trace ``self`` too
    program: Pass = torch.compile(traced, dynamic=False)
    return program


def cuda_graph(function: Pass, images: Tensor) -> Pass:
    """A pass as a CUDA graph, for images of one shape. Several threads may call it.

    Args:
        function: The pass, without any synchronisation with the processor.
        images: Images ``[B, ...]`` on a CUDA device, of the shape and type to record for.
    """
    inputs, stream = images.clone(), torch.cuda.Stream(images.device)
    stream.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(stream):  # libraries choose algorithms and make workspaces in the first passes
        for _ in range(3):
            function(inputs)
    torch.cuda.current_stream(images.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = function(inputs)
    lock, done = threading.Lock(), torch.cuda.Event()

    def replay(images: Tensor) -> Any:
        with lock:
            done.wait(torch.cuda.current_stream(images.device))  # another stream may still read the last results
            inputs.copy_(images)
            graph.replay()
            results = tree_map_only(Tensor, torch.clone, outputs)  # the next replay overwrites the outputs
            done.record(torch.cuda.current_stream(images.device))
            return results

    return replay


def recorded(function: Pass, images: Tensor, compile: bool) -> Pass:
    """A pass as a CUDA graph on a CUDA device, compiled before if asked for.

    Where the graph cannot be recorded, the pass runs without one, and a warning names the reason. An error of the pass
    itself is raised by that run.

    Args:
        function: The pass.
        images: Images ``[B, ...]`` of the shape and type to record for.
        compile: Whether it is compiled.
    """
    program = compiled(function, images) if compile else function
    if not images.is_cuda:
        return program
    try:
        return cuda_graph(program, images)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        warnings.warn(f"No CUDA graph was recorded: {reason}. These passes run without one.", stacklevel=2)
        return program


class _Parts(NamedTuple):
    """The modules of a network that decide whether a recording fits, looked up once."""

    modules: tuple[nn.Module, ...]
    neurons: dict[str, DelayedNeuron]
    chains: tuple[SpikingChain, ...]


class Graphs:
    """The recorded runs of one network, by everything that a recording fixes. Copies and pickles begin without any."""

    def __init__(self) -> None:
        self._recorded: dict[tuple[Any, ...], Pass] = {}
        self._compile: bool | None = None  # while runs are recorded, whether they are compiled
        self._parts: _Parts | None = None

    def __reduce__(self) -> tuple[type["Graphs"], tuple[()]]:
        return Graphs, ()

    def clear(self) -> None:
        """Drop all recordings, for example because the tensors of the network were replaced."""
        self._recorded.clear()
        self._parts = None

    @contextmanager
    def recording(self, compile: bool = False) -> Iterator[None]:
        """Record the runs in this context; later runs of the same kind, shape and settings are replayed.

        Other runs are ordinary ones: of other shapes, under hooks or modes of PyTorch that watch the layers, with
        recorded neurons, of single frames, and where counts are collected in the count domain. On a processor nothing
        but compiled programs is recorded.

        Args:
            compile: Whether passes of the count domain are compiled. Compiled kernels may round a potential to the
                other side of a threshold.
        """
        self._compile = compile
        try:
            yield
        finally:
            self._compile = None

    def run(self, network: nn.Module, runtime: Runtime, function: Pass, images: Tensor) -> Any:
        """Run a pass in the present run of a network's runtime, or replay its recording.

        Args:
            network: The network's layers.
            runtime: The runtime that they share.
            function: The pass; it depends on nothing but the images and the network with its present settings.
            images: Images ``[B, ...]``.
        """
        if self._compile is None and not self._recorded:
            return function(images)
        parts = self._parts = self._parts or _parts_of(network)
        if not _repeatable(parts, runtime):
            return function(images)
        key = _key(parts, runtime, images)
        if key not in self._recorded:
            if self._compile is None:
                return function(images)
            self._recorded[key] = recorded(function, images, self._compile and runtime.mode == "count")
        return self._recorded[key](images)


def _parts_of(network: nn.Module) -> _Parts:
    modules = tuple(network.modules())
    neurons = {m.name: m for m in modules if isinstance(m, DelayedNeuron)}
    return _Parts(modules, neurons, tuple(m for m in modules if isinstance(m, SpikingChain)))


def _repeatable(parts: _Parts, runtime: Runtime) -> bool:
    """Whether a run does nothing but compute its result."""
    run = runtime.run
    watched = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
    if watched or run.record or run.remainders is not None or (run.mode == "count" and runtime.collects):
        return False
    return not any(has_hooks(module) for module in parts.modules)


def _key(parts: _Parts, runtime: Runtime, images: Tensor) -> tuple[Any, ...]:
    """Everything that a recording fixes."""
    run, device = runtime.run, images.device.type
    return (
        run.mode,
        (images.shape, images.stride(), images.dtype, images.device),
        tuple(run.delay(name, neuron.delay) for name, neuron in parts.neurons.items()),
        tuple(chain.merged_counts for chain in parts.chains),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        float32_settings(),
    )
