"""The parts of a conversion record that say what the network costs: operations, energy and bytes."""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field

from qsd.energy import Preset, Prices
from qsd.schema import Schema, Share, Size, TimeSteps
from qsd.spiking.codes import CodeName
from qsd.spiking.layers.movement import Network

Count = Annotated[float, Field(ge=0)]  # of operations per image, so not always whole


class MergedAndUnmerged(Schema):
    """Accumulates per image, with merged chains of convolutions and factor by factor."""

    merged: Count
    unmerged: Count


class Multiplications(MergedAndUnmerged):
    """Multiply-accumulates per image; ``integer`` is the dense count of the factored layer.

    Attributes:
        effective: The same for inputs that are not zero; ``None`` in records of earlier versions.
    """

    integer: Count
    effective: Count | None = None


class EnergyColumns(Schema):
    """Energy per image in mJ, by convention; see `qsd.energy`. Records of earlier versions have four columns."""

    merged: Count
    unmerged: Count
    papers: Count
    integer: Count
    float_twin: Count | None = None
    lemaire: Count | None = None


class EnergyTotals(EnergyColumns):
    """The sums over all layers; one more counts the first layer's multiply-accumulates in every time step."""

    papers_stem_per_step: Count


class MovedBits(Schema):
    """Bits that are read from and written to memory, per image; see `qsd.spiking.layers.movement.Moved`."""

    weights_read: Count
    membranes_read: Count
    membranes_written: Count
    activations_read: Count
    activations_written: Count


Range = Annotated[list[Count], Field(min_length=2, max_length=2)]  # at both ends of the price of DRAM
_T = TypeVar("_T")


class ByFlow(Schema, Generic[_T]):
    """Something in each dataflow; see `qsd.spiking.layers.movement`."""

    events: _T
    reuse: _T


class ByNetwork(Schema, Generic[_T]):
    """Something of each network, in each dataflow."""

    merged: ByFlow[_T]
    unmerged: ByFlow[_T]
    integer: ByFlow[_T]
    float_twin: ByFlow[_T]


class BreakEven(Schema):
    """Firing rates below which spikes win; ``None`` for a layer without spikes."""

    arithmetic: Share | None
    events: Share | None
    reuse: Share | None


class EnergyLayer(Schema):
    """Operations and energy of one layer, per image; see `qsd.energy.LayerEnergy`. Earlier records have no memory."""

    name: str
    kind: str
    spikes: Count
    rate: Count | None
    additions: MergedAndUnmerged
    macs: Multiplications
    zero_skipping: Count | None
    energy_mj: EnergyColumns
    moved: ByNetwork[MovedBits] | None = None
    arithmetic_mj: ByNetwork[Count] | None = None
    memory_mj: ByNetwork[Range] | None = None
    break_even: BreakEven | None = None


class WithMemory(Schema):
    """Energy per image in mJ, of a network in a dataflow."""

    arithmetic: Count
    memory: Range
    total: Range


class SynapticOperations(Schema):
    """Synaptic operations per image, under NeuroBench's names."""

    Effective_MACs: Count
    Effective_ACs: Count
    Dense: Count


class NeuroBenchMetrics(Schema):
    """NeuroBench's metrics under their names; see `qsd.energy.neurobench`."""

    footprint: Count
    connection_sparsity: Share
    activation_sparsity: Share
    synaptic_operations: SynapticOperations
    membrane_updates: Count


class CodeCost(Schema):
    """The same counts in one code, per image; see `qsd.energy.CodeCost`."""

    code: CodeName
    steps: TimeSteps
    spikes: Count
    additions: Count
    shifts: Count
    energy_mj: Count


class EnergyRecord(Schema):
    """Operations and energy; see `qsd.energy.Energy`. Earlier records have neither memory nor NeuroBench's metrics."""

    preset: Preset | Literal["own"]
    mac_pj: Count
    ac_pj: Count
    time_steps: TimeSteps
    merged: bool
    bits: Size
    images: Size
    layers: list[EnergyLayer]
    total_mj: EnergyTotals
    codes: list[CodeCost] = Field(default_factory=list)
    prices: Prices | None = None
    with_memory_mj: ByNetwork[WithMemory] | None = None
    neurobench: NeuroBenchMetrics | None = None

    @property
    def network(self) -> Network:
        """The network as it was converted."""
        return "merged" if self.merged else "unmerged"


class Sizes(Schema):
    """Bytes of the weights; see `qsd.packing.ModelSize`.

    Attributes:
        file_bytes: Size of the packed file; ``None`` if none was written.
    """

    parameters: int
    float_bytes: int
    packed_bytes: int
    converted_bytes: int | None
    float_equivalents: float
    file_bytes: int | None = None
