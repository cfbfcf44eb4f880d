"""Sizes of a network's input that a task takes from its data."""

from typing import Any


def sizes_from_data(model_args: dict[str, Any] | None, data: Any) -> dict[str, Any]:
    """Arguments of a model, completed by the channels, and for recordings by the frames, of a data module.

    Args:
        model_args: Arguments that were given; they stay.
        data: The data module, or ``None``.
    """
    completed = dict(model_args or {})
    if (channels := getattr(data, "in_chans", None)) is not None:
        completed.setdefault("in_chans", channels)
    if (frames := getattr(data, "frames", None)) is not None:
        completed.setdefault("frames", frames)
        completed.setdefault("events", True)
    return completed
