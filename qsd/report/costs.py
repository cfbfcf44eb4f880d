"""The parts of a conversion record that say what the network costs: operations, energy and bytes."""

from typing import Annotated

from pydantic import Field

from qsd.energy import Preset
from qsd.schema import Schema, Size, TimeSteps
from qsd.spiking.codes import CodeName

Count = Annotated[float, Field(ge=0)]  # of operations per image, so not always whole


class MergedAndUnmerged(Schema):
    """Accumulates per image, with merged chains of convolutions and factor by factor."""

    merged: Count
    unmerged: Count


class Multiplications(MergedAndUnmerged):
    """Multiply-accumulates per image; ``integer`` is the dense count of the factored layer."""

    integer: Count


class EnergyColumns(Schema):
    """Energy per image in mJ, by convention; see `qsd.energy`."""

    merged: Count
    unmerged: Count
    papers: Count
    integer: Count


class EnergyTotals(EnergyColumns):
    """The sums over all layers; one more counts the first layer's multiply-accumulates in every time step."""

    papers_stem_per_step: Count


class EnergyLayer(Schema):
    """Operations and energy of one layer, per image; see `qsd.energy.LayerEnergy`."""

    name: str
    kind: str
    spikes: Count
    rate: Count | None
    additions: MergedAndUnmerged
    macs: Multiplications
    zero_skipping: Count | None
    energy_mj: EnergyColumns


class CodeCost(Schema):
    """The same counts in one code, per image; see `qsd.energy.CodeCost`."""

    code: CodeName
    steps: TimeSteps
    spikes: Count
    additions: Count
    shifts: Count
    energy_mj: Count


class EnergyRecord(Schema):
    """Operations and energy; see `qsd.energy.Energy`."""

    preset: Preset
    mac_pj: Count
    ac_pj: Count
    time_steps: TimeSteps
    merged: bool
    bits: Size
    images: Size
    layers: list[EnergyLayer]
    total_mj: EnergyTotals
    codes: list[CodeCost] = Field(default_factory=list)


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
