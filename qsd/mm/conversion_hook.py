"""Conversion to binary spikes at the end of a training with mmengine's Runner."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from rich.console import Console

from qsd import report
from qsd.errors import QsdError
from qsd.mm.conversion import convert_model
from qsd.mm.loading import build_model, load_model, unwrapped
from qsd.mm.recording import STAGES, Scenes, write_model
from qsd.neurons import SpikeNeuron
from qsd.report.processes import from_first_process


@HOOKS.register_module()
class ConvertToSpikeDrivenHook(Hook):
    """After training, turn the best detector or segmenter into one of binary spikes, and report what that gives.

    The twin of `qsd.callbacks.ConvertToSpikeDriven`. It takes the checkpoint that ``save_best`` kept (with averaged
    weights, these), else the last one, converts it, verifies it on the validation images, and writes
    ``quantized.safetensors`` (packed), ``conversion.json`` and ``report.html`` into the run's folder. The main figures
    go to every backend of the visualizer, as ``spiking/...``. Only the first process works, the others wait. A
    conversion that fails is reported and leaves no files.

    A float twin has no spikes and is left as it is, with a warning. A model with single layers that do not spike is
    refused before the training.

    Args:
        merge: turn chains of convolutions into one each; True, False, ``"rep"`` or ``"sep"``.
        merged_bits: quantize the merged kernels to so many bits; not lossless.
        delay: steps by which neurons wait; ``None`` for the lossless T - 1.
        preset: prices of operations: ``"fp32"`` (the papers'), ``"fp16"`` or ``"int8"``.
        max_images: measure on so many validation images; ``None`` for all. The data set's metrics are measured on all
            of them only.
        step_images: images that are also stepped through time.
        stages: what to measure: ``"compare"``, ``"activity"``, ``"audit"``, ``"energy"``.

    Raises:
        QsdError: for options that cannot be.
    """

    def __init__(
        self,
        merge: bool | Literal["rep", "sep"] = True,
        merged_bits: int | None = None,
        delay: int | None = None,
        preset: str = "fp32",
        max_images: int | None = None,
        step_images: int = 8,
        stages: Sequence[str] = STAGES,
    ) -> None:
        report.check_options(merge, merged_bits, delay, preset, max_images, step_images, None, stages, STAGES)
        self.max_images = max_images
        self.options: dict[str, Any] = {
            "merge": merge,
            "merged_bits": merged_bits,
            "delay": delay,
            "preset": preset,
            "step_images": step_images,
            "stages": tuple(stages),
        }
        self._enabled = True

    def before_train(self, runner: Runner) -> None:
        """Say before the training what could not be done behind it."""
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
        convert_model(model, merge=self.options["merge"])

    def after_train(self, runner: Runner) -> None:
        """Convert, with everything of the training already written."""
        if not self._enabled:
            return
        problem, cause = None, None
        if runner.rank == 0:
            path = _best_checkpoint(runner)
            try:
                self._convert(runner, path)
            except Exception as error:  # whatever it was, the training is not lost and the others are waiting
                reason = str(error) if isinstance(error, QsdError) else f"{type(error).__name__}: {error}"
                safe = f"the trained model is safe in {path}, but its" if path else "the trained model's"
                problem, cause = f"{safe} conversion failed: {reason}", error
        problem = from_first_process(problem)
        if problem is not None:
            raise QsdError(problem) from cause

    def _convert(self, runner: Runner, path: Path | None) -> None:
        device = "cuda" if next(runner.model.parameters()).is_cuda else "cpu"  # float64, which others lack
        validation: Any = runner.val_loop
        dataset = validation.dataloader.dataset
        if path is None:
            weights = copy.deepcopy(unwrapped(runner.model).state_dict())
            model = build_model(runner.cfg, weights, dataset.metainfo).to(device)
        else:
            model, _ = load_model(path, device)
        record = write_model(
            model,
            Scenes(dataset, self.max_images),
            runner.work_dir,
            runner.cfg.pretty_text,
            evaluator=validation.evaluator,
            name=type(model).__name__,
            checkpoint=None if path is None else str(path),
            source="validation images",
            **self.options,
        )
        runner.visualizer.add_scalars(report.metrics(record), step=runner.iter)
        Console().print(report.summary(record))
        runner.logger.info(f"report: {Path(runner.work_dir, 'report.html')}")
        torch.cuda.empty_cache()


def _best_checkpoint(runner: Runner) -> Path | None:
    """The best checkpoint by what ``save_best`` names first, else the last one."""
    known = runner.message_hub.runtime_info
    names = [name for name in known if name.startswith("best_ckpt")] + ["last_ckpt"]
    paths = [Path(known[name]) for name in names if known.get(name)]
    return next((path for path in paths if path.is_file()), None)
