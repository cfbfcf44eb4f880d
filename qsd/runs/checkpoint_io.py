"""Checkpoint files that are complete whenever they can be seen."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from qsd.errors import QsdError
from qsd.files import replace_content


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints beside their target, flushes them to the disk and renames them.

    Lightning's own way goes through the system's temporary folder. If that is on another disk than the run, the
    file is copied onto the previous checkpoint, and a kill or a full disk at that moment destroys both.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: Its contents.
            path: Target; an existing file is replaced in one step. An address goes Lightning's own way.
            storage_options: Options of Lightning's own way.

        Raises:
            QsdError: If the file cannot be written; an older one under this name is unchanged.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QsdError(f"checkpoint {target} cannot be written: {error}.") from error
        content = io.BytesIO()
        torch.save(checkpoint, content)
        replace_content(target, content.getbuffer())


def write_whole_files(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints by `WholeFileCheckpointIO`, unless the user gave it another way.

    Args:
        trainer: A trainer that has not written anything.

    Raises:
        QsdError: For Lightning's ``AsyncCheckpointIO``, which removes a checkpoint before its successor is complete.
    """
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise QsdError(
            "AsyncCheckpointIO removes a checkpoint before the next one is complete, and callbacks would read files "
            "that are not yet written; leave it out of trainer.plugins."
        )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFileCheckpointIO()
