"""Fine-grained distillation: a loss aligns a student's attention and logits with those of a teacher."""

from qsd.distillation.attention import PROJECTIONS, AttentionMaps, AttentionRecorder, attention_layers
from qsd.distillation.losses import (
    LogitsKind,
    attention_distances,
    attention_loss,
    logits_loss,
    match_layers,
    match_maps,
)
from qsd.distillation.similarity import similarity_distance, token_similarity
from qsd.distillation.teacher import Teacher, build_teacher
from qsd.distillation.terms import DistillationOptions, DistillationTerms

__all__ = [
    "PROJECTIONS",
    "AttentionMaps",
    "AttentionRecorder",
    "DistillationOptions",
    "DistillationTerms",
    "LogitsKind",
    "Teacher",
    "attention_distances",
    "attention_layers",
    "attention_loss",
    "build_teacher",
    "logits_loss",
    "match_layers",
    "match_maps",
    "similarity_distance",
    "token_similarity",
]
