"""Training and testing with mmdet and mmseg, from their configurations and from OpenMMLab's usual options."""

import argparse
import difflib
import inspect
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.runner import Runner
from torch import distributed

from qsd.configurations import find_configuration
from qsd.errors import QsdError
from qsd.layers import set_integer_operands
from qsd.lean import set_lean
from qsd.mm import ops
from qsd.mm.checks import check_data, check_weights
from qsd.mm.hooks import register_training_hooks, stop_hook
from qsd.mm.loading import move_data
from qsd.mm.resuming import check_resumable, check_same_training, checkpoint_to_resume
from qsd.mm.work_dir import only_training_in, own_folder
from qsd.program import Parser, one_line
from qsd.reading import regular_file

_WORKER_ENDED = (
    "a data-loading process was ended by the system, most likely for lack of memory or of shared memory (/dev/shm); "
    "lower {part}_dataloader.num_workers or {part}_dataloader.batch_size."
)
# Errors of mmengine and of constructors whose arguments do not fit.
_OF_SETTINGS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


def train(name: str, framework: str, args: Sequence[str]) -> None:
    """Train the model of a configuration.

    Args:
        name: The name of the program, for its help.
        framework: ``"mmdet"`` or ``"mmseg"``.
        args: The arguments.

    Raises:
        QsdError: If an argument, the configuration, the data or a checkpoint is wrong.
    """
    parser = _parser(name, f"Train with {framework}.")
    parser.add_argument("--amp", action="store_true", help="mixed precision (CUDA)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT",
                        help="continue a training; the default is its latest checkpoint")  # fmt: skip
    parser.add_argument(
        "--pretrained", metavar="CHECKPOINT", help="weights of the backbone, of any kind that qsd reads"
    )
    options = parser.parse_args(args)
    with _process_group():
        _train(options, framework)


def test(name: str, framework: str, args: Sequence[str]) -> None:
    """Evaluate a checkpoint on the test part of a configuration.

    Args:
        name: The name of the program, for its help.
        framework: ``"mmdet"`` or ``"mmseg"``.
        args: The arguments.

    Raises:
        QsdError: If an argument, the configuration, the data or the checkpoint is wrong.
    """
    parser = _parser(name, f"Test with {framework}.")
    parser.add_argument("checkpoint", help="checkpoint of a training")
    options = parser.parse_args(args)
    with _process_group():
        _test(options, framework)


@contextmanager
def _process_group() -> Iterator[None]:
    """Ends the process group that a Runner may have begun."""
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


class _Settings(DictAction):
    """mmengine's ``KEY=VALUE``, which tells a word that is none."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if word := next((word for word in values if not word.partition("=")[1]), None):
            parser.error(f"{option_string} {word} is no KEY=VALUE")
        super().__call__(parser, namespace, values, option_string)


def _parser(name: str, description: str) -> Parser:
    parser = Parser(prog=name, description=description)
    parser.add_argument("config", help="configuration file, or configs/NAME.py of this package")
    parser.add_argument("--work-dir", help="folder of logs and checkpoints; the default is runs/<configuration>")
    parser.add_argument("--cfg-options", nargs="+", action=_Settings, metavar="KEY=VALUE", help="override settings")
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
    if options.work_dir is None and config.work_dir == str(Path("runs", Path(options.config).stem)):
        config.work_dir = own_folder(config.work_dir, options.resume)
    with only_training_in(config.work_dir, goes_on=config.resume):
        if config.resume:
            _resume(config, options.resume)
        with told_mistakes(options):
            runner = build_runner(config, ("train", "val"))
        if config.resume and config.load_from is not None:
            check_weights(runner.model, config.load_from)
        try:
            stop_hook(runner).begin()
            with told_mistakes(options, runner), ended_workers("train"):
                runner.train()
        finally:
            stop_hook(runner).end()


@contextmanager
def told_mistakes(options: argparse.Namespace, runner: Runner | None = None) -> Iterator[None]:
    """Tell an error of OpenMMLab before the first step in one line: a setting does not fit.

    Args:
        options: The parsed options, which name the configuration and what replaces its settings.
        runner: The runner that begins to train; ``None`` while it is built.

    Raises:
        QsdError: In place of the error.
    """
    try:
        yield
    except _OF_SETTINGS as error:
        # Running out of memory has a message of its own.
        if isinstance(error, QsdError | torch.OutOfMemoryError) or (runner is not None and stop_hook(runner).stepped):
            raise
        given = "".join(f", {name}={value}" for name, value in (options.cfg_options or {}).items())
        reason = str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
        raise QsdError(f"configuration {options.config}{given}: {one_line(reason).removesuffix('.')}.") from error


@contextmanager
def ended_workers(part: str) -> Iterator[None]:
    """Turn PyTorch's error about a data-loading process that the system has ended into one line.

    Args:
        part: The part of the data that is loaded: ``"train"`` or ``"test"``.

    Raises:
        QsdError: In place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise QsdError(_WORKER_ENDED.format(part=part)) from error


def _resume(config: Config, checkpoint: str) -> None:
    """Find the checkpoint that a training goes on from, and check that it is one of this training."""
    config.load_from = checkpoint_to_resume(config.work_dir) if checkpoint == "auto" else checkpoint
    if config.load_from is None:
        print(f"There is no checkpoint in {config.work_dir}; the training starts from its beginning.")
    else:
        check_same_training(check_resumable(config.load_from), config, config.load_from)


def _test(options: argparse.Namespace, framework: str) -> None:
    regular_file(options.checkpoint, "checkpoint")
    config = load_config(options, framework)
    config.load_from = options.checkpoint
    with told_mistakes(options):
        runner = build_runner(config, ("test",))
    check_weights(runner.model, options.checkpoint)
    with ended_workers("test"):
        runner.test()


def load_config(options: argparse.Namespace, framework: str) -> Config:
    """Read a configuration and apply the options of the command line.

    A new ``data_root`` replaces the old one wherever the configuration uses it.

    Args:
        options: The parsed options.
        framework: The framework that the configuration must be for.

    Raises:
        QsdError: If the file does not exist, cannot be read, or is for the other framework.
    """
    path = find_configuration(options.config)
    try:
        config = Config.fromfile(path)
        root = config.get("data_root")
        if options.cfg_options:
            _check_names(options.cfg_options, config)
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


def _check_names(settings: Mapping[str, Any], config: Config) -> None:
    """Refuse a mistyped setting, which mmengine would add and nobody read."""
    known = {*config, *inspect.signature(Runner).parameters, "lean", "integer_operands"}
    for name in settings:
        first = name.partition(".")[0]
        near = difflib.get_close_matches(first, known, n=1, cutoff=0.75)
        if first not in known and near:
            raise QsdError(f"--cfg-options {name}: there is no setting {first!r}; did you mean {near[0]!r}?")


def build_runner(config: Config, parts: tuple[str, ...]) -> Runner:
    """Build a Runner, for CUDA devices or for the processor, and check its data.

    Args:
        config: The complete configuration.
        parts: The parts of the data that will be used.

    Raises:
        QsdError: If the data are missing or do not fit the model.
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
    set_lean(runner.model, config.get("lean", "auto"))
    set_integer_operands(runner.model, config.get("integer_operands", False))
    runner.logger.info(f"mmcv's operators: {ops.provider()}")
    register_training_hooks(runner)
    check_data(runner, parts)
    return runner
