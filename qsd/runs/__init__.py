"""The runs of trainings with Lightning: their folders, their checkpoint files, and how they stop."""

from qsd.runs.checkpoint_io import WholeFileCheckpointIO, write_whole_files
from qsd.runs.folders import Claim, claim, claim_for_loggers, folder_name, place_checkpoints, run_folder
from qsd.runs.interruption import SaveOnStop
from qsd.runs.newest import find_checkpoint, newest_checkpoint, read_run_checkpoint
from qsd.runs.record import RunRecord, WriteRunRecord

__all__ = [
    "Claim",
    "RunRecord",
    "SaveOnStop",
    "WholeFileCheckpointIO",
    "WriteRunRecord",
    "claim",
    "claim_for_loggers",
    "find_checkpoint",
    "folder_name",
    "newest_checkpoint",
    "place_checkpoints",
    "read_run_checkpoint",
    "run_folder",
    "write_whole_files",
]
