"""The first convolution of weights that were trained on another number of channels."""

import logging
import math

from torch import Tensor, nn

logger = logging.getLogger(__name__)


def adapt_first(network: nn.Module, state: dict[str, Tensor], first: str) -> bool:
    """Change the weights of the first convolution to the network's number of channels, as timm does.

    Args:
        network: The network that the weights are for.
        state: Tensors by name; the one of the first convolution is replaced.
        first: Name of the first convolution.

    Returns:
        Whether the weights were changed. The step sizes of the convolution have to be measured again then.
    """
    name = f"{first}.weight"
    weight, own = state.get(name), network.state_dict().get(name)
    if weight is None or own is None or weight.dim() != 4 or weight.shape[1] == own.shape[1]:
        return False
    before, after = weight.shape[1], own.shape[1]
    if after == 1:
        state[name] = weight.sum(1, keepdim=True)
    else:
        state[name] = weight.repeat(1, math.ceil(after / before), 1, 1)[:, :after] * (before / after)
    logger.info("adapted the first convolution from %d to %d channels.", before, after)
    return True
