"""The settings of a benchmark, with the networks and images that all cases share."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from qsd.errors import QsdError


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    Attributes:
        suites: The suites to measure.
        name: The registered name of the model.
        also: Further models that are measured in the same way.
        time_steps: T.
        img_size: The side of the images in pixels.
        batch_size: Images of a pass or step.
        num_classes: Outputs of the classifier.
        rounds: Number of times that each case is timed.
        device: The device to compute on.
        workers: Processes that load images; ``None`` for the choice of the data module.
        sizes: Image sides of the table of growth.
        models: Models of the table of growth.
        compile: Whether compiled cases are measured.
        precisions: The number formats, of `qsd.commands.benchmark.precisions.PRECISIONS`.
        profile: The name of a case whose kernels are listed, or ``None``.
        largest: Whether the largest batch of each training step is searched.
        memory: Whether peak memory is measured.
        out: The folder of the results.
        peak: The one case of the first suite to measure the memory of, in a process of its own.
        passed_on: The arguments for that process.

    Raises:
        QsdError: If a value is wrong.
    """

    suites: Sequence[str]
    name: str
    also: Sequence[str]
    time_steps: int
    img_size: int
    batch_size: int
    num_classes: int
    rounds: int
    device: torch.device
    workers: int | None
    sizes: Sequence[int]
    models: Sequence[str]
    compile: bool
    precisions: Sequence[str]
    profile: str | None
    largest: bool
    memory: bool
    out: Path
    peak: str | None
    passed_on: Sequence[str]

    def __post_init__(self) -> None:
        unknown = [name for name in (self.name, *self.also, *self.models) if not timm.is_model(f"{name}_ann")]
        if unknown:
            raise QsdError(f"model {unknown[0]!r} is unknown or has no float twin; try qsd_15m.")
        for name in ("rounds", "batch_size", "img_size", "time_steps"):
            if getattr(self, name) < 1:
                raise QsdError(f"{name}={getattr(self, name)} is not positive.")
        if self.device.type != "cuda" and ("tf32" in self.precisions or self.largest):
            wish = "TF32" if "tf32" in self.precisions else "the largest batch"
            raise QsdError(f"{wish} is measured on CUDA devices alone, and the device is {self.device}; leave it out.")
        if not self.out.is_dir():
            raise QsdError(f"the folder {self.out} does not exist; make it first.")

    def model(self, suffix: str = "", name: str | None = None) -> Any:
        """A fresh model on the device.

        Args:
            suffix: ``"_ann"`` for the float twin.
            name: The registered name; ``None`` for that of the settings.
        """
        steps: dict[str, Any] = {} if suffix else {"time_steps": self.time_steps}
        model: nn.Module = timm.create_model(f"{name or self.name}{suffix}", num_classes=self.num_classes, **steps)
        return with_one_output(model).to(self.device)

    def images(self, size: int | None = None, batch: int | None = None) -> Tensor:
        """Noise ``[B, 3, H, W]`` on the device, in channels-last layout, the same at every call.

        Args:
            size: The side of the images; ``None`` for that of the settings.
            batch: The number of images; ``None`` for that of the settings.
        """
        side = size or self.img_size
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(batch or self.batch_size, 3, side, side, generator=generator)
        return noise.to(self.device).contiguous(memory_format=torch.channels_last)


def with_one_output(model: Any) -> Any:
    """A model of timm that returns the average of its heads in training, if it has two, for one loss to be computed.

    Args:
        model: The model.
    """
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(False)
    return model
