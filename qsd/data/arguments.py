"""Naming a data module on the command line of a tool: by a training's configuration, by options, or both."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import instantiate_class

from qsd.data.base import ImageData
from qsd.errors import QsdError

__all__ = ["add_data_arguments", "data_from_arguments", "parse_with_config"]


def add_data_arguments(parser: ArgumentParser, config: str | Path | None) -> None:
    """Add ``--data`` and ``--data.NAME VALUE``.

    Args:
        parser: of the tool.
        config: configuration of a training whose data is the default; without it, ``--data`` has to be given.

    Raises:
        QsdError: if the configuration is none.
    """
    parser.add_subclass_arguments(
        LightningDataModule, "data", required=config is None, help="images; --data.NAME VALUE"
    )
    if config is not None:
        parser.set_defaults({"data": _data_of(Path(config))})


def parse_with_config(
    build_parser: Callable[[str | Path | None], ArgumentParser],
    args: Sequence[str] | None,
    config_of: Callable[[str], Path | None] = lambda _: None,
) -> Namespace:
    """Parse a tool's arguments, whose ``--config`` decides over the parser's defaults and so is looked at first.

    Args:
        build_parser: makes the parser, of the configuration or ``None``.
        args: of the command line; ``None`` for the program's own.
        config_of: the configuration that the first positional argument stands for, where ``--config`` is not given.
    """
    chosen = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chosen.add_argument("first", nargs="?", default="")
    chosen.add_argument("--config")
    known = chosen.parse_known_args(args)[0]
    return build_parser(known.config or config_of(known.first)).parse_args(args)


def data_from_arguments(options: Namespace) -> ImageData:
    """The data module that the options name.

    Args:
        options: what the parser returned.

    Raises:
        QsdError: if it is none of ours.
    """
    data: Any = instantiate_class((), options.data.as_dict())
    if not isinstance(data, ImageData):
        raise QsdError(f"{type(data).__name__} is no qsd.data.ImageData; subclass it, or work in Python.")
    return data


def _data_of(config: Path) -> Any:
    try:
        content = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise QsdError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "data" not in content:
        raise QsdError(f"{config} has no data section; name the images with --data.")
    return content["data"]
