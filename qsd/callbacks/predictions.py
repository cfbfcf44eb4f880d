"""Writing predictions to a table."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would compute instead of showing it


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

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a fresh file under a temporary name."""
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_suffix(".part")
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
        assert self._partial is not None
        path = self._partial.replace(self._path(trainer))
        rank_zero_info(f"predictions: {path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written behind."""
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def _open(self, mode: str) -> Any:
        assert self._partial is not None
        # File names may hold bytes that are no UTF-8; escaped, the table stays readable for other programs.
        return self._partial.open(mode, newline="", encoding="utf-8", errors="backslashreplace")

    def _path(self, trainer: Trainer) -> Path:
        path = Path(trainer.log_dir or trainer.default_root_dir, self.filename)
        return path.with_suffix(f".rank{trainer.global_rank}{path.suffix}") if trainer.global_rank else path
