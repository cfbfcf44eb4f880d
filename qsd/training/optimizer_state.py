"""Optimizer states that are restored by the names of parameters.

PyTorch restores the state of an optimizer by position: where a parameter has moved within the model since the file was
written, it receives the moments of another one without a word. Here every parameter group carries the names of its
parameters (under ``"param_names"``, as in an optimizer of PyTorch that is built from named parameters), files contain
them, and a restored optimizer takes over the order of the file. Learning-rate schedulers, which store one value for
each group, stay right with it.

Files of version 0.1.0 contain no names. `add_names` derives them from the order of the file's state dict, which is the
order in which that version passed the parameters to its optimizer.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from qsd.errors import QsdError
from qsd.layers.renamed import present_name
from qsd.layers.steps import step_names

Group = dict[str, Any]
_NAMES, _TYPE = "param_names", "optimizer"
# Entries of a group that do not tell its optimizer: every optimizer has them, or versions of PyTorch differ in them.
_COMMON = {"params", _NAMES, "lr", "initial_lr", "lr_scale", "weight_decay", "decoupled_weight_decay"}
_COMMON |= {"foreach", "fused", "capturable", "differentiable", "maximize"}
_HINT = "start a new training from the weights of the checkpoint, or resume with the version and settings that wrote it"


def restore_by_name(optimizer: Optimizer, model: nn.Module, settings: Collection[str] = ()) -> None:
    """Let an optimizer store the names of its parameters, and restore a state by them.

    Args:
        optimizer: The optimizer of a training that has just been built, without a learning-rate scheduler.
        model: The model whose parameters it updates.
        settings: Options of groups, such as ``"weight_decay"``, that keep the values of this training when a state is
            restored. With ``"lr"`` among them, learning rates keep their place in the schedule.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group[_NAMES] = [names[id(parameter)] for parameter in group["params"]]
    kept = {
        frozenset(group[_NAMES]): {key: group[key] for key in settings if key in group}
        for group in optimizer.param_groups
    }
    # timm's Lookahead passes states through to the optimizer within it, whose groups it shares.
    stored: Optimizer = getattr(optimizer, "_base_optimizer", optimizer)
    stored.register_state_dict_post_hook(_store_type)
    stored.register_load_state_dict_pre_hook(partial(_take_order, kept))


def _store_type(optimizer: Optimizer, state: dict[str, Any]) -> None:
    state[_TYPE] = type(optimizer).__name__


def _take_order(kept: Mapping[frozenset[str], Group], optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Check a state that is about to be loaded, and bring the optimizer's groups into its order."""
    _check_type(state, optimizer)
    groups = state["param_groups"]
    if not all(_NAMES in group for group in groups):
        raise QsdError(f"the optimizer state has no names of parameters and cannot be restored safely; {_HINT}.")
    current = {frozenset(group[_NAMES]): group for group in optimizer.param_groups}
    renamed, ordered = [], []
    for group in groups:
        names = [present_name(name) for name in group[_NAMES]]
        match = current.pop(frozenset(names), None)
        if match is None:
            raise _other_groups(names)
        parameters = dict(zip(match[_NAMES], match["params"]))
        match["params"], match[_NAMES] = [parameters[name] for name in names], names
        ordered.append(match)
        renamed.append({**group, **_settings(kept[frozenset(names)], group), _NAMES: names})
    if current:
        raise _other_groups(sorted(next(iter(current))))
    optimizer.param_groups[:] = ordered
    return {**state, "param_groups": renamed}


def _settings(kept: Group, saved: Group) -> Group:
    """The options of a group of this training, where they differ from those in the file."""
    found = {key: value for key, value in kept.items() if key != "lr" and key in saved and saved[key] != value}
    peak, before = kept.get("lr"), saved.get("initial_lr")
    if peak is not None and before is not None and peak != before:
        found |= {"initial_lr": peak, "lr": saved["lr"] * (peak / before) if before else peak}
    return found


def _other_groups(names: list[str]) -> QsdError:
    return QsdError(
        f"the optimizer state has other parameter groups than this training (first difference: the "
        f"group of {names[0]}, {len(names)} parameters); {_HINT}."
    )


def _check_type(state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Refuse the state of another optimizer. A file of version 0.1.0 tells it by the options of its groups alone."""
    current = type(getattr(optimizer, "_base_optimizer", optimizer)).__name__
    saved = state.get(_TYPE)
    if saved is None and all(
        group.keys() - _COMMON == current_group.keys() - _COMMON
        for group, current_group in zip(state["param_groups"], optimizer.param_groups)
    ):
        return
    if saved != current:
        raise QsdError(
            f"the checkpoint has the state of {f'the optimizer {saved}' if saved else 'another optimizer'}, this "
            f"training uses {current}; {_HINT}."
        )


def add_names(state: dict[str, Any], tensors: Iterable[str], optimizer: Optimizer, model: nn.Module) -> None:
    """Add the names of parameters to an optimizer state of version 0.1.0, in place. A state with names stays as it is.

    In version 0.1.0 the groups were filled in the order of the model's parameters, which is the order of its state
    dict. The groups stood in one of several orders; the numbers and shapes in the state tell which.

    Args:
        state: State of the optimizer in the file.
        tensors: Names of the file's state dict, in its order.
        optimizer: The optimizer of this training, after `restore_by_name`.
        model: The model whose parameters it updates.

    Raises:
        QsdError: If not exactly one order agrees with the state.
    """
    groups = state["param_groups"]
    if all(_NAMES in group for group in groups):
        return
    _check_type(state, optimizer)
    place = {present_name(name): index for index, name in enumerate(tensors)}
    current = [dict(zip(group[_NAMES], group["params"])) for group in optimizer.param_groups]
    unknown = [name for group in current for name in group if name not in place]
    if unknown:
        raise _other_groups(unknown)
    current = [dict(sorted(group.items(), key=lambda item: place[item[0]])) for group in current]
    orders = {tuple(tuple(group) for group in order): order for order in _orders(current, place, step_names(model))}
    agreeing = [order for order in orders.values() if _agrees(groups, state["state"], order)]
    if len(agreeing) != 1:
        raise QsdError(
            "the optimizer state is of version 0.1.0 and does not agree with the parameter groups of this training; "
            f"{_HINT}."
        )
    for group, names in zip(groups, agreeing[0]):
        group[_NAMES] = list(names)


def _orders(
    current: list[dict[str, Tensor]], place: Mapping[str, int], steps: set[str]
) -> Iterator[list[dict[str, Tensor]]]:
    """The orders in which version 0.1.0 may have passed groups to an optimizer.

    Args:
        current: Groups of today, each in the order of that version.
        place: Position of each parameter in the file.
        steps: Names of step sizes.
    """

    def first(groups: list[dict[str, Tensor]]) -> int:
        return min(place[name] for group in groups for name in group)

    yield current
    # By first parameter: detectors and segmenters.
    yield [group for groups in sorted(([group] for group in current), key=first) for group in groups]
    # By first parameter, where the step sizes of a layer follow its other parameters: classifiers with layer decay.
    layers: list[list[dict[str, Tensor]]] = []
    for group in current:
        if layers and len(layers[-1]) == 1 and group.keys() <= steps:
            layers[-1].append(group)
        else:
            layers.append([group])
    yield [group for groups in sorted(layers, key=first) for group in groups]


def _agrees(groups: list[Group], state: Mapping[int, Any], order: list[dict[str, Tensor]]) -> bool:
    """Whether the numbers of parameters and the shapes of a state are those of the given groups."""
    if [len(group["params"]) for group in groups] != [len(group) for group in order]:
        return False
    pairs = [
        (state.get(index, {}), parameter)
        for group, named in zip(groups, order)
        for index, parameter in zip(group["params"], named.values())
    ]
    return all(
        value.shape == parameter.shape
        for moments, parameter in pairs
        for value in moments.values()
        # Factored moments and counters of steps have fewer dimensions than the parameter.
        if isinstance(value, Tensor) and value.dim() == parameter.dim()
    )
