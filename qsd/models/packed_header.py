"""The header of packed files: its schema, version 1, and the bounds within which a file is believed.

The header is one JSON object in the metadata of the safetensors file.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_serializer

from qsd.errors import QsdError
from qsd.schema import LONGEST_TIME, Delay, Schema, Size, check_version, parse, read_object

VERSION = 1
_REMEDY = "the file is damaged, or was not written by qsd.save_packed"
_MOST_DIMENSIONS = 8
_LARGEST_ARGUMENT = 2**20  # of integers by which a model is built: channels, classes, blocks, pixels
_LARGEST_EXAMPLE = 2**26  # values of an image or of currents
# Arguments of timm's builders that open other files or load from the network, which no packed file may cause.
_LOADING = ("pretrained", "checkpoint", "cache_dir")


def _shape(shape: list[int]) -> list[int]:
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions are more than {_MOST_DIMENSIONS}")
    return shape


def _example(shape: list[int]) -> list[int]:
    if math.prod(shape) > _LARGEST_EXAMPLE:
        raise ValueError(f"{math.prod(shape)} values are more than {_LARGEST_EXAMPLE}")
    return shape


def _arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    loading = next((name for name in arguments if name.startswith(_LOADING)), None)
    if loading is not None:
        raise ValueError(f"the argument {loading} would load other files")
    values: list[Any] = [*arguments.values()]
    while values:
        value = values.pop()
        if isinstance(value, int | float) and abs(value) > _LARGEST_ARGUMENT:
            raise ValueError(f"the argument {value:.3g} is larger than {_LARGEST_ARGUMENT}")
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list):
            values += value
    return arguments


Shape = Annotated[list[Size], AfterValidator(_shape)]
Bits = Annotated[int, Field(ge=1, le=16)]


class PackedTensor(Schema):
    """A tensor of low-bit integers that is stored as one stream of bits.

    Attributes:
        bits: Bits of each integer.
        shape: Shape of the tensor.
        deflated: Whether the stream is compressed.
    """

    bits: Bits
    shape: Shape
    deflated: bool

    @property
    def count(self) -> int:
        """Number of integers."""
        return math.prod(self.shape)

    @property
    def stream_bytes(self) -> int:
        """Bytes of the stream before compression."""
        return math.ceil(self.count * self.bits / 8)


class Registered(Schema):
    """Name and arguments by which timm builds a model."""

    name: str
    arguments: Annotated[dict[str, Any], AfterValidator(_arguments)]


class ConversionSettings(Schema):
    """The conversion that is repeated when a spiking network is loaded.

    Attributes:
        delays: Delay by neuron layer.
        merge: Merged chains, see `qsd.to_spike_driven`; ``true`` for all and ``false`` for none.
        merged_bits: Bits of merged kernels.
        example: Shape of the image that the network was converted with.
        dtype: Floating-point type of the network.
        code: How counts travel as spikes.
    """

    delays: dict[str, Delay]
    merge: bool | Literal["rep", "sep"]
    merged_bits: Annotated[int, Field(ge=2, le=16)] | None
    example: Annotated[Shape, AfterValidator(_example)]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    code: Literal["unary", "binary"] = "unary"

    @model_serializer(mode="wrap")
    def _without_the_unary_code(self, content: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Plain data without a code that is unary, so that versions before the binary code read the file."""
        return {key: value for key, value in content(self).items() if (key, value) != ("code", "unary")}


class PackedHeader(Schema):
    """Everything that a packed file holds beside its tensors.

    Attributes:
        version: Version of the format.
        kind: ``"quantized"`` for a trained network, ``"spiking"`` for a converted one.
        model: How timm builds the network; ``None`` for a model of the user's own.
        parameters: Number of parameters, step sizes not counted.
        time_steps: T by neuron layer; 0 in a float twin.
        conversion: Settings of a spiking network.
        notes: Further facts, such as names of classes.
        packed: The low-bit tensors, by name.
    """

    version: Literal[1] = 1
    kind: Literal["quantized", "spiking"]
    model: Registered | None
    parameters: Size
    time_steps: dict[str, Annotated[int, Field(ge=0, le=LONGEST_TIME)]]
    conversion: ConversionSettings | None
    notes: dict[str, Any]
    packed: dict[str, PackedTensor] = Field(default_factory=dict)


def read_header(text: str, path: str) -> PackedHeader:
    """Check the header of a packed file.

    Args:
        text: The JSON text.
        path: The file, for the message.

    Raises:
        QsdError: If the header is of a newer version, or has a field that does not fit.
    """
    source = f"the header of packed file {path}"
    content = read_object(text, source, _REMEDY)
    check_version(content, VERSION, path)
    header = parse(PackedHeader, content, source, _REMEDY)
    if (header.kind == "spiking") != (header.conversion is not None):
        raise QsdError(f"{source} does not fit at conversion: only a spiking network has one; {_REMEDY}.")
    return header
