"""Conversion to binary spikes at the end of a training with mmengine's Runner."""

import copy
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console

from qsd import report
from qsd.errors import QsdError
from qsd.mm.loading import build_model, load_model, unwrapped
from qsd.mm.spiking import ImageSubset, convert_model, write_model
from qsd.mm.spiking.measuring import DEFAULTS, STAGES
from qsd.neurons import SpikeNeuron


@HOOKS.register_module()
class ConvertToSpikeDrivenHook(Hook):
    """After training, convert the best detector or segmenter to binary spikes, and report its accuracy and cost.

    The counterpart of `qsd.callbacks.ConvertToSpikeDriven`. The checkpoint is the one that ``save_best`` wrote (with
    averaged weights, these), else the last one. The converted model is verified on the validation images, and
    ``spiking.safetensors`` (packed), ``conversion.json`` and ``report.html`` are written into the run's folder. The
    main figures go to every backend of the visualizer, as ``spiking/...``. Only the first process works, the others
    wait. A conversion that fails is reported and leaves no files.

    A float twin has no spikes and is not converted, with a warning. A model with single layers that do not spike is
    refused before the training.

    Args:
        **options: Fields of `qsd.report.ConversionOptions`, with 8 ``step_images`` by default; there are no
            ``"delays"``. The data set's metrics are measured only without ``max_images``.

    Raises:
        QsdError: For options that are wrong.
    """

    def __init__(self, **options: Any) -> None:
        self.options = report.ConversionOptions(**{**DEFAULTS, **options})
        self.options.check_stages(STAGES)
        self._enabled = True

    def before_train(self, runner: Runner) -> None:
        """Refuse before the training what could not be done after it."""
        model = unwrapped(runner.model)
        self._enabled = any(isinstance(module, SpikeNeuron) for module in model.modules())
        if not self._enabled:
            runner.logger.warning("the model has no spiking neurons (a float twin?): it will not be converted.")
            return
        if runner.val_loop is None:
            raise QsdError(
                "ConvertToSpikeDrivenHook verifies on validation images, and there are none; give val_dataloader, "
                "val_cfg and val_evaluator, or remove it from custom_hooks."
            )
        convert_model(model, merge=self.options.merge, code=self.options.code)

    def after_train(self, runner: Runner) -> None:
        """Convert, when all files of the training are complete."""
        if not self._enabled:
            return
        first = runner.rank == 0
        checkpoint = _best_checkpoint(runner) if first else None
        record = report.convert_after_training(lambda: self._write(runner, checkpoint), first, checkpoint)
        if record is not None:
            runner.visualizer.add_scalars(report.metrics(record), step=runner.iter)
            Console().print(report.summary(record))
            runner.logger.info(f"report: {Path(runner.work_dir, report.PAGE)}")
            torch.cuda.empty_cache()

    def _write(self, runner: Runner, checkpoint: Path | None) -> report.Record:
        device = "cuda" if next(runner.model.parameters()).is_cuda else "cpu"  # Other devices lack float64.
        validation: Any = runner.val_loop
        dataset = validation.dataloader.dataset
        if checkpoint is None:
            weights = copy.deepcopy(unwrapped(runner.model).state_dict())
            model = build_model(runner.cfg, weights, dataset.metainfo).to(device)
        else:
            model, _ = load_model(checkpoint, device)
        name, file = type(model).__name__, None if checkpoint is None else str(checkpoint)
        return write_model(
            model,
            ImageSubset(dataset),
            runner.work_dir,
            self.options,
            report.Origin(name, file, "validation images"),
            runner.cfg.pretty_text,
            validation.evaluator,
        )


def _best_checkpoint(runner: Runner) -> Path | None:
    """The best checkpoint by the first quantity of ``save_best``, else the last one."""
    known = runner.message_hub.runtime_info
    names = [name for name in known if name.startswith("best_ckpt")] + ["last_ckpt"]
    paths = [Path(known[name]) for name in names if known.get(name)]
    return next((path for path in paths if path.is_file()), None)
