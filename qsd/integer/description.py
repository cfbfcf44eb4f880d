"""The layers of an integer network as plain data, which a file, another simulator or a generator of code reads.

A network is a list of layers in the order of execution. Each one gives one signal, which has the layer's name: an array
of integers for each image, with a range that is proved. Its other numbers are arrays, which are stored beside the
description under ``layer/array``. The page "Integer networks" of the documentation states what each kind computes.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from qsd.schema import Schema, Size, TimeSteps

VERSION = 1
PIXEL_LEVELS = 256
LARGEST_WIDTH = 32  # Bits of a signal.
LARGEST_SUM = 2**31 - 2  # A threshold beyond it fits too.
LARGEST_WEIGHT = 8  # Bits of a weight.
LARGEST_PRODUCT = 56  # Bits of a product of two integers, where data are multiplied at all.

Bits = Annotated[int, Field(ge=1, le=LARGEST_WIDTH)]
Shift = Annotated[int, Field(ge=0, le=LARGEST_WIDTH)]
Side = Annotated[int, Field(ge=1, le=2**14)]
Pair = Annotated[list[Side], Field(min_length=2, max_length=2)]
Padding = Annotated[list[Size], Field(min_length=4, max_length=4)]


def width(low: int, high: int) -> int:
    """Bits of a range of integers: with a sign if the range holds negative numbers, else without.

    Args:
        low: Least value.
        high: Largest value.
    """
    if low >= 0:
        return max(int(high).bit_length(), 1)
    return max(int(high).bit_length(), int(-low - 1).bit_length()) + 1


class Layer(Schema):
    """What all layers have.

    Attributes:
        name: Name of the layer and of its signal.
        inputs: Names of the signals that it takes.
        shape: Shape of its signal for one image.
        low: Least value that the signal can have, in counts, and as a sum over any number of steps.
        high: Largest such value.
        bits: Width of the range.
        signed: Whether the range holds negative numbers, so that one of the bits is the sign.
    """

    name: str
    inputs: list[str]
    shape: list[Size]
    low: int
    high: int
    bits: Bits
    signed: bool

    @property
    def size(self) -> int:
        """Number of integers in the signal of one image."""
        return math.prod(self.shape)


class Pixels(Layer):
    """The image: bytes ``[C, H, W]``, looked up in the table of their channel, ``table`` ``[C, 256]``."""

    kind: Literal["pixels"] = "pixels"


class Events(Layer):
    """The image as counts of events ``[C, H, W]`` from 0 to T; in steps a count n is a spike in the first n steps."""

    kind: Literal["events"] = "events"


class Convolution(Layer):
    """A convolution of ``[C, H, W]`` by ``weight`` ``[C_out, C / groups, k_h, k_w]``, on a border of zeros.

    With ``table_shift`` r a weight w of output channel c stands for the entry ``(w m[c] + 2**(r - 1)) >> r`` of a table
    of ``2**weight_bits`` entries, with the array ``multiplier`` m (without the addend if r is 0).

    Attributes:
        kernel: Height and width of the kernel.
        stride: Vertical and horizontal stride.
        padding: Rows above and below, columns to the left and right.
        dilation: Vertical and horizontal distance of the kernel's taps.
        groups: Groups of channels.
        weight_bits: Width of the weights, which are signed.
        table_shift: Shift r of the table, or ``None`` for no table.
        entry_bits: Width of the table's entries, or of the weights, signed.
    """

    kind: Literal["convolution"] = "convolution"
    kernel: Pair
    stride: Pair
    padding: Padding
    dilation: Pair
    groups: Side
    weight_bits: Annotated[int, Field(ge=2, le=LARGEST_WEIGHT)]
    table_shift: Shift | None
    entry_bits: Bits


class Rescale(Layer):
    """Each integer a of channel c becomes ``(a m[c] + 2**(d - 1)) >> d``, with the array ``multiplier`` m.

    d is ``shift``; if it is 0, there is no addend. The layer takes the complete sum of a window: in steps it gives its
    result in the last step.

    Attributes:
        shift: Places of the shift.
        product_bits: Width of the product before the shift, which may be wider than a signal.
    """

    kind: Literal["rescale"] = "rescale"
    shift: Shift
    product_bits: Annotated[int, Field(ge=1, le=LARGEST_PRODUCT)]


class Add(Layer):
    """The sum of two signals."""

    kind: Literal["add"] = "add"


class Total(Layer):
    """The sum over all positions of ``[C, H, W]``, ``[C, 1, 1]``, and an array ``bias`` ``[C]`` if there is one.

    Attributes:
        biased: Whether there is a bias, which is added once for each image.
    """

    kind: Literal["total"] = "total"
    biased: bool


class Neuron(Layer):
    """Neurons with T thresholds for each channel: the count of a membrane is the number of thresholds that it reaches.

    The array ``thresholds`` is ``[C, T]``, in increasing order, or ``[1, T]`` if all neurons have the same. In channels
    whose ``direction`` (``[C]``, 1 or -1) is -1 the membrane is negated before; the array is missing if there are none.
    In steps the membrane is the sum of the currents up to now. The neuron fires in the steps T to 2 T - 1, in the k-th
    of them if the membrane reaches the k-th threshold. There is no reset.

    Attributes:
        directed: Whether there is an array ``direction``.
        threshold_bits: Width of the thresholds, signed.
        membrane_bits: Width of the membrane, signed.
    """

    kind: Literal["neuron"] = "neuron"
    directed: bool
    threshold_bits: Bits
    membrane_bits: Bits


class MaxPool(Layer):
    """The maximum under a window of ``[C, H, W]``; positions outside of the map do not count.

    Attributes:
        kernel: Height and width of the window.
        stride: Vertical and horizontal stride.
        padding: Rows above and below, columns to the left and right.
        dilation: Vertical and horizontal distance of the window's positions.
    """

    kind: Literal["max_pool"] = "max_pool"
    kernel: Pair
    stride: Pair
    padding: Padding
    dilation: Pair


class Product(Layer):
    """The product of two signals of spikes, ``[..., I, C]`` and ``[..., C, J]``, by head."""

    kind: Literal["product"] = "product"


class Query(Layer):
    """The product of a matrix of integers ``[..., I, C]`` and of spikes ``[..., C, J]``, by head.

    In steps the spikes wait until the matrix is complete.
    """

    kind: Literal["query"] = "query"


class Reshape(Layer):
    """The same integers in the same order in another shape."""

    kind: Literal["reshape"] = "reshape"


class Permute(Layer):
    """Axes in another order.

    Attributes:
        axes: By axis of the output the axis of the input, both without the batch.
    """

    kind: Literal["permute"] = "permute"
    axes: list[Size]


AnyLayer = Annotated[
    Pixels | Events | Convolution | Rescale | Add | Total | Neuron | MaxPool | Product | Query | Reshape | Permute,
    Field(discriminator="kind"),
]


class Description(Schema):
    """An integer network, as JSON.

    Attributes:
        format: Name of the format.
        version: Version of this form.
        time_steps: T, the largest count and the number of steps of a window.
        fractional_bits: Bits behind the point of the running sums of several branches, in units of a threshold.
        inner_bits: Largest width of the values between the convolutions of a chain.
        mean: Mean by channel of the normalisation that the table of pixels contains.
        std: Standard deviation by channel of the same normalisation.
        output: Name of the signal whose largest value names the class.
        output_unit: Value of one unit of the output. Nothing is computed with it.
        layers: The layers, in the order of execution.
    """

    format: Literal["qsd-integers"] = "qsd-integers"
    version: Literal[1] = 1
    time_steps: TimeSteps
    fractional_bits: Shift
    inner_bits: Bits
    mean: list[float]
    std: list[float]
    output: str
    output_unit: float
    layers: list[AnyLayer]
