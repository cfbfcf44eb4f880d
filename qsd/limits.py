"""Ranges of numbers that users give, checked where the numbers come in."""

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from qsd.errors import QsdError


class BadValue(argparse.ArgumentTypeError, ValueError):
    """A value that an argument of a parser cannot have; argparse and jsonargparse show its message."""


LARGEST_SEED = 2**32 - 1  # NumPy's
LARGEST_LABEL = 999_999  # A larger one is no class but another number; names of so many classes would fill the memory.

# Lightning fails on values out of these ranges late, or passes over them.
_TRAINER: dict[str, tuple[float | None, float | None]] = {
    "max_epochs": (-1, None),
    "min_epochs": (0, None),
    "max_steps": (-1, None),
    "min_steps": (0, None),
    "limit_train_batches": (0, None),
    "limit_val_batches": (0, None),
    "limit_test_batches": (0, None),
    "limit_predict_batches": (0, None),
    "overfit_batches": (0, None),
    "check_val_every_n_epoch": (1, None),
    "num_sanity_val_steps": (-1, None),
    "log_every_n_steps": (0, None),
    "accumulate_grad_batches": (1, None),
    "gradient_clip_val": (0, None),
    "reload_dataloaders_every_n_epochs": (0, None),
}


def problem(value: Any, least: float | None = None, most: float | None = None) -> str | None:
    """The reason why a number cannot be used, or ``None``.

    Args:
        value: The number.
        least: Smallest value that is allowed.
        most: Largest value that is allowed.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "is no number"
    if not math.isfinite(value):
        return "is not finite"
    if (least is None or value >= least) and (most is None or value <= most):
        return None
    if least == 0 and value < 0:
        return "is negative"
    if most is None:
        return f"is below {least}"
    return f"is above {most}" if least is None else f"is not from {least} to {most}"


def check_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
    """Refuse a number that is not finite or out of its range; ``None`` passes.

    Args:
        name: Name of the argument, for the message.
        value: The number.
        least: Smallest value that is allowed.
        most: Largest value that is allowed.

    Raises:
        QsdError: With the name, the value and its range.
    """
    if value is not None and (reason := problem(value, least, most)) is not None:
        raise QsdError(f"{name}={value} {reason}.")


def check_trainer(settings: Mapping[str, Any], seed: Any) -> None:
    """Refuse numbers of Lightning's trainer that only fail deep inside of it, such as intervals of zero.

    Args:
        settings: Arguments of the trainer by name.
        seed: The argument ``seed_everything``.

    Raises:
        QsdError: For the first one that is wrong.
    """
    if not isinstance(seed, bool):
        check_number("seed_everything", seed, 0, LARGEST_SEED)
    for name, (least, most) in _TRAINER.items():
        check_number(f"trainer.{name}", settings.get(name), least, most)
    devices = settings.get("devices")
    if settings.get("accelerator", "auto") in ("auto", "cpu") and str(devices).isdecimal():
        # Each process of a training on a processor takes a gigabyte of memory or more.
        check_number("trainer.devices", int(str(devices)), 1, max(16, 4 * (os.cpu_count() or 1)))
    interval = settings.get("val_check_interval")
    if isinstance(interval, int | float):
        check_number("trainer.val_check_interval", interval, 0)
        if interval == 0:
            raise QsdError("trainer.val_check_interval=0 is not positive; leave it out to validate after each epoch.")


def whole(least: int | None = None, most: int | None = None) -> Callable[[Any], int]:
    """The type of an argument of a parser: a whole number in a range.

    Args:
        least: Smallest value that is allowed.
        most: Largest value that is allowed.
    """
    return _type(int, "whole number", least, most)


def number(least: float | None = None, most: float | None = None) -> Callable[[Any], float]:
    """The type of an argument of a parser: a finite number in a range.

    Args:
        least: Smallest value that is allowed.
        most: Largest value that is allowed.
    """
    return _type(float, "number", least, most)


def _type(kind: type, noun: str, least: float | None, most: float | None) -> Callable[[Any], Any]:
    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadValue(f"{text!r} is no {noun}") from error
        reason = problem(value, least, most)
        if reason is not None:
            raise BadValue(f"{text} {reason}")
        return value

    return parse


def json_object(text: str) -> dict[str, Any]:
    """The type of an argument of a parser: a JSON object.

    Args:
        text: Its text.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadValue(f"{text!r} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadValue(f"{text!r} is no JSON object, such as '{{\"time_steps\": 8}}'")
    return content
