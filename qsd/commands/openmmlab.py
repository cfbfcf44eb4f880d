"""The commands for detectors and segmenters: ``tools/mmdet_train.py`` and its sisters, and options that others share.

OpenMMLab is imported when a command runs, so that its absence is one line like any other mistake.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from qsd import program


def _main(framework: str, action: str, args: Sequence[str] | None = None) -> int:
    """Train or test with mmdet or mmseg.

    Args:
        framework: ``"mmdet"`` or ``"mmseg"``.
        action: ``"train"`` or ``"test"``.
        args: The arguments; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """

    def act(words: list[str]) -> None:
        from qsd.mm import command

        {"train": command.train, "test": command.test}[action](f"{framework}_{action}", framework, words)

    return program.run(f"{framework}_{action}", act, args)


train_detector = partial(_main, "mmdet", "train")
test_detector = partial(_main, "mmdet", "test")
train_segmenter = partial(_main, "mmseg", "train")
test_segmenter = partial(_main, "mmseg", "test")


def is_checkpoint(path: str) -> bool:
    """Whether a file is the checkpoint of a detector or segmenter, by its name: mmengine writes ``.pth`` files.

    Args:
        path: The path that the user gave.
    """
    return path.endswith(".pth")


def add_config_options(parser: Any) -> None:
    """Add ``--cfg-options``, which override the configuration that a checkpoint holds.

    Args:
        parser: The parser of a command, or a group of it.
    """
    text = "override settings of the checkpoint's configuration, such as data_root"
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help=text)


def parse_config_options(words: Sequence[str]) -> dict[str, Any]:
    """Settings of a configuration, from ``KEY=VALUE`` as OpenMMLab's own tools read it.

    Args:
        words: The values of ``--cfg-options``.
    """
    from mmengine.config import DictAction

    if not words:
        return {}
    parser = program.Parser(add_help=False)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction)
    options: argparse.Namespace = parser.parse_args(["--cfg-options", *words])
    return dict(options.cfg_options)
