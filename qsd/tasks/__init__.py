"""Lightning tasks."""

from qsd.tasks.classification import AuxiliaryLoss, ClassificationTask

__all__ = ["AuxiliaryLoss", "ClassificationTask"]
