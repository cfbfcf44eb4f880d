r"""Distance between the token similarities of two attention layers.

A head's token similarity is :math:`G = X X^\top` of its queries, keys or values :math:`X` (tokens by channels), divided
by its Frobenius norm. The distance between a student's and a teacher's,

.. math:: D = \| \tilde G_S - \tilde G_T \|_F^2 = 2 - 2 \cos(G_S, G_T),

does not change when either side is scaled or its channels are rotated, and needs no equal numbers of channels: only
the tokens have to correspond. It is a reconstruction after Q-ViT's distribution-guided distillation (Li et
al., NeurIPS 2022), which does so for queries and keys; the exact loss of QSD-Transformer is not public.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def token_similarity(x: Tensor) -> Tensor:
    """Similarity of all pairs of tokens: ``X X^T`` over its Frobenius norm.

    Args:
        x: Queries, keys or values ``[..., d, N]``.

    Returns:
        ``[..., N, N]``, of norm one; zeros for a silent head.
    """
    return _normalise(x.transpose(-1, -2) @ x)[0]


def similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Frobenius distance of two normalised token similarities, 0 (the same) to 2, in float32 or better.

    Where tokens outnumber channels no ``N x N`` matrix is built: products of ``d x d`` are
    sufficient. The gradient is computed together with the distance, so that the backward pass needs one tensor
    of the student's size. Both forms work on differences, and keep their relative precision where student and
    teacher nearly agree; ``2 - 2 cos`` would lose half the digits.

    A silent head (zeros everywhere) has the similarity zero, the distance 1 to any other, and no gradient.

    Args:
        student: Queries, keys or values ``[B, heads, d, N]``.
        teacher: The same number of heads and tokens, ``[B, heads, d', N]``; without gradient.

    Returns:
        ``[B, heads]``. Twice differentiating is an error.
    """
    with torch.autocast(student.device.type, enabled=False):
        precision = torch.promote_types(student.dtype, torch.float32)
        return _SimilarityDistance.apply(student.to(precision), teacher.detach().to(precision))


class _SimilarityDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        # One dense copy each: heads of a channels-last map are otherwise copied by every product below.
        x, y = (t.flatten(0, 1).contiguous() for t in (student, teacher))
        channels, tokens = x.shape[-2:]
        # Seven products of N d^2 operations against three of N^2 d.
        compute = _from_tokens if tokens <= 2 * max(channels, y.shape[-2]) else _from_channels
        distance, gradient = compute(x, y, ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient.view(student.shape))
        return distance.view(student.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None, None], None


def _from_tokens(x: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Distance ``[B]`` and gradient ``[B, d, N]`` by way of ``N x N`` matrices."""
    similarity, scale = _normalise(x.transpose(-1, -2) @ x)
    other, scale_other = _normalise(y.transpose(-1, -2) @ y)
    difference = similarity - other
    distance = difference.square().sum(dim=(-1, -2))
    if not with_gradient:
        return distance, None
    # D distance / d X = 4 / |G| X (difference - distance / 2 similarity): the second term is the norm's own gradient.
    inner = difference.sub_(similarity.mul_(distance.view(-1, 1, 1) / 2))
    return distance, (x @ inner).mul_(4 * scale * (scale_other > 0))


def _from_channels(x: Tensor, y: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    r"""The same by way of ``d x d`` matrices.

    With :math:`U, V` the features divided by the roots of their similarities' norms, :math:`P = U - V` and
    :math:`Q = U + V`, the difference of the similarities is :math:`(P^\top Q + Q^\top P) / 2`, whose norm follows
    from the products :math:`P P^\top, Q Q^\top, Q P^\top`.
    """
    channels = x.shape[-2]
    scale, scale_other = (_normalise(t @ t.transpose(-1, -2))[1] for t in (x, y))
    u, v = x * scale.sqrt(), y * scale_other.sqrt()
    if u.shape != v.shape:  # Channels of zeros leave the similarity as it is.
        wide = max(channels, y.shape[-2])
        u, v = (F.pad(t, (0, 0, 0, wide - t.shape[-2])) for t in (u, v))
    p, q = u - v, u + v
    pp, qq, qp = p @ p.transpose(-1, -2), q @ q.transpose(-1, -2), q @ p.transpose(-1, -2)
    pq = qp.transpose(-1, -2)
    distance = (pp * qq + qp * pq).sum(dim=(-1, -2)) / 2
    if not with_gradient:
        return distance, None
    own = (pp + qq + qp + pq) * (distance.view(-1, 1, 1) / 4)
    gradient = (qq + pq - own) @ p
    gradient.baddbmm_(pp + qp - own, q)
    return distance, gradient[:, :channels] * (scale.sqrt() * (scale_other > 0))


def _normalise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices ``[..., n, n]`` over their Frobenius norms, and the factors ``[..., 1, 1]``; zeros, 0 for zeros."""
    # The largest entry first: squares of tiny or huge entries leave float32's range.
    largest = matrix.abs().amax(dim=(-1, -2), keepdim=True)
    silent = largest == 0
    largest = largest.masked_fill(silent, 1)
    norm = (matrix / largest).square().sum(dim=(-1, -2), keepdim=True).sqrt()
    factor = norm.masked_fill(silent, 1).mul(largest).reciprocal().masked_fill(silent, 0)
    return matrix * factor, factor
