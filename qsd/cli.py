"""The command line: ``qsd fit --config configs/imagenet.yaml``, and the same program under the name ``lightning``."""

import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import qsd
import qsd.data
import qsd.tasks
from qsd.callbacks import PredictionWriter
from qsd.data.loading import WORKER_ENDED
from qsd.errors import QsdError
from qsd.models.checkpoints import read_checkpoint
from qsd.models.registered import model_of_file
from qsd.reading import part_of

SUBCOMMANDS = ("fit", "validate", "test", "predict")

# Mistakes of the user, which Lightning and Python report in a readable line of their own.
_USER_ERRORS = (QsdError, MisconfigurationException, OSError, UnicodeDecodeError, torch.OutOfMemoryError)

# Errors of torch's that need other words.
_OTHER_WORDS = {
    "Expected more than 1 value per channel": "a batch of one image with one token trains no batch norm; raise "
    "batch_size or img_size.",
    "DataLoader worker": WORKER_ENDED,
    "onnection closed by peer": "another process has stopped; its message says why.",
}

# Warnings that mean nothing here.
_NOISE = (
    "LightningCLI's args parameter is intended to run from within Python",
    "The '.*' does not have many workers",  # digits are loaded fastest in the training process
    # Checkpoints are evaluated without the callbacks that wrote them; an average is in their weights already.
    "Be aware that when using `ckpt_path`, callbacks used to create",
    "You're using the WeightAveraging callback, but loading a checkpoint outside",
    "You're using the WeightAveraging callback with a model that overrides",  # of sharded models, which there are none
    "It is recommended to use `self.log\\(.*sync_dist=True",  # the metrics are synchronised by torchmetrics
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own use of torch
)


class Parser(LightningArgumentParser):
    """Says in one line what is wrong with an argument."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Stop with the parser's message, folded into one line.

        Args:
            message: what the parser has to say, over many lines.
            ex: the exception that it comes from.
        """
        line = " ".join(message.split())
        raise QsdError(line if len(line) <= 400 else f"{line[:400]} ...") from ex


class QsdCLI(LightningCLI):
    """Lightning's command line for our tasks and data, or any other that is imported by class path."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer methods on offer, with the arguments that the command line fills in itself."""
        skip = {"model", "dataloaders", "datamodule"}
        return {"fit": skip | {"train_dataloaders", "val_dataloaders"}, **dict.fromkeys(SUBCOMMANDS[1:], skip)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make classification the default task."""
        parser.set_defaults({"model": {"class_path": "qsd.tasks.ClassificationTask"}})

    def _parse_ckpt_path(self) -> None:
        """Take the network from a checkpoint, and nothing else: all other settings are the user's.

        Lightning's own version lets every hyper-parameter of the checkpoint override the command line.
        """
        config = self.config.get(self.config.subcommand)
        if config is None or config.get("ckpt_path") is None:
            return
        path = config.ckpt_path
        if path in ("", "best"):
            raise QsdError(f"ckpt_path={path!r} names no file; give the path of a checkpoint.")
        if path in ("last", "hpc") or str(path).startswith("registry"):
            return
        checkpoint = read_checkpoint(path)
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise QsdError(f"{path} is no checkpoint of a training; to start from its weights use --model.init_from.")
        saved = part_of(checkpoint, "hyper_parameters", dict, path, {})
        network = {key: saved[key] for key in ("model", "model_args", "num_classes") if key in saved}
        if "model" in network:
            network["model"], network["model_args"] = model_of_file(str(path), saved["model"], saved.get("model_args"))
        if network and "init_args" in (config.get("model") or {}):
            network = {"class_path": config.model.class_path, "init_args": network}
            self.config = self.parser.parse_object({self.config.subcommand: {"model": network}}, self.config)

    def before_instantiate_classes(self) -> None:
        """Give the loggers of a run one folder, and let ``predict`` write its predictions."""
        chosen = self.config.get(self.subcommand)
        config = chosen.trainer
        initial = ((chosen.get("model") or {}).get("init_args") or {}).get("init_from", "")
        if self.subcommand != "fit" and chosen.get("ckpt_path") is None and initial is None:
            raise QsdError(f"{self.subcommand} needs trained weights; pass --ckpt_path or --model.init_from.")
        _share_version(config.logger if isinstance(config.logger, list) else [])
        if self.subcommand == "predict":
            callbacks = config.callbacks if isinstance(config.callbacks, list) else []
            if not any("PredictionWriter" in str(callback) for callback in callbacks):
                self.trainer_defaults["callbacks"] = [PredictionWriter()]

    def instantiate_classes(self) -> None:
        """Build trainer, task and data; what fails here is an argument's fault."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            # jsonargparse wraps what a constructor says into a list of types that it tried
            cause: BaseException = error
            while cause.__cause__ is not None or cause.__context__ is not None:
                cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
                if isinstance(cause, QsdError):
                    break
            raise QsdError(str(cause if isinstance(cause, QsdError) else error)) from error


def _share_version(loggers: list[Any]) -> None:
    # Each logger would count up by itself, the second one past the folder that the first one has just made.
    folders = [
        Path(logger.init_args.save_dir, logger.init_args.name or "") for logger in loggers if _has_folder(logger)
    ]
    used = [int(p.name[8:]) for f in folders for p in f.glob("version_*") if p.name[8:].isdecimal()]
    for logger in filter(_has_folder, loggers):
        if logger.init_args.version is None:
            logger.init_args.version = max(used, default=-1) + 1


def _has_folder(logger: Any) -> bool:
    return logger.class_path.endswith(("CSVLogger", "TensorBoardLogger"))


class SaveConfig(SaveConfigCallback):
    """Write the complete configuration beside the logs, of fitting only: other runs must not replace it."""

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` when fitting begins."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: arguments without the program's name; ``None`` for those of the process.

    Returns:
        The exit code: 0, or 2 for a mistake that is reported in one line on standard error.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    traceback_wanted = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    if arguments == ["--version"]:
        print(f"qsd {qsd.__version__}")
        return 0
    for message in _NOISE if arguments[:1] == ["fit"] else (*_NOISE, "The dirpath has changed"):
        warnings.filterwarnings("ignore", message=message)
    try:
        QsdCLI(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": "runs"},
            seed_everything_default=0,
            parser_kwargs={"prog": "qsd", "description": "Train and evaluate quantized spike-driven transformers."},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            args=arguments,
        )
    except SystemExit as exit_:
        if exit_.code not in (None, 0) and traceback_wanted:
            raise
        return exit_.code if isinstance(exit_.code, int) else 0 if exit_.code is None else 2
    except _USER_ERRORS as error:
        if traceback_wanted:
            raise
        print(f"qsd: error: {' '.join(str(error).split())} (--traceback shows where)", file=sys.stderr)
        return 2
    except (ValueError, RuntimeError) as error:
        line = next((words for found, words in _OTHER_WORDS.items() if found in str(error)), None)
        if line is None or traceback_wanted:
            raise
        print(f"qsd: error: {line} (--traceback shows where)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run() -> None:
    """Entry point of the console script ``qsd`` and of ``python -m qsd``."""
    sys.exit(main())


def run_lightning() -> None:
    """Entry point of the console script ``lightning``.

    The package ``lightning-sdk`` ships a command of that name too. Where it is installed, its subcommands go to it.
    """
    ours = {*SUBCOMMANDS, "-h", "--help", "--version", "--config", "--traceback"}
    if sys.argv[1:] and sys.argv[1] not in ours and find_spec("lightning_sdk") is not None:
        from lightning_sdk.cli.entrypoint import main_cli  # type: ignore[import-not-found]

        main_cli()
    else:
        run()
