"""Which parameters learn at a rate of their own."""

from torch import nn

from qsd.layers.steps import learned_steps


def step_parameters(model: nn.Module) -> set[int]:
    """The step sizes of quantizers and of neurons, as the ``id`` of each parameter.

    They learn at a lower rate: Adam and its kin move every parameter by about the learning rate per step, which is as
    much as a whole step size.

    Args:
        model: Any module.
    """
    return {id(step) for step in learned_steps(model).values()}
