"""Lightning tasks: what a training run optimises, measures and writes down."""

import difflib
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import timm
import timm.data
import timm.optim
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from qsd.errors import QsdError
from qsd.models import load_weights
from qsd.quantizers import StepSizeQuantizer

logger = logging.getLogger(__name__)

AuxiliaryLoss = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class ClassificationTask(LightningModule):
    """Train, evaluate and apply an image classifier.

    Batches are ``(images [B, C, H, W], labels [B])``; for prediction ``(images, names)``. Logged: ``train/loss``,
    ``val/loss``, ``val/accuracy``, ``val/accuracy_top5`` (from six classes upwards), the same under ``test/``.

    Args:
        model: any name known to ``timm.create_model``.
        model_args: further arguments of the model, such as ``time_steps`` or ``drop_path_rate``.
        num_classes: outputs of the classifier; ``None`` takes the number from the data.
        init_from: weights to start from: a checkpoint of ours, a ``.safetensors`` file or a checkpoint of the
            published code. A classifier of another number of classes starts afresh.
        optimizer: any name known to ``timm.optim``.
        optimizer_args: further arguments of the optimiser.
        base_lr: learning rate for a total batch of 256 images; the rate is scaled linearly with the total batch
            (images per process x processes x accumulated batches).
        min_lr: where the cosine schedule ends.
        warmup_epochs: epochs of linear warm-up, a step at a time.
        weight_decay: one-dimensional parameters (norms, biases, step sizes, layer scales) are exempt.
        layer_decay: factor of the learning rate from one layer group to the one below; ``None`` for none.
        label_smoothing: of the training loss.
        mixup: alpha of Mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.
        grad_checkpointing: recompute blocks in the backward pass, to save memory.
        compile: compile the network with ``torch.compile``; a string names the backend.

    Raises:
        QsdError: for a model name that timm does not know, with the nearest names.
    """

    def __init__(
        self,
        model: str = "qsd_15m",
        model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        init_from: str | None = None,
        optimizer: str = "lamb",
        optimizer_args: dict[str, Any] | None = None,
        base_lr: float = 6e-4,
        min_lr: float = 1e-6,
        warmup_epochs: float = 15,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        grad_checkpointing: bool = False,
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        if not timm.is_model(model):
            near = difflib.get_close_matches(model, timm.list_models(), n=3, cutoff=0.5)
            raise QsdError(f"model {model!r} is unknown to timm; nearest names: {', '.join(near) or 'none'}.")
        self.save_hyperparameters()
        self.model: nn.Module | None = None
        self._mixup: timm.data.Mixup | None = None
        self._broadcast_suspended = False
        self._auxiliary_losses: list[AuxiliaryLoss] = []
        self._random_states: list[dict[str, Any]] | None = None

    def configure_model(self) -> None:
        """Build the network, now that the data can tell its number of classes. Lightning calls this; once is enough."""
        if self.model is not None:
            return
        self._complete_sizes_from_data()
        h = self.hparams
        trainer = self._trainer
        model = timm.create_model(h["model"], num_classes=h["num_classes"], **h["model_args"])
        if h["init_from"] is not None and not (trainer and trainer.ckpt_path):
            load_weights(model, h["init_from"])
        if h["grad_checkpointing"]:
            model.set_grad_checkpointing()
        if trainer and trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model.to(memory_format=torch.channels_last)  # convolutions run up to twice as fast
        if h["compile"]:
            model.compile(**({"backend": h["compile"]} if isinstance(h["compile"], str) else {}))
        self.model = model
        if h["mixup"] or h["cutmix"]:
            self._mixup = timm.data.Mixup(
                h["mixup"], h["cutmix"], label_smoothing=h["label_smoothing"], num_classes=h["num_classes"]
            )
        metrics = {"loss": MeanMetric(), "accuracy": MulticlassAccuracy(h["num_classes"], average="micro")}
        if h["num_classes"] > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(h["num_classes"], top_k=5, average="micro")
        collection = MetricCollection(metrics, compute_groups=False)
        self.metrics = nn.ModuleDict({stage: collection.clone(f"{stage}/") for stage in ("val", "test")})

    def _complete_sizes_from_data(self) -> None:
        data = getattr(self._trainer, "datamodule", None)
        available = getattr(data, "num_classes", None)
        if self.hparams["num_classes"] is None:
            if available is None:
                raise QsdError("num_classes is not given and no data module tells it; pass --model.num_classes.")
            self.hparams["num_classes"] = available
        elif available is not None and available > self.hparams["num_classes"]:
            raise QsdError(
                f"the data has {available} classes (labels 0 to {available - 1}), the model only "
                f"num_classes={self.hparams['num_classes']}; raise it, or leave it out to take it from the data."
            )
        arguments = dict(self.hparams["model_args"] or {})
        if "in_chans" not in arguments and hasattr(data, "in_chans"):
            arguments["in_chans"] = data.in_chans
        self.hparams["model_args"] = arguments

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser by timm's registry, and a warm-up and cosine schedule that advances by steps."""
        h = self.hparams
        optimizer = timm.optim.create_optimizer_v2(
            self.model,
            opt=h["optimizer"],
            lr=h["base_lr"] * self.total_batch_size / 256,
            weight_decay=h["weight_decay"],
            layer_decay=h["layer_decay"],
            **(h["optimizer_args"] or {}),
        )
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)  # timm leaves layer decay to its own schedulers
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    @property
    def total_batch_size(self) -> int:
        """Images per optimiser step, over all processes and accumulated batches."""
        per_process = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if per_process is None:
            raise QsdError("the data module has no batch_size, from which the learning rate is computed.")
        return per_process * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise QsdError("the length of the training is unknown; set --trainer.max_epochs or --trainer.max_steps.")
        steps = int(total)
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(int(self.hparams["warmup_epochs"] * batches), steps - 1)
        if warmup < 2:
            return CosineAnnealingLR(optimizer, max(steps, 1), self.hparams["min_lr"])
        return SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
                CosineAnnealingLR(optimizer, steps - warmup, self.hparams["min_lr"]),
            ],
            milestones=[warmup],
        )

    def add_auxiliary_loss(self, loss: AuxiliaryLoss) -> None:
        """Add terms to the training loss, for distillation and the like.

        The function runs inside `training_step`, under its precision, before gradients are scaled or accumulated.

        Args:
            loss: ``(images [B, C, H, W], logits [B, num_classes])`` to named, already weighted scalars; each is
                logged as ``train/<name>``.
        """
        self._auxiliary_losses.append(loss)

    def __getstate__(self) -> dict[str, Any]:
        # Weight averaging deep-copies the task; the copy must not take along the losses' owners, such as a teacher.
        return {**super().__getstate__(), "_auxiliary_losses": []}

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        assert self.model is not None, "call configure_model() first"
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, with the auxiliary terms."""
        images, labels = batch
        if self._mixup is None:
            logits = self(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.hparams["label_smoothing"])
        else:
            if len(images) % 2 and len(images) > 1:  # Mixup pairs images up
                images, labels = images[:-1], labels[:-1]
            images, soft_labels = self._mixup(images, labels)
            logits = self(images)
            loss = F.cross_entropy(logits.float(), soft_labels)
        terms = {name: term for auxiliary in self._auxiliary_losses for name, term in auxiliary(images, logits).items()}
        if terms:
            self.log_dict({"train/loss_task": loss, **{f"train/{name}": term for name, term in terms.items()}})
            loss = loss + torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            self._stop_non_finite(loss, images, batch_idx)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """Class probabilities by image: ``{"name": [B names], "probabilities": [B, num_classes]}``."""
        images, names = batch
        return {"name": list(names), "probabilities": self(images).float().softmax(dim=-1)}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: Literal["val", "test"]) -> None:
        images, labels = batch
        logits = self(images).float()
        for name, metric in self.metrics[stage].items(keep_base=True):
            if name == "loss":
                metric.update(F.cross_entropy(logits, labels, reduction="none"))
            else:
                metric.update(logits, labels)

    def _log_metrics(self, stage: Literal["val", "test"]) -> None:
        # Computed here and not batch by batch: processes may have unequal numbers of batches.
        self.log_dict(self.metrics[stage].compute(), prog_bar=True)
        self.metrics[stage].reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics over all processes."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics over all processes."""
        self._log_metrics("test")

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse labels that the classifier has no output for, while they are still on the CPU."""
        labels = batch[1] if isinstance(batch, list | tuple) and len(batch) == 2 else None
        if isinstance(labels, Tensor) and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.hparams["num_classes"]:
                label = low if low < 0 else high
                raise QsdError(f"label {label} is outside the classifier's num_classes={self.hparams['num_classes']}.")
        return batch

    # Distributed validation: `DistributedDataParallel` broadcasts buffers in every forward pass, which would hang
    # where processes have unequal numbers of batches. Once before the first batch is enough.

    def on_validation_epoch_start(self) -> None:
        """Make all processes validate with the statistics of the first."""
        ddp = self.trainer.strategy.model
        if isinstance(ddp, DistributedDataParallel) and ddp.broadcast_buffers:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)
            ddp.broadcast_buffers = False
            self._broadcast_suspended = True

    def on_validation_end(self) -> None:
        """Let training broadcast its buffers again."""
        if self._broadcast_suspended:
            self.trainer.strategy.model.broadcast_buffers = True  # type: ignore[union-attr]
            self._broadcast_suspended = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random states of a resumed training, right before the first thing that may draw from them."""
        if self._random_states is not None:
            rank, states = self.global_rank, self._random_states
            self._random_states = None
            if rank < len(states):
                _set_random_state(states[rank])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when a step size is no longer positive."""
        self._check_step_sizes()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a broken network over a good checkpoint; add the random states of all processes."""
        broken = [name for name, parameter in self.named_parameters() if not torch.isfinite(parameter).all()]
        if broken:
            raise QsdError(f"parameter {broken[0]} is not finite at step {self.global_step}; nothing was saved.")
        self._check_step_sizes()
        # The weights are in this checkpoint; where they once started from may be gone when it is loaded.
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"]["init_from"] = None
        states: list[Any] = [_get_random_state(self.device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, _get_random_state(self.device))
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the random states along, if training goes on."""
        self._random_states = checkpoint.get("random_states")

    def _check_step_sizes(self) -> None:
        assert self.model is not None
        steps = {n: m.step for n, m in self.model.named_modules() if isinstance(m, StepSizeQuantizer)}
        if not steps or bool((torch.cat([step.detach() for step in steps.values()]) > 0).all()):
            return
        name = next(name for name, step in steps.items() if not bool((step > 0).all()))
        raise QsdError(
            f"a step size of {name} is {float(steps[name].min()):.3g} at step {self.global_step}, not positive; "
            f"{self._advice()}"
        )

    def _stop_non_finite(self, loss: Tensor, images: Tensor, batch_idx: int) -> None:
        assert self.model is not None
        raise QsdError(
            f"loss is {float(loss)} at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}); "
            f"first not finite: {first_non_finite(self.model, images)}; {self._advice()}"
        )

    def _advice(self) -> str:
        callback = self.trainer.checkpoint_callback
        path = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
        kept = f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"
        return f"training stopped, {kept}; try a lower base_lr, gradient clipping or 32-bit precision."


def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Say where infinities or NaNs first appear in a forward pass, in one phrase.

    Args:
        model: the network; it is run once more.
        images: the batch ``[B, C, H, W]`` that made them.
    """
    if not torch.isfinite(images).all():
        return "the images"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of layer {name}")

        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"


def _get_random_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
