"""Parameter groups of networks with learned step sizes, for mmengine's optimiser wrappers."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from qsd.errors import QsdError
from qsd.quantizers import StepSizeQuantizer


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class StepSizeOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Few groups: weights, what must not decay, step sizes, and parts with a learning rate of their own.

    As in classification, one-dimensional parameters (norms, biases, step sizes, layer scales) do not decay, and step
    sizes learn slowly: Adam moves every parameter by about the learning rate, which is as much as a whole step size.
    ``paramwise_cfg`` takes ``step_lr`` (the step sizes' learning rate over that of the others, default 0.01) and
    ``lr_mult`` (factors by prefix of the parameters' names).
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        # Without any paramwise option mmengine would make one group of all.
        super().__init__(optim_wrapper_cfg, {"step_lr": 0.01, **(paramwise_cfg or {})})

    def _validate_cfg(self) -> None:
        unknown = set(self.paramwise_cfg) - {"step_lr", "lr_mult"}
        if unknown:
            raise QsdError(f"paramwise_cfg has {', '.join(sorted(unknown))}; known are step_lr and lr_mult.")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Sort the parameters of a model that learn into groups.

        Args:
            params: list to append the groups to.
            module: the model.
        """
        steps = {id(m.step) for m in module.modules() if isinstance(m, StepSizeQuantizer)}
        step_lr = self.paramwise_cfg["step_lr"]
        factors = self.paramwise_cfg.get("lr_mult", {})
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), 1.0)
                factor *= step_lr if id(parameter) in steps else 1.0
                groups.setdefault((factor, parameter.dim() > 1), []).append(parameter)
        for (factor, decays), members in groups.items():
            decay = {} if decays else {"weight_decay": 0.0}
            params.append({"params": members, "lr": self.base_lr * factor, **decay})
