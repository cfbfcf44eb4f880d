"""Lightning tasks."""

from qsd.tasks.classification import AuxiliaryLoss, ClassificationTask
from qsd.tasks.loading import load_task, load_trained

__all__ = ["AuxiliaryLoss", "ClassificationTask", "load_task", "load_trained"]
