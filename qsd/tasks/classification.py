"""Image classification: loss, optimizer, metrics and checkpoints of a training."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from qsd.errors import QsdError
from qsd.layers.frames import channels_last
from qsd.layers.integer_operands import IntegerOperands, set_integer_operands
from qsd.layers.steps import step_names
from qsd.lean import Choice, set_lean
from qsd.limits import check_number
from qsd.models import load_weights
from qsd.models.checkpoints import check_weights
from qsd.tasks.guards import PrecisionNote, StepSizeGuard, check_before_saving, check_loss
from qsd.tasks.inputs import sizes_from_data
from qsd.tasks.networks import blaming, build_network, check_name
from qsd.tasks.neuron_initialization import set_neurons
from qsd.tasks.optimization import parameter_groups, warmup_and_cosine
from qsd.tasks.random_state import RandomStates
from qsd.tasks.resuming import Resuming
from qsd.training.optimizer_state import add_names, restore_by_name

AuxiliaryLoss = Callable[[Tensor, Tensor], Mapping[str, Tensor]]


class ClassificationTask(LightningModule):
    """Train, evaluate and apply an image classifier.

    Batches are ``(images [B, C, H, W], labels [B])``; for prediction ``(images, names)``. In place of images there may
    be recordings ``[B, F, C, H, W]``. A model may return the logits of two heads as a pair in training: a teacher of
    logits teaches the second one. Logged: ``train/loss``, ``val/loss``, ``val/accuracy``, ``val/accuracy_top5`` (from
    six classes upwards), the same under ``test/``.

    Args:
        model: Any name known to ``timm.create_model``, perhaps with the tag of weights (``qsd_tiny.digits``), a folder
            of weights (``local-dir:FOLDER``) or a repository of the hub (``hf-hub:OWNER/NAME``).
        model_args: Further arguments of the model, such as ``time_steps`` or ``drop_path_rate``; ``pretrained: true``
            starts from its weights.
        num_classes: Number of outputs of the classifier; ``None`` takes it from the data.
        init_from: Weights to start from: a checkpoint of a training with qsd, a ``.safetensors`` file or a checkpoint
            of the published code. A classifier with another number of classes keeps its initial weights. If the
            weights are those of a float network, learned steps of neurons are set from the first training batch.
        optimizer: Any name known to ``timm.optim``.
        optimizer_args: Further arguments of the optimizer.
        base_lr: Learning rate for a total batch of 256 images. The rate is scaled linearly with the total batch
            (images per process x processes x accumulated batches).
        min_lr: Final learning rate of the cosine schedule, for parameters at the full rate.
        warmup_epochs: Epochs of linear warm-up by optimizer steps.
        step_lr: Learning rate of the step sizes of quantizers and neurons over that of the other parameters. Adam and
            its kin move every parameter by about the learning rate per step, which is as much as a whole step size of
            a quantizer.
        weight_decay: Weight decay. One-dimensional parameters (norms, biases, step sizes, layer scales) are exempt.
        layer_decay: Factor of the learning rate from one layer group to the one below; ``None`` for none.
        label_smoothing: Label smoothing of the training loss.
        mixup: Alpha of Mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        grad_checkpointing: Recompute blocks in the backward pass, to save memory.
        compile: Compile the network with ``torch.compile``; a string names the backend.
        lean: Keep spike counts in half a byte for the backward pass (see `qsd.set_lean`): ``True``, ``False``, or
            ``"auto"`` for large tensors on all devices but CUDA.
        integer_operands: Evaluate with exact sums of spike counts times weight codes, which are the same under autocast
            and in TF32 (see `qsd.set_integer_operands`): ``True``, ``False``, or ``"all"``.

    Raises:
        QsdError: For a model name that timm does not know, with the nearest names.
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
        lean: Choice = "auto",
        integer_operands: IntegerOperands = False,
    ) -> None:
        super().__init__()
        check_name(model)
        if not 0 <= label_smoothing < 1:
            raise QsdError(f"label_smoothing={label_smoothing} is not in [0, 1).")
        backends = torch.compiler.list_backends(exclude_tags=())
        if isinstance(compile, str) and compile not in backends:
            raise QsdError(f"compile={compile!r} is no backend of torch.compile; backends: {', '.join(backends)}.")
        rates = {"base_lr": base_lr, "min_lr": min_lr, "step_lr": step_lr, "weight_decay": weight_decay}
        for name, value in {**rates, "warmup_epochs": warmup_epochs, "mixup": mixup, "cutmix": cutmix}.items():
            check_number(name, value, 0)
        check_number("layer_decay", layer_decay, 0, 1)
        self.save_hyperparameters()
        self.model: Any = None  # The network, once `configure_model` has built it.
        self._mixup: Mixup | None = None
        self._auxiliary_losses: list[AuxiliaryLoss] = []
        self._logits_teachers: list[AuxiliaryLoss] = []
        self.neurons_are_set = False
        self._resumed: dict[str, Any] | None = None
        self.optimizer_rate = 0.0  # The peak rate that the optimizer was built with.

    def configure_callbacks(self) -> list[Callback]:
        """The parts of every training that are no part of the loss."""
        return [RandomStates(), Resuming(), StepSizeGuard(), PrecisionNote()]

    def configure_model(self) -> None:
        """Build the network once, when the number of classes is known from the data. Lightning calls this method."""
        if self.model is not None:
            return
        self._complete_sizes_from_data()
        h = self.hparams
        trainer = self._trainer
        self.neurons_are_set = bool(h["model_args"].get("pretrained"))
        model, buildable = build_network(h["model"], h["model_args"], h["num_classes"])
        self.save_hyperparameters(buildable)
        if h["init_from"] is not None:
            self.neurons_are_set = not load_weights(model, h["init_from"])
        if h["grad_checkpointing"]:
            model.set_grad_checkpointing()
        set_lean(model, h["lean"])
        set_integer_operands(model, h["integer_operands"])
        if trainer and trainer.world_size > 1 and trainer.strategy.root_device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if h["compile"]:
            model.compile(backend="inductor" if h["compile"] is True else h["compile"])
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
            raise QsdError("num_classes is not given and no data module has it; pass --model.num_classes.")
        if available is not None and available > num_classes:
            raise QsdError(
                f"the data has {available} classes (labels 0 to {available - 1}), the model only "
                f"num_classes={num_classes}; raise it, or leave it out to take it from the data."
            )
        if num_classes < 2:
            raise QsdError(
                f"num_classes={num_classes}, and a classifier needs two or more; check the labels of the data."
            )
        model_args = sizes_from_data(self.hparams["model_args"], data)
        # Loggers and checkpoints contain the real sizes.
        self.save_hyperparameters({"num_classes": num_classes, "model_args": model_args})

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer from timm's registry, and a warm-up and cosine schedule that advances by optimizer steps."""
        h = self.hparams
        lr = self.optimizer_rate = self.learning_rate
        with blaming(f"optimizer {h['optimizer']!r} with optimizer_args={h['optimizer_args']}, base_lr={h['base_lr']}"):
            groups = parameter_groups(self.model, lr, h["step_lr"], h["weight_decay"], h["layer_decay"])
            optimizer = create_optimizer_v2(groups, opt=h["optimizer"], lr=lr, **(h["optimizer_args"] or {}))
        resumed, self._resumed = self._resumed, None
        # Settings of this training count, also those that its command line leaves out.
        changeable = {"lr", "weight_decay", *(h["optimizer_args"] or {}), *(resumed or {}).get("arguments", ())}
        restore_by_name(optimizer, self, changeable)
        if resumed is not None:
            for state in resumed["optimizer_states"]:
                add_names(state, resumed["names"], optimizer, self)
        scheduler = warmup_and_cosine(self.trainer, optimizer, lr, h["min_lr"], h["warmup_epochs"])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def learning_rate(self) -> float:
        """The peak learning rate of this training's total batch, which Lightning's LearningRateFinder sets."""
        return float(self.hparams["base_lr"] * self.total_batch_size / 256)

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        self.hparams["base_lr"] = rate * 256 / self.total_batch_size

    @property
    def total_batch_size(self) -> int:
        """Images per optimizer step, over all processes and accumulated batches."""
        per_process = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if per_process is None:
            raise QsdError("the data module has no batch_size, from which the learning rate is computed.")
        if self.trainer.accumulate_grad_batches < 1:
            raise QsdError(f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} is not positive.")
        return per_process * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def add_auxiliary_loss(self, loss: AuxiliaryLoss, teaches_logits: bool = False) -> None:
        """Add terms to the training loss, such as those of distillation.

        The function runs within `training_step`, at its precision, before gradients are scaled or accumulated.

        Args:
            loss: Function from ``(images [B, C, H, W], logits [B, num_classes])`` to weighted scalars by name. Each
                is logged as ``train/<name>``. A network with two heads hands over the logits of the second one.
            teaches_logits: Whether the terms teach the logits. The labels then train the first one of two heads alone,
                and otherwise both.
        """
        self._auxiliary_losses.append(loss)
        if teaches_logits:
            self._logits_teachers.append(loss)

    def remove_auxiliary_loss(self, loss: AuxiliaryLoss) -> None:
        """Remove the terms of a function from the training loss, if they were added.

        Args:
            loss: The function that `add_auxiliary_loss` was given.
        """
        self._auxiliary_losses = [other for other in self._auxiliary_losses if other != loss]
        self._logits_teachers = [other for other in self._logits_teachers if other != loss]

    def __getstate__(self) -> dict[str, Any]:
        # Weight averaging deep-copies the task. The copy must not contain the owners of losses, such as a teacher.
        return {**super().__getstate__(), "_auxiliary_losses": [], "_logits_teachers": []}

    def forward(self, images: Tensor) -> Any:
        """Images ``[B, C, H, W]`` to logits ``[B, num_classes]``, in training perhaps to those of two heads."""
        return self.model(channels_last(images))

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Set the learned steps of neurons from the first batch, unless the weights contain them.

        This is no callback, because Lightning's LearningRateFinder trains without them.
        """
        if not self.neurons_are_set:
            self.neurons_are_set = set_neurons(self, batch[0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, with the auxiliary terms."""
        images, labels = batch
        self._check_labels(labels)
        if self._mixup is None or len(images) == 1:  # Mixup mixes pairs of images.
            outputs, smoothing = self(images), self.hparams["label_smoothing"]
        else:
            if len(images) % 2:
                images, labels = images[:-1], labels[:-1]
            # CutMix cuts from the last two of four dimensions, so that frames have to be channels here.
            mixed, labels = self._mixup(images.flatten(1, -3), labels)
            images = mixed.view_as(images)
            outputs, smoothing = self(images), 0.0
        heads = outputs if isinstance(outputs, tuple) else (outputs,)
        labelled = heads[:1] if self._logits_teachers else heads
        losses = [F.cross_entropy(logits.float(), labels, label_smoothing=smoothing) for logits in labelled]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        taught = heads[-1]
        terms = {name: term for auxiliary in self._auxiliary_losses for name, term in auxiliary(images, taught).items()}
        if terms:
            self.log_dict({"train/loss_task": loss, **{f"train/{name}": term for name, term in terms.items()}})
            loss = loss + torch.stack(list(terms.values())).sum()
        check_loss(self, loss, self.model, images)
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
        # Not batch by batch: processes may have unequal numbers of batches.
        self.log_dict(metrics.compute(), prog_bar=True)
        metrics.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics over all processes."""
        self._log_metrics(self.val_metrics)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics over all processes."""
        self._log_metrics(self.test_metrics)

    def _check_labels(self, labels: Tensor) -> None:
        # The classes that a data module declares were compared with the classifier once; other labels are checked here.
        if hasattr(getattr(self.trainer, "datamodule", None), "num_classes"):
            return
        for label in (int(labels.min()), int(labels.max())):
            if not 0 <= label < self.hparams["num_classes"]:
                raise QsdError(f"label {label} is outside the classifier's num_classes={self.hparams['num_classes']}.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to write a broken network over a good checkpoint."""
        check_before_saving(self)
        checkpoint["neurons_are_set"] = self.neurons_are_set
        # The checkpoint contains the weights; the file that they started from may be gone when it is loaded.
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"]["init_from"] = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that do not fit; remember the order of their names, if the training goes on."""
        check_weights(checkpoint["state_dict"], self.state_dict(), "the checkpoint", step_names(self))
        self.neurons_are_set = bool(checkpoint.get("neurons_are_set", True))
        if self._trainer is None or self._trainer.state.fn != TrainerFn.FITTING:
            return
        if "optimizer_states" not in checkpoint:
            raise QsdError(
                "the checkpoint has no optimizer state (save_weights_only=True?), so its training cannot go on; start "
                "a new one from its weights with --model.init_from."
            )
        self._resumed = {
            "optimizer_states": checkpoint["optimizer_states"],
            "names": list(checkpoint["state_dict"]),
            "arguments": (checkpoint.get("hyper_parameters") or {}).get("optimizer_args") or (),
        }
