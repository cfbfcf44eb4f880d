"""The options of a conversion and of the measurements that its report shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from qsd.energy.prices import Preset, chosen_prices
from qsd.errors import QsdError
from qsd.spiking.codes import CodeName, check_code
from qsd.spiking.merging import Merge, MergeChoice, check_merge, merge_choice

Stage = Literal["compare", "delays", "activity", "audit", "energy"]
STAGES: tuple[Stage, ...] = get_args(Stage)
MERGES: tuple[MergeChoice, ...] = get_args(MergeChoice)


@dataclass(frozen=True)
class ConversionOptions:
    """How a trained network is converted and what is measured.

    Attributes:
        merge: Chains of convolutions that become one convolution each: ``"all"``, ``"none"``, ``"rep"`` (RepConv) or
            ``"sep"`` (SepConv). True and False stand for ``"all"`` and ``"none"``.
        merged_bits: Bits to which merged kernels are quantized; ``None`` leaves them as they are, which is lossless.
        delay: Time steps that neurons wait before they may fire, or a delay by name or glob of neurons; ``None`` for
            the shortest lossless one, T - 1 in the unary code.
        preset: Energy-price table: ``"fp32"`` (the papers'), ``"fp16"`` or ``"int8"``.
        prices: YAML file with prices of one's own, which replace the preset.
        max_images: Largest number of images to measure on; ``None`` for all.
        step_images: Number of images that are also simulated time step by time step, which takes T times as long.
        float_accuracy: Accuracy of the float twin as a share, for the report; it is not measured.
        raster: Name of the neuron whose spikes are drawn; ``None`` for the query of the last attention.
        code: How a spike count travels: ``"unary"``, as that many spikes, or ``"binary"``, as its binary digits.
        stages: Measurements beside the accuracy: ``"compare"``, ``"delays"``, ``"activity"``, ``"audit"``,
            ``"energy"``.
    """

    merge: Merge = "all"
    merged_bits: int | None = None
    delay: int | dict[str, int] | None = None
    preset: Preset = "fp32"
    prices: str | None = None
    max_images: int | None = None
    step_images: int = 100
    float_accuracy: float | None = None
    raster: str | None = None
    code: CodeName = "unary"
    stages: Sequence[str] = STAGES

    def __post_init__(self) -> None:
        """Check all values, so that a mistake is named before a long training and not after it.

        Raises:
            QsdError: For the first value that is wrong.
        """
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "merge", merge_choice(self.merge))
        check_merge(self.merge, self.merged_bits)
        check_code(self.code)
        delays = self.delay.values() if isinstance(self.delay, Mapping) else [self.delay]
        for delay in delays:
            if delay is not None and delay < 0:
                raise QsdError(f"delay={delay} is negative; leave it out for T - 1, which is lossless.")
        chosen_prices(self.preset, self.prices)
        for key in ("max_images", "step_images"):
            number = getattr(self, key)
            if number is not None and number < 1:
                raise QsdError(f"{key}={number} is not positive; leave it out for the default.")
        if self.float_accuracy is not None and not 0 <= self.float_accuracy <= 1:
            raise QsdError(f"float_accuracy={self.float_accuracy} is no share from 0 to 1.")
        self.check_stages(STAGES)

    def check_stages(self, known: Sequence[str]) -> None:
        """Refuse stages that a kind of network does not have.

        Args:
            known: The stages that it has.

        Raises:
            QsdError: For the first stage that is unknown.
        """
        unknown = [stage for stage in self.stages if stage not in known]
        if unknown:
            raise QsdError(f"stage {unknown[0]!r} is unknown; choose from {', '.join(known)}.")

    @property
    def stepped_images(self) -> int:
        """Number of images that are simulated time step by time step."""
        return self.step_images if self.max_images is None else min(self.step_images, self.max_images)
