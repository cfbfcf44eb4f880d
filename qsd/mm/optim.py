"""Parameter groups of networks with learned step sizes, for mmengine's optimizer wrappers."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from qsd.errors import QsdError
from qsd.training.parameter_groups import step_parameters


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class StepSizeOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """A group for each combination of learning rate and weight decay.

    As in classification, one-dimensional parameters (norms, biases, step sizes, layer scales) do not decay, and the
    step sizes of quantizers and neurons learn at a lower rate: Adam moves every parameter by about the learning rate,
    which is as much as a whole step size. ``paramwise_cfg`` takes ``step_lr`` (learning rate of step sizes over that
    of the others, default 0.01) and ``lr_mult`` (factors by prefix of the parameters' names).
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        # Without any paramwise option mmengine would put all parameters into one group.
        super().__init__(optim_wrapper_cfg, {"step_lr": 0.01, **(paramwise_cfg or {})})

    def _validate_cfg(self) -> None:
        unknown = set(self.paramwise_cfg) - {"step_lr", "lr_mult"}
        if unknown:
            raise QsdError(f"paramwise_cfg has {', '.join(sorted(unknown))}; known are step_lr and lr_mult.")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Sort the trainable parameters of a model into groups.

        Args:
            params: List that the groups are appended to.
            module: The model.
        """
        steps = step_parameters(module)
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
