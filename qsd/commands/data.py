"""The options of the commands that read images: a data module, named by a configuration, by options, or by both."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import instantiate_class

from qsd.arguments import argument_message
from qsd.commands.devices import device_name
from qsd.configurations import find_configuration, read_configuration
from qsd.data import ImageData
from qsd.data.base import data_modules
from qsd.errors import QsdError
from qsd.program import add_traceback_argument

PARTS = {"train": "training", "val": "validation", "test": "test"}


class DataParser(jsonargparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, with the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Stop with the message of the parser.

        Args:
            message: The description of the mistake.
            ex: The exception that it comes from.

        Raises:
            QsdError: Always.
        """
        raise QsdError(argument_message(message, self._option_string_actions, {"data": data_modules()})) from ex


def add_data_arguments(parser: DataParser, config: str | Path | None) -> None:
    """Add ``--config``, ``--data`` and ``--data.NAME VALUE``.

    Args:
        parser: The parser of a command.
        config: The configuration of a training whose data are the default; ``None`` for none.

    Raises:
        QsdError: If the file is no such configuration.
    """
    parser.add_argument("--config", help="configuration of a training, whose data are taken")
    parser.add_subclass_arguments(
        LightningDataModule, "data", required=False, help="data module; its arguments follow as --data.NAME VALUE"
    )
    add_traceback_argument(parser)
    if config is not None:
        parser.set_defaults({"data": _data_of(find_configuration(config))})


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``, by default the GPU where there is one.

    Args:
        parser: The parser of a command.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device_name, default=default, help=f"cpu, cuda, cuda:1, ...; the default here is {default}"
    )


def parse_with_config(
    build_parser: Callable[[str | Path | None], DataParser],
    args: Sequence[str],
    config_of: Callable[[str], Path | None] = lambda _: None,
) -> Namespace:
    """Parse arguments among which ``--config`` replaces defaults of the parser, and therefore is read first.

    Args:
        build_parser: Makes the parser, given the configuration or ``None``.
        args: The arguments of the command.
        config_of: The configuration that belongs to the first positional argument, for calls without ``--config``.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("path", nargs="?", default="")
    first.add_argument("--config")
    known = first.parse_known_args(args)[0]
    return build_parser(known.config or config_of(known.path)).parse_args(args)


def data_from_arguments(options: Namespace) -> ImageData:
    """The data module that the options name.

    Args:
        options: The parsed options.

    Raises:
        QsdError: If they name none, or one that is no `ImageData`.
    """
    if options.data is None:
        raise QsdError("no images are named; give --config FILE of a training, or --data NAME --data.root DIR.")
    data: Any = instantiate_class((), options.data.as_dict())
    if not isinstance(data, ImageData):
        raise QsdError(f"{type(data).__name__} is no qsd.data.ImageData; subclass it, or work in Python.")
    return data


def _data_of(config: Path) -> Any:
    text = read_configuration(config)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a date that is none
        raise QsdError(f"configuration {config} is no YAML: {' '.join(str(error).split())}") from error
    if "data" not in content:
        raise QsdError(f"{config} has no data section; name the images with --data.")
    return content["data"]
