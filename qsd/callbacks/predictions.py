"""Writing predictions to a table."""

import csv
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from qsd.errors import QsdError
from qsd.files import replacing

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # Beginnings of texts that a spreadsheet would compute.


class PredictionWriter(BasePredictionWriter):
    """Write ``predictions.csv`` (image, class, probability) as predictions come in.

    With several processes each writes a file of its own, ``predictions.rank1.csv`` and so on, since their shares of
    the images do not overlap.

    Args:
        filename: name of the file; a relative one lies in the run's log folder.
    """

    def __init__(self, filename: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename
        self._partial: Path | None = None
        self._file = ExitStack()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a fresh file under a temporary name."""
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = ExitStack()
        self._partial = self._file.enter_context(replacing(path))
        with self._open("w") as file:
            csv.writer(file).writerow(["image", "class", "probability"])

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append the rows of a batch."""
        names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
        probabilities, classes = prediction["probabilities"].max(dim=-1)
        with self._open("a") as file:
            for image, label, probability in zip(prediction["name"], classes.tolist(), probabilities.tolist()):
                # A path stays the path of the same file, a class name gets the mark that spreadsheets use for texts.
                path = f"./{image}" if image.startswith(_FORMULA) else image
                name = names[label] if names else str(label)
                name = f"'{name}" if name.startswith(_FORMULA) else name
                csv.writer(file).writerow([path, name, f"{probability:.4f}"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the complete file its name."""
        self._file.close()
        rank_zero_info(f"predictions: {self._path(trainer)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written behind."""
        with suppress(QsdError):  # The exception that ended the run is reported, not that this file is incomplete.
            self._file.__exit__(type(exception), exception, exception.__traceback__)

    def _open(self, mode: str) -> Any:
        assert self._partial is not None
        # File names may hold bytes that are no UTF-8; escaped, the table stays readable for other programs.
        return self._partial.open(mode, newline="", encoding="utf-8", errors="backslashreplace")

    def _path(self, trainer: Trainer) -> Path:
        path = Path(trainer.log_dir or trainer.default_root_dir, self.filename)
        return path.with_suffix(f".rank{trainer.global_rank}{path.suffix}") if trainer.global_rank else path
