"""The subcommands of Lightning's command line: ``qsd fit --config configs/imagenet.yaml``."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qsd import callbacks, program, runs
from qsd.arguments import argument_message, class_problem
from qsd.configurations import with_found_configurations
from qsd.data.base import data_modules
from qsd.data.loading import WORKER_ENDED
from qsd.errors import QsdError
from qsd.files import replace_content
from qsd.limits import check_trainer
from qsd.models.registered import model_of_file
from qsd.reading import part_of
from qsd.tasks import ClassificationTask
from qsd_launcher import TRAINING, main, run, run_lightning

__all__ = ["Parser", "QsdCLI", "SaveConfig", "main", "run", "run_lightning", "train"]

_CALLBACKS: list[type] = [getattr(callbacks, name) for name in callbacks.__all__]

# Errors of PyTorch that need other words.
_OTHER_WORDS = {
    "Expected more than 1 value per channel": "a batch of one image with one token trains no batch norm; raise "
    "batch_size or img_size.",
    "DataLoader worker": WORKER_ENDED,
    "onnection closed by peer": "another process has stopped; its message says why.",
}

# Warnings that do not apply to this package.
_NOISE = (
    "LightningCLI's args parameter is intended to run from within Python",
    "The '.*' does not have many workers",  # digits are loaded fastest in the training process
    "You're using the WeightAveraging callback with a model that overrides",  # of sharded models, which there are none
    "It is recommended to use `self.log\\(.*sync_dist=True",  # the metrics are synchronised by torchmetrics
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own use of torch
)
# Checkpoints are evaluated without the callbacks that wrote them; an average is in their weights already.
_NOISE_OF_EVALUATION = (
    "Be aware that when using `ckpt_path`, callbacks used to create",
    "You're using the WeightAveraging callback, but loading a checkpoint outside",
    "The dirpath has changed",
)


class Parser(LightningArgumentParser):
    """A parser that reports a wrong argument in one line, with the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Stop with the message of the parser.

        Args:
            message: The description of the mistake, which may have many lines.
            ex: The exception that it comes from.

        Raises:
            QsdError: Always.
        """
        parsers: list[Any] = [self]
        for action in self._actions:  # an option that no parser knows is reported by that of the whole command
            parsers += action.choices.values() if isinstance(action.choices, dict) else []
        options = {option for parser in parsers for option in parser._option_string_actions}
        classes: dict[str, Sequence[type]]
        classes = {"model": [ClassificationTask], "data": data_modules(), "trainer.callbacks": _CALLBACKS}
        raise QsdError(argument_message(message, options, classes)) from ex


class QsdCLI(LightningCLI):
    """Lightning's command line for the tasks and data of this package, or others by their class path."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._claims: list[runs.Claim] = []
        self._stop = runs.SaveOnStop()
        first = next(iter(kwargs.get("args") or ()), None)
        self._wanted = {first} if first in TRAINING else set(TRAINING)
        try:
            super().__init__(*args, **kwargs)
        finally:  # A mistake leaves no empty folder.
            for claimed in self._claims:
                claimed.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The methods of the trainer, with the arguments that the command line fills in itself."""
        skip = {"model", "dataloaders", "datamodule"}
        return {"fit": skip | {"train_dataloaders", "val_dataloaders"}, **dict.fromkeys(TRAINING[1:], skip)}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser of a subcommand that is going to run; each takes a few tenths of a second."""
        if subcommand in self._wanted:
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        return self.init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Make classification the default task."""
        parser.set_defaults({"model": {"class_path": "qsd.tasks.ClassificationTask"}})

    def _parse_ckpt_path(self) -> None:
        """Take the network from a checkpoint, and all other settings from the user.

        Lightning's own version lets every hyper-parameter of the checkpoint override the command line.
        """
        config = self.config.get(self.config.subcommand)
        if config is None or config.get("ckpt_path") is None:
            return
        path = config.ckpt_path
        if path in ("", "best"):
            raise QsdError(f"ckpt_path={path!r} names no file; give the path of a checkpoint.")
        if str(path).startswith("registry"):
            return
        if path in ("last", "hpc"):
            path = config.ckpt_path = str(runs.find_checkpoint(path, config.trainer))
            rank_zero_only(print)(f"checkpoint: {path}")
        checkpoint = runs.read_run_checkpoint(path)
        saved = part_of(checkpoint, "hyper_parameters", dict, path, {})
        network = {key: saved[key] for key in ("model", "model_args", "num_classes") if key in saved}
        if "model" in network:
            network["model"], network["model_args"] = model_of_file(str(path), saved["model"], saved.get("model_args"))
        if network and "init_args" in (config.get("model") or {}):
            rank_zero_only(_say_what_is_unused)(config.model.init_args, network, path)
            network = {"class_path": config.model.class_path, "init_args": network}
            self.config = self.parser.parse_object({self.config.subcommand: {"model": network}}, self.config)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, and check numbers on which the trainer would only fail in the middle of a training.

        Args:
            parser: The parser.
            args: The arguments.
        """
        super().parse_arguments(parser, args)
        chosen = self.config.get(self.config.get("subcommand")) or {}
        check_trainer(chosen.get("trainer") or {}, chosen.get("seed_everything", True))

    def before_instantiate_classes(self) -> None:
        """Refuse to evaluate random weights, and let ``predict`` write its predictions."""
        chosen = self.config.get(self.subcommand)
        config = chosen.trainer
        initial = ((chosen.get("model") or {}).get("init_args") or {}).get("init_from", "")
        if self.subcommand != "fit" and chosen.get("ckpt_path") is None and initial is None:
            raise QsdError(f"{self.subcommand} needs trained weights; pass --ckpt_path or --model.init_from.")
        if self.subcommand == "predict":
            named = config.callbacks if isinstance(config.callbacks, list) else []
            if not any("PredictionWriter" in str(callback) for callback in named):
                self.trainer_defaults["callbacks"] = [callbacks.PredictionWriter()]

    def instantiate_classes(self) -> None:
        """Build trainer, task and data; an error here is the mistake of an argument."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            # jsonargparse wraps the error of a constructor into a list of the types that it tried.
            cause: BaseException = error
            while cause.__cause__ is not None or cause.__context__ is not None:
                cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
                if isinstance(cause, QsdError):
                    break
            problem = class_problem(str(error).replace("\\n", "\n"))  # which jsonargparse has quoted
            if problem is not None and not isinstance(cause, QsdError):
                raise QsdError(f"{' '.join(problem)}.") from error
            raise QsdError(str(cause if isinstance(cause, QsdError) else error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, in a folder that belongs to this run alone.

        Args:
            **kwargs: Arguments that replace those of the configuration.
        """
        settings = self._get(self.config_init, "trainer", default={})
        if settings.get("fast_dev_run"):
            return super().instantiate_trainer(**kwargs)
        root = Path(settings.get("default_root_dir") or ".")
        is_first: bool = rank_zero_only(lambda: True)() or False
        if settings.get("logger") is False and is_first:
            self._claims.append(runs.claim([root]))
            kwargs["default_root_dir"] = str(root / runs.folder_name(self._claims[0].version))
        trainer = super().instantiate_trainer(**kwargs)
        runs.write_whole_files(trainer)
        if is_first:
            self._claims += runs.claim_for_loggers(trainer.loggers)
        seed = self._get(self.config_init, "seed_everything", default=None)
        record = runs.WriteRunRecord(seed if type(seed) is int else None)
        # Its file is written before a conversion begins, which may fail or be stopped.
        trainer.callbacks.insert(0, record)  # type: ignore[attr-defined]
        if self.subcommand == "fit":
            trainer.callbacks.append(self._stop)  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the subcommand, and say how a training that was stopped goes on."""
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException:
            # Lightning's launcher kills all processes when one that it has started ends with an exit code.
            if not self.trainer.is_global_zero and isinstance(
                getattr(self.trainer.strategy, "cluster_environment", None), LightningEnvironment
            ):
                raise SystemExit(0) from None
            raise
        finally:
            if self._stop.message is not None and self.trainer.is_global_zero:
                print(f"qsd: {self._stop.message}", file=sys.stderr)


def _say_what_is_unused(given: Any, network: dict[str, Any], path: str) -> None:
    """Say which arguments of the network a configuration gives in vain, beside a checkpoint with other ones."""
    saved, chosen = (
        {k: str(list(v) if isinstance(v, tuple) else v) for k, v in (part.get("model_args") or {}).items()}
        for part in (network, given)
    )
    unused = {key: value for key, value in chosen.items() if saved.get(key, value) != value}
    if unused:
        print(f"The network is that of {path}; model_args {unused} of the configuration are not used.")


class SaveConfig(SaveConfigCallback):
    """Writes the complete configuration of a training into its folder; evaluations must not replace it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` when a training begins, and let its checkpoints go into the same folder."""
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        folder = runs.run_folder(trainer)
        runs.place_checkpoints(trainer, folder, self.config.get("ckpt_path"))
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.parser.dump(self.config, skip_none=False)
            replace_content(folder / self.config_filename, text.encode())


def train(args: Sequence[str] | None = None) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: The arguments, with the subcommand; ``None`` for those of the process.

    Returns:
        The exit code, as of `qsd.program.run`.
    """
    return program.run("qsd", _train, args)


def _train(arguments: list[str]) -> None:
    for message in _NOISE if arguments[:1] == ["fit"] else (*_NOISE, *_NOISE_OF_EVALUATION):
        warnings.filterwarnings("ignore", message=message)
    try:
        QsdCLI(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults={"default_root_dir": "runs"},
            seed_everything_default=0,
            parser_kwargs={"prog": "qsd", "description": "Train and evaluate quantized spike-driven transformers."},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            args=with_found_configurations(arguments),
        )
    except SIGTERMException as error:
        raise SystemExit(program.TERMINATED) from error
    except (ValueError, RuntimeError) as error:
        line = next((words for found, words in _OTHER_WORDS.items() if found in str(error)), None)
        if line is None:
            raise
        raise QsdError(line) from error
