"""The losses of distillation: token similarities of matched attention layers, and logits."""

from math import gcd
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from qsd.distillation.attention import PROJECTIONS, AttentionMaps
from qsd.distillation.similarity import similarity_distance
from qsd.errors import QsdError

LogitsKind = Literal["soft", "hard"]


def match_layers(students: int, teachers: int) -> list[int]:
    """The teacher's layer that each of the student's layers is compared with.

    Layers are matched evenly, the last with the last: 4 of 12 are the layers 2, 5, 8, 11. Where the student is
    deeper, several of its layers share a teacher's.

    Args:
        students: Number of layers of the student.
        teachers: Number of layers of the teacher.
    """
    return [-(-(layer + 1) * teachers // students) - 1 for layer in range(students)]


def match_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring two maps to the same number of heads and tokens.

    - Heads that differ in number are joined, neighbours with neighbours, into as many groups as divide both numbers
      (8 and 12 heads become 4 groups; 8 and 3 a single one). A group's similarity is the sum of its heads'.
    - Grids that differ are averaged down to the coarser one.

    Args:
        student: ``[B, heads, d, H, W]``.
        teacher: ``[B, heads', d', H', W']``.

    Returns:
        Both as ``[B, groups, channels, N]``.

    Raises:
        QsdError: If the grids have other proportions, or a single token is left, which resembles itself.
    """
    groups = gcd(student.shape[1], teacher.shape[1])
    grids = [(student.shape[-2], student.shape[-1]), (teacher.shape[-2], teacher.shape[-1])]
    coarse, fine = sorted(grids)
    described = f"token grids of {grids[0][0]}x{grids[0][1]} (student) and {grids[1][0]}x{grids[1][1]} (teacher)"
    if coarse[1] > fine[1] or abs(coarse[0] * fine[1] - coarse[1] * fine[0]) >= fine[1]:
        raise QsdError(f"{described} have different proportions; the teacher must see the same part of the image.")
    if coarse == (1, 1):
        raise QsdError(f"{described}: a single token resembles only itself; use larger images or smaller strides.")
    pair = []
    for x, grid in zip((student, teacher), grids):
        if grid != coarse:
            x = F.adaptive_avg_pool2d(x.flatten(1, 2), coarse).unflatten(1, x.shape[1:3])
        pair.append(x.unflatten(1, (groups, -1)).flatten(2, 3).flatten(-2))
    return pair[0], pair[1]


def attention_distances(students: list[AttentionMaps], teachers: list[AttentionMaps]) -> dict[str, list[Tensor]]:
    """Distances between the token similarities of the student and the teacher.

    Args:
        students: Maps of the student's layers.
        teachers: Maps of the teacher's; their number, heads and grids may differ.

    Returns:
        For query, key and value and each of the student's layers, `similarity_distance`: ``[B, groups]``.
    """
    chosen = [teachers[layer] for layer in match_layers(len(students), len(teachers))]
    return {
        projection: [
            similarity_distance(*match_maps(getattr(student, projection), getattr(teacher, projection)))
            for student, teacher in zip(students, chosen)
        ]
        for projection in PROJECTIONS
    }


def attention_loss(students: list[AttentionMaps], teachers: list[AttentionMaps]) -> dict[str, Tensor]:
    """Fine-grained distillation: distances of query, key and value, summed over layers and heads, averaged over images.

    Args:
        students: Maps of the student's layers.
        teachers: Maps of the teacher's layers.

    Returns:
        One scalar each for ``"query"``, ``"key"`` and ``"value"``.
    """
    distances = attention_distances(students, teachers)
    return {
        name: sum((d.sum(1).mean() for d in layers[1:]), layers[0].sum(1).mean()) for name, layers in distances.items()
    }


def logits_loss(student: Tensor, teacher: Tensor, kind: LogitsKind = "soft", temperature: float = 1.0) -> Tensor:
    """Distillation of the classifier's output.

    Args:
        student: Logits ``[B, classes]``.
        teacher: Logits ``[B, classes]``.
        kind: ``"soft"``: the Kullback-Leibler divergence of the student's probabilities from the teacher's, times the
            squared temperature (Hinton et al., 2015); ``"hard"``: cross-entropy with the teacher's most likely class
            (Touvron et al., DeiT, 2021).
        temperature: Divisor of both logits, if soft.

    Returns:
        A scalar, averaged over images.
    """
    precision = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(precision), teacher.detach().to(precision)
    if kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=-1))
    wanted = (teacher / temperature).log_softmax(dim=-1)
    got = (student / temperature).log_softmax(dim=-1)
    return F.kl_div(got, wanted, reduction="batchmean", log_target=True) * temperature**2
