"""What the command lines ``tools/mmdet_*.py`` and ``tools/mmseg_*.py`` share."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.runner import Runner
from torch import distributed

from qsd.errors import QsdError
from qsd.mm import ops
from qsd.mm.checks import check_data, check_weights
from qsd.mm.hooks import register_training_hooks
from qsd.mm.loading import move_data
from qsd.mm.resuming import check_resumable, checkpoint_to_resume
from qsd.reading import regular_file

# Mistakes of the user; Config raises the others for files that are no configurations and keys that do not exist.
_USER_ERRORS = (QsdError, OSError, torch.OutOfMemoryError)


def run(program: str, action: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, args: Any) -> int:
    """Run a program; a mistake of the user's gives one line on standard error.

    Args:
        program: its name.
        action: gets the parsed arguments.
        parser: of the arguments.
        args: arguments without the program's name; ``None`` for those of the process.

    Returns:
        The exit code: 0, 2 for a mistake, 130 if interrupted.
    """
    parser.prog = program
    parser.add_argument("--traceback", action="store_true", help="show where an error was noticed")
    try:
        options = parser.parse_args(args)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    try:
        action(options)
    except _USER_ERRORS as error:
        if options.traceback:
            raise
        print(f"{program}: error: {' '.join(str(error).split())} (--traceback shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    return 0


def train(program: str, framework: str, args: Sequence[str] | None) -> int:
    """Train what a configuration describes.

    Args:
        program: name of the tool.
        framework: ``"mmdet"`` or ``"mmseg"``.
        args: arguments, or ``None`` for those of the process.
    """
    parser = _parser(f"Train with {framework}.")
    parser.add_argument("--amp", action="store_true", help="mixed precision (CUDA)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="go on; default: the latest")
    parser.add_argument("--pretrained", metavar="CHECKPOINT", help="weights for the backbone, of any kind qsd reads")
    return run(program, lambda options: _train(options, framework), parser, args)


def test(program: str, framework: str, args: Sequence[str] | None) -> int:
    """Evaluate a checkpoint on the test part of a configuration.

    Args:
        program: name of the tool.
        framework: ``"mmdet"`` or ``"mmseg"``.
        args: arguments, or ``None`` for those of the process.
    """
    parser = _parser(f"Test with {framework}.")
    parser.add_argument("checkpoint", help="of a training")
    return run(program, lambda options: _test(options, framework), parser, args)


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="configuration file")
    parser.add_argument("--work-dir", help="for logs and checkpoints; default: runs/<configuration>")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by older launchers")
    return parser


def _train(options: argparse.Namespace, framework: str) -> None:
    config = load_config(options, framework)
    if options.amp:
        if not torch.cuda.is_available():
            raise QsdError("--amp needs a CUDA device, and there is none; leave it out.")
        config.optim_wrapper.type, config.optim_wrapper.loss_scale = "AmpOptimWrapper", "dynamic"
    if options.pretrained is not None:
        config.model.backbone.init_cfg = ConfigDict(type="Pretrained", checkpoint=options.pretrained)
    config.resume = options.resume is not None
    if config.resume:
        config.load_from = checkpoint_to_resume(config.work_dir) if options.resume == "auto" else options.resume
        if config.load_from is not None:
            check_resumable(config.load_from)
    runner = build_runner(config, ("train", "val"))
    if config.resume and config.load_from is not None:
        check_weights(runner.model, config.load_from)
    runner.train()


def _test(options: argparse.Namespace, framework: str) -> None:
    regular_file(options.checkpoint, "checkpoint")
    config = load_config(options, framework)
    config.load_from = options.checkpoint
    runner = build_runner(config, ("test",))
    check_weights(runner.model, options.checkpoint)
    runner.test()


def load_config(options: argparse.Namespace, framework: str) -> Config:
    """Read a configuration and apply the options that all tools have.

    A changed ``data_root`` is changed wherever the configuration uses it.

    Args:
        options: as parsed.
        framework: the one that the configuration must be for.

    Raises:
        QsdError: if there is no such file, it cannot be read, or it is for the other framework.
    """
    path = Path(options.config)
    if not path.is_file():
        raise QsdError(f"configuration {path} does not exist.")
    try:
        config = Config.fromfile(path)
        root = config.get("data_root")
        if options.cfg_options:
            config.merge_from_dict(options.cfg_options)
    except (SyntaxError, KeyError, TypeError, AttributeError, NameError) as error:
        raise QsdError(f"configuration {path}: {type(error).__name__}: {error}") from error
    if "model" not in config or config.get("default_scope") != framework:
        raise QsdError(
            f"configuration {path} is for {config.get('default_scope', 'no framework')}, not for {framework}."
        )
    if root is not None:
        move_data(config, root, config.data_root)
    config.launcher = options.launcher
    config.work_dir = options.work_dir or config.get("work_dir") or str(Path("runs", path.stem))
    if options.launcher != "none":  # elsewhere it would make Lightning, in this process, wait for others
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    return config


def build_runner(config: Config, parts: tuple[str, ...]) -> Runner:
    """A Runner, on CUDA or not, whose operators and data were checked.

    Args:
        config: complete.
        parts: of the data, those that will be used.

    Raises:
        QsdError: if the data are missing or do not fit the model.
    """
    if not torch.cuda.is_available():
        # Synchronised batch norms and mmengine's own start of process groups need CUDA.
        config.sync_bn = None
        if config.launcher == "pytorch":
            distributed.init_process_group("gloo")
            config.model_wrapper_cfg = ConfigDict(
                type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False
            )
    # mmengine keeps visualizers by name for the life of the process; two runs must not share one.
    config.visualizer.name = f"{config.work_dir} {time.monotonic_ns()}"
    runner = Runner.from_cfg(config)
    runner.logger.info(f"mmcv's operators: {ops.provider()}")
    register_training_hooks(runner)
    check_data(runner, parts)
    return runner
