"""Predictions as a table."""

import csv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from qsd.files import replacing
from qsd.runs import run_folder

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # Beginnings of texts that a spreadsheet would compute.


class PredictionWriter(BasePredictionWriter):
    """Write ``predictions.csv`` (image, class, probability) batch by batch.

    With several processes each writes a file of its own, ``predictions.rank1.csv`` and so on, since their shares of
    the images do not overlap. A file has its name only when it is complete.

    Args:
        filename: Name of the file, relative to the run's log folder.
    """

    def __init__(self, filename: str = "predictions.csv") -> None:
        super().__init__(write_interval="batch")
        self.filename = filename
        self._writing = ExitStack()
        self._partial: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new file under a temporary name."""
        path = self._path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._writing.enter_context(replacing(path))
        self._append([["image", "class", "probability"]])

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
        rows = zip(prediction["name"], classes.tolist(), probabilities.tolist())
        self._append(
            [_shown(image, "./"), _shown(str(names[label] if names else label), "'"), f"{share:.4f}"]
            for image, label, share in rows
        )

    def _append(self, rows: Any) -> None:
        assert self._partial is not None
        # File names may hold bytes that are no UTF-8; escaped, the table stays readable for other programs.
        with self._partial.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows(rows)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the complete file its name."""
        self._writing.close()
        rank_zero_info(f"predictions: {self._path(trainer)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove an incomplete file."""
        try:
            self._writing.__exit__(type(exception), exception, exception.__traceback__)
        except BaseException as error:
            if error is not exception:  # The trainer raises the exception itself.
                raise

    def _path(self, trainer: Trainer) -> Path:
        path = run_folder(trainer) / self.filename
        return path.with_suffix(f".rank{trainer.global_rank}{path.suffix}") if trainer.global_rank else path


def _shown(text: str, mark: str) -> str:
    """A path or name that no spreadsheet computes: a path stays that of its file, a name gets the mark of a text."""
    return f"{mark}{text}" if text.startswith(_FORMULA) else text
