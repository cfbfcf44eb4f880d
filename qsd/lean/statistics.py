"""Statistics of batch norms in training, of one process or of several that share them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

Norm = nn.BatchNorm2d | nn.SyncBatchNorm
# The values per channel of a batch: a number, or a tensor without dimensions where processes share the statistics.
Values = int | Tensor


def group_of(norm: Norm) -> Any:
    """The processes that share the statistics of a norm in training, or ``None`` for this process alone.

    Args:
        norm: Any batch norm.
    """
    if not isinstance(norm, nn.SyncBatchNorm) or not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def gathered(values: Tensor, group: Any) -> Tensor:
    """The values of all processes, ``[processes, n]``, in the same order in each, so that sums have the same bits.

    Args:
        values: ``[n]``, of the same length in each process.
        group: The processes.
    """
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, values, group)
    return torch.stack(parts)


class Running(NamedTuple):
    """The running statistics of a norm, and the weight of a new batch in them.

    Attributes:
        mean: Running mean ``[C]``, or ``None`` if there is none.
        var: Running variance ``[C]``, unbiased, or ``None`` if there is none.
        share: Weight of this batch, the norm's momentum.
        eps: Epsilon of the norm.
        group: The processes whose batches are one batch for the norm; ``None`` for this process alone.
    """

    mean: Tensor | None
    var: Tensor | None
    share: float
    eps: float
    group: Any = None

    @staticmethod
    def of(norm: Norm, x: Tensor) -> "Running":
        """The statistics of a norm that is about to see a batch; the batch is counted.

        Args:
            norm: A norm in training mode.
            x: The batch ``[B, C, H, W]``.

        Raises:
            ValueError: For a single value per channel, which has no variance, as PyTorch does.
        """
        group = group_of(norm) if isinstance(norm, nn.SyncBatchNorm) else None
        if group is None and x.numel() // x.shape[1] < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        share = 0.0 if norm.momentum is None else norm.momentum
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                share = 1 / float(norm.num_batches_tracked)
        return Running(norm.running_mean, norm.running_var, share, norm.eps, group)

    @torch.no_grad()
    def batch(self, x: Tensor) -> tuple[Tensor, Tensor, Values]:
        """Mean and variance (biased) of the batch by channel, and its values per channel; updates the statistics.

        Args:
            x: The batch ``[B, C, H, W]``, or the part of it in this process.
        """
        values = x.numel() // x.shape[1]
        if self.group is None:
            return *torch.batch_norm_update_stats(x, self.mean, self.var, self.share), values
        if values:
            mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        else:
            mean = var = x.new_zeros(x.shape[1])
        every = gathered(torch.cat([mean, var, mean.new_full((1,), values)]), self.group).double()
        means, variances, counts = every.split([len(mean), len(mean), 1], dim=1)
        total = counts.sum()
        joint = (means * counts).sum(0) / total
        spread = ((variances + (means - joint).square()) * counts).sum(0) / total
        mean, var, count = joint.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype)
        if self.mean is not None and self.var is not None:
            self.mean.lerp_(mean, self.share)
            self.var.lerp_(var * (count / (count - 1)), self.share)
        return mean, var, count


def normalised(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """A norm with given mean and variance.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[C]``.
        bias: ``[C]``.
        mean: ``[C]``.
        var: ``[C]``.
        eps: Epsilon of the norm.
    """
    if not x.numel():  # of one of several processes
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, values: Values, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `normalised`, through mean and variance, too, which depend on the batches of all processes.

    Args:
        grad: Gradient of the output.
        x: Input.
        weight: ``[C]``.
        mean: Mean of the batch of all processes.
        var: Its variance.
        values: Its values per channel.
        eps: Epsilon of the norm.
        group: The processes, or ``None`` for one.

    Returns:
        The gradients of input, weight and bias from the outputs of this process (that of the input: from the outputs of
        all), and the weight's gradient from the outputs of all processes.
    """
    inverse = (var + eps).rsqrt()

    def native(of_x: bool) -> tuple[Tensor, Tensor, Tensor]:
        mask = [of_x, True, True]
        return torch.ops.aten.native_batch_norm_backward(grad, x, weight, None, None, mean, inverse, True, eps, mask)

    if group is None:
        x_grad, weight_grad, bias_grad = native(of_x=True)
        return x_grad, weight_grad, bias_grad, weight_grad
    zeros = torch.zeros_like(weight)
    _, weight_grad, bias_grad = native(of_x=False) if x.numel() else (x, zeros, zeros)
    total_weight, total_bias = gathered(torch.cat([weight_grad, bias_grad]), group).sum(0).chunk(2)
    # x_grad = w i (g - mean(g) - xhat mean(g xhat)), with xhat = (x - m) i and the means over all processes.
    scale = weight * inverse
    slope = -scale * inverse * total_weight / values
    offset = -scale * total_bias / values - slope * mean
    x_grad = torch.addcmul(_by_channel(offset), grad, _by_channel(scale)).addcmul_(x, _by_channel(slope))
    return x_grad, weight_grad, bias_grad, total_weight


def _by_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
