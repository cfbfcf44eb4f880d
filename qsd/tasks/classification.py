"""Image classification: what a training run optimises, measures and writes down."""

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from qsd.errors import QsdError
from qsd.layers import initialize_neurons
from qsd.layers.steps import learned_steps, step_names
from qsd.models import load_weights
from qsd.models.checkpoints import check_weights
from qsd.models.diagnosis import collapsed_step, first_non_finite, non_finite_parameter
from qsd.tasks.random_state import get_random_state, set_random_state

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
            published code. A classifier of another number of classes starts afresh. From a float network, neurons of
            a learned step get theirs from the first training batch.
        optimizer: any name known to ``timm.optim``.
        optimizer_args: further arguments of the optimiser.
        base_lr: learning rate for a total batch of 256 images; the rate is scaled linearly with the total batch
            (images per process x processes x accumulated batches).
        min_lr: where the cosine schedule ends, for parameters at the full rate.
        warmup_epochs: epochs of linear warm-up, a step at a time.
        step_lr: learning rate of the step sizes of quantizers and neurons, over that of the other parameters. Adam and
            its kin move every parameter by about the learning rate per step, which is as much as a whole step size of
            a quantizer.
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
        step_lr: float = 0.01,
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
        if not 0 <= label_smoothing < 1:
            raise QsdError(f"label_smoothing={label_smoothing} is not in [0, 1).")
        backends = torch.compiler.list_backends(exclude_tags=())
        if isinstance(compile, str) and compile not in backends:
            raise QsdError(f"compile={compile!r} is no backend of torch.compile; backends: {', '.join(backends)}.")
        for name, value in (("base_lr", base_lr), ("min_lr", min_lr), ("mixup", mixup), ("cutmix", cutmix)):
            if not value >= 0:
                raise QsdError(f"{name}={value} is negative.")
        self.save_hyperparameters()
        self.model: Any = None  # a network, once `configure_model` has built it
        self._mixup: Mixup | None = None
        self._auxiliary_losses: list[AuxiliaryLoss] = []
        self._random_states: list[dict[str, Any]] | None = None
        self._neurons_are_set = False

    def configure_model(self) -> None:
        """Build the network, now that the data can tell its number of classes. Lightning calls this; once is enough."""
        if self.model is not None:
            return
        self._complete_sizes_from_data()
        h = self.hparams
        trainer = self._trainer
        with _blaming(f"model {h['model']!r} with model_args={h['model_args']}"):
            model: Any = timm.create_model(h["model"], num_classes=h["num_classes"], **h["model_args"])
        if h["init_from"] is not None:
            self._neurons_are_set = not load_weights(model, h["init_from"])
        if h["grad_checkpointing"]:
            model.set_grad_checkpointing()
        if trainer and trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if h["compile"]:
            model.compile(**({"backend": h["compile"]} if isinstance(h["compile"], str) else {}))
        self.model = model
        if h["mixup"] or h["cutmix"]:
            self._mixup = Mixup(
                h["mixup"], h["cutmix"], label_smoothing=h["label_smoothing"], num_classes=h["num_classes"]
            )
        metrics: dict[str, Metric | MetricCollection] = {"loss": MeanMetric()}
        metrics["accuracy"] = MulticlassAccuracy(h["num_classes"], average="micro")
        if h["num_classes"] > 5:
            metrics["accuracy_top5"] = MulticlassAccuracy(h["num_classes"], top_k=5, average="micro")
        collection = MetricCollection(metrics, compute_groups=False)
        self.val_metrics, self.test_metrics = collection.clone("val/"), collection.clone("test/")

    def _complete_sizes_from_data(self) -> None:
        data = getattr(self._trainer, "datamodule", None)
        available = getattr(data, "num_classes", None)
        num_classes = self.hparams["num_classes"] or available
        if num_classes is None:
            raise QsdError("num_classes is not given and no data module tells it; pass --model.num_classes.")
        if available is not None and available > num_classes:
            raise QsdError(
                f"the data has {available} classes (labels 0 to {available - 1}), the model only "
                f"num_classes={num_classes}; raise it, or leave it out to take it from the data."
            )
        model_args = dict(self.hparams["model_args"] or {})
        if (channels := getattr(data, "in_chans", None)) is not None:
            model_args.setdefault("in_chans", channels)
        # Saved, so that loggers and checkpoints tell the real sizes.
        self.save_hyperparameters({"num_classes": num_classes, "model_args": model_args})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser by timm's registry, and a warm-up and cosine schedule that advances by steps."""
        h = self.hparams
        lr = h["base_lr"] * self.total_batch_size / 256
        with _blaming(
            f"optimizer {h['optimizer']!r} with optimizer_args={h['optimizer_args']}, base_lr={h['base_lr']}"
        ):
            optimizer = create_optimizer_v2(
                self._parameter_groups(lr), opt=h["optimizer"], lr=lr, **(h["optimizer_args"] or {})
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._schedule(optimizer, lr), "interval": "step"},
        }

    def _parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        h = self.hparams
        exempt = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        if h["layer_decay"] is None:
            groups = param_groups_weight_decay(self.model, h["weight_decay"], no_weight_decay_list=exempt)
        else:
            groups = param_groups_layer_decay(
                self.model, h["weight_decay"], no_weight_decay_list=exempt, layer_decay=h["layer_decay"]
            )
        steps = {id(step) for step in learned_steps(self.model).values()}
        split = []
        for group in groups:
            lr_group = lr * group.get("lr_scale", 1.0)
            for are_steps, factor in ((False, 1.0), (True, h["step_lr"])):
                parameters = [p for p in group["params"] if (id(p) in steps) == are_steps]
                if parameters:
                    decay = group["weight_decay"]
                    split.append({"params": parameters, "weight_decay": decay, "lr": lr_group * factor})
        return split

    @property
    def total_batch_size(self) -> int:
        """Images per optimiser step, over all processes and accumulated batches."""
        per_process = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if per_process is None:
            raise QsdError("the data module has no batch_size, from which the learning rate is computed.")
        if self.trainer.accumulate_grad_batches < 1:
            raise QsdError(f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} is not positive.")
        return per_process * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _schedule(self, optimizer: torch.optim.Optimizer, lr: float) -> LambdaLR:
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise QsdError("the length of the training is unknown; set --trainer.max_epochs or --trainer.max_steps.")
        # To count the batches, the training data is set up here. It must be set up again once a checkpoint's progress
        # is loaded, or Lightning (2.6) forgets to hand the loader its place in the epoch.
        self.trainer.fit_loop.setup_data()
        self.trainer.fit_loop._combined_loader = None
        steps = max(int(total), 1)
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(int(self.hparams["warmup_epochs"] * batches), steps - 1) if batches < float("inf") else 0
        floor = min(self.hparams["min_lr"] / lr, 1.0) if lr > 0 else 0.0

        def factor(step: int) -> float:
            # One factor for all groups: those that are slower by design stay so to the end.
            if step < warmup:
                return (step + 1) / warmup
            progress = min((step - warmup) / (steps - warmup), 1.0)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

        return LambdaLR(optimizer, factor)

    def add_auxiliary_loss(self, loss: AuxiliaryLoss) -> None:
        """Add terms to the training loss, for distillation and the like.

        The function runs inside `training_step`, under its precision, before gradients are scaled or accumulated.

        Args:
            loss: ``(images [B, C, H, W], logits [B, num_classes])`` to named, already weighted scalars; each is
                logged as ``train/<name>``.
        """
        self._auxiliary_losses.append(loss)

    def remove_auxiliary_loss(self, loss: AuxiliaryLoss) -> None:
        """Take back what `add_auxiliary_loss` added; what was not added is passed over.

        Args:
            loss: the same function.
        """
        self._auxiliary_losses = [kept for kept in self._auxiliary_losses if kept != loss]

    def __getstate__(self) -> dict[str, Any]:
        # Weight averaging deep-copies the task; the copy must not take along the losses' owners, such as a teacher.
        return {**super().__getstate__(), "_auxiliary_losses": []}

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, num_classes]``."""
        # Channels last, convolutions run up to twice as fast. Input is enough: all that follows takes its layout.
        return self.model(images.contiguous(memory_format=torch.channels_last))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, with the auxiliary terms."""
        images, labels = batch
        self._check_labels(labels)
        if self._mixup is None or len(images) == 1:  # Mixup pairs images up
            logits = self(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.hparams["label_smoothing"])
        else:
            if len(images) % 2:
                images, labels = images[:-1], labels[:-1]
            images, soft_labels = self._mixup(images, labels)
            logits = self(images)
            loss = F.cross_entropy(logits.float(), soft_labels)
        terms = {name: term for auxiliary in self._auxiliary_losses for name, term in auxiliary(images, logits).items()}
        if terms:
            self.log_dict({"train/loss_task": loss, **{f"train/{name}": term for name, term in terms.items()}})
            loss = loss + torch.stack(list(terms.values())).sum()
        self._check_loss(loss, images)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: tuple[Tensor, list[str]], batch_idx: int) -> dict[str, Any]:
        """Class probabilities by image: ``{"name": [B names], "probabilities": [B, num_classes]}``."""
        images, names = batch
        return {"name": list(names), "probabilities": self(images).float().softmax(dim=-1)}

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> None:
        images, labels = batch
        self._check_labels(labels)
        logits = self(images).float()
        for name, metric in metrics.items(keep_base=True):
            if name == "loss":
                metric.update(F.cross_entropy(logits, labels, reduction="none"))
            else:
                metric.update(logits, labels)

    def _log_metrics(self, metrics: MetricCollection) -> None:
        # Computed here and not batch by batch: processes may have unequal numbers of batches.
        self.log_dict(metrics.compute(), prog_bar=True)
        metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics over all processes."""
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics over all processes."""
        self._log_metrics(self.test_metrics)

    def _check_labels(self, labels: Tensor) -> None:
        # Data that declares its classes was compared with the classifier once; other data has to be looked at.
        if hasattr(getattr(self.trainer, "datamodule", None), "num_classes"):
            return
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < self.hparams["num_classes"]:
                raise QsdError(f"label {label} is outside the classifier's num_classes={self.hparams['num_classes']}.")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the neurons' learned steps from the first batch of a training that is not resumed.

        Of a resumed one, restore the random states, right before the first thing that may draw from them.
        """
        if self._random_states is not None:
            rank, states = self.global_rank, self._random_states
            self._random_states = None
            if rank < len(states):
                set_random_state(states[rank])
        if not self._neurons_are_set:
            self._neurons_are_set = True
            self._initialize_neurons(batch[0])

    def _initialize_neurons(self, images: Tensor) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        if initialize_neurons(self.model, images) and self.trainer.world_size > 1:
            for step in learned_steps(self.model).values():  # each process has seen a batch of its own
                step.data.copy_(self.trainer.strategy.reduce(step.data.clone(), reduce_op="mean"))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when a step size is no longer positive."""
        self._check_step_sizes()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a broken network over a good checkpoint; add the random states of all processes."""
        broken = non_finite_parameter(self)
        if broken is not None:
            raise QsdError(f"parameter {broken} is not finite at step {self.global_step}; nothing was saved.")
        self._check_step_sizes()
        # The weights are in this checkpoint; where they once started from may be gone when it is loaded.
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"]["init_from"] = None
        states: list[Any] = [get_random_state(self.device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, get_random_state(self.device))
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that do not fit; take the random states along, if training goes on."""
        check_weights(checkpoint["state_dict"], self.state_dict(), "the checkpoint", step_names(self))
        self._neurons_are_set = True
        self._random_states = checkpoint.get("random_states")

    def _check_step_sizes(self) -> None:
        collapsed = collapsed_step(self)
        if collapsed is not None:
            name, value = collapsed
            raise QsdError(
                f"a step size of {name} is {value:.3g} at step {self.global_step}, not positive; {self._advice()}"
            )

    def _check_loss(self, loss: Tensor, images: Tensor) -> None:
        if not torch.isfinite(loss):
            raise QsdError(
                f"loss is {loss.item()} at step {self.global_step} (epoch {self.current_epoch}); "
                f"first not finite: {first_non_finite(self.model, images)}; {self._advice()}"
            )

    def _advice(self) -> str:
        written = (Path(getattr(c, "best_model_path", "")) for c in self.trainer.checkpoint_callbacks)
        path = max((p for p in written if p.is_file()), key=lambda p: p.stat().st_mtime, default=None)
        kept = f"the last good checkpoint is {path}" if path else "no checkpoint was written yet"
        return f"training stopped, {kept}; try a lower base_lr or step_lr, gradient clipping or 32-bit precision."


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Turn what a library says of an argument into one line that names it."""
    try:
        yield
    except QsdError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QsdError(f"{what} cannot be built: {reason[:300]}") from error
