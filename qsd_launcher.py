"""The command ``qsd``: answers for the version and the list of subcommands, and starts the others.

This module lies beside the package because importing ``qsd`` imports PyTorch, which takes seconds, and
``qsd --version``, ``qsd --help`` and a mistyped subcommand need none of it.
"""

import difflib
import gc
import runpy
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

# The module of each subcommand, whose `main` takes the arguments, and its line in the help.
SUBCOMMANDS = {
    "fit": ("qsd.cli", "Train a classifier."),
    "validate": ("qsd.cli", "Evaluate a checkpoint on the validation images."),
    "test": ("qsd.cli", "Evaluate a checkpoint on the test images."),
    "predict": ("qsd.cli", "Write the predictions of a checkpoint to a CSV file."),
    "convert": ("qsd.commands.convert", "Convert a checkpoint to binary spikes, verify it and write its report."),
    "export": ("qsd.commands.export", "Write a trained network as an ONNX, packed or NIR file."),
    "run": ("qsd.commands.run", "Classify images with an exported file, or draw the predictions of a detector."),
    "analyze": ("qsd.commands.analyze", "Measure the information in the spikes of attention layers."),
    "profile": ("qsd.commands.profile", "Count the parameters, operations and neurons of models."),
    "import-checkpoint": ("qsd.commands.import_checkpoint", "Read a checkpoint of the published QSD-Transformer code."),
    "results": ("qsd.commands.results", "Keep the files of finished runs, and make tables of results from them."),
    "benchmark": ("qsd.commands.benchmark", "Measure speed and memory beside the float twin."),
    "demo": ("qsd.commands.demo", "Train, test and convert a small network on digits."),
}
TRAINING = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: The arguments without the name of the program; ``None`` for those of the process.

    Returns:
        The exit code: 0, 1 after an unforeseen error, 2 after a mistake of the user, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    command = next((word for word in arguments if word != "--traceback"), "")
    if command == "--version":
        print(f"qsd {_version()}")
    elif command in ("-h", "--help"):
        print(_help())
    elif command in TRAINING or command.split("=")[0] in ("--config", "--print_config"):
        return int(_imported("qsd.cli").train(arguments))
    elif command in SUBCOMMANDS:
        arguments.remove(command)
        return int(_imported(SUBCOMMANDS[command][0]).main(arguments))
    else:
        print(f"qsd: error: {_unknown(command)}", file=sys.stderr)
        return 2
    return 0


def run() -> NoReturn:
    """Entry point of the console script ``qsd`` and of ``python -m qsd``."""
    try:
        code = main()
    except KeyboardInterrupt:  # during an import
        code = 130
    except Exception as error:  # with --traceback
        traceback.print_exc()
        code = import_module("qsd.program").exit_code(error)
    sys.exit(code)


def run_lightning() -> NoReturn:
    """Entry point of the console script ``lightning``.

    The package ``lightning-sdk`` ships a command of that name, too. Where it is installed, it gets all subcommands but
    those of a training.
    """
    ours = {*TRAINING, "-h", "--help", "--version", "--config", "--traceback"}
    if sys.argv[1:] and sys.argv[1] not in ours and find_spec("lightning_sdk") is not None:
        sys.exit(import_module("lightning_sdk.cli.entrypoint").main_cli())
    run()


def _imported(name: str) -> ModuleType:
    """A module, with whatever it imports left out of garbage collection.

    PyTorch's thousands of modules and classes stay until the end, and passes over them take a second of a start.
    """
    if name in sys.modules:
        return sys.modules[name]
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(name)
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _version() -> str:
    """The version, read from the package without importing it."""
    package = find_spec("qsd")
    folder = package.submodule_search_locations[0] if package and package.submodule_search_locations else ""
    return str(runpy.run_path(f"{folder}/_version.py")["__version__"])


def _help() -> str:
    width = max(map(len, SUBCOMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, (_, summary) in SUBCOMMANDS.items()]
    return "\n".join(
        (
            "usage: qsd SUBCOMMAND [OPTIONS]",
            "",
            "Train quantized spike-driven vision transformers, convert them to binary spikes, and measure their cost.",
            "",
            "subcommands:",
            *lines,
            "",
            "options:",
            f"  {'-h, --help':<{width}}Show this text; qsd SUBCOMMAND --help shows the options of a subcommand.",
            f"  {'--version':<{width}}Show the version.",
            f"  {'--traceback':<{width}}Show where an error occurred; goes with any subcommand.",
        )
    )


def _unknown(command: str) -> str:
    if not command:
        return f"no subcommand is given; choose one of {', '.join(SUBCOMMANDS)}."
    known = (*SUBCOMMANDS, "--help", "--version") if command.startswith("-") else tuple(SUBCOMMANDS)
    near = difflib.get_close_matches(command, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SUBCOMMANDS)}."
    return f"the subcommand {command!r} is unknown; {hint}"
