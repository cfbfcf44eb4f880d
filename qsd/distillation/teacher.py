"""The teacher: a frozen network with its own normalisation and size of the student's images."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qsd.distillation.attention import AttentionMaps, AttentionRecorder, ProductRecorder, attention_layers
from qsd.errors import QsdError
from qsd.layers import LinearChain
from qsd.layers.frames import channels_last
from qsd.models.checkpoints import load_weights, read_checkpoint, read_state_dict
from qsd.models.registered import check_size, model_of_file
from qsd.reading import part_of
from qsd.spiking.merging import fold_norms

Statistics = tuple[Sequence[float], Sequence[float]]


def both_statistics(mean: Sequence[float] | None, std: Sequence[float] | None) -> Statistics | None:
    """``teacher_mean`` and ``teacher_std`` as a pair, or ``None`` for neither.

    Args:
        mean: Mean by channel of the images, in units of full scale.
        std: Their standard deviation.

    Raises:
        QsdError: If only one is given.
    """
    if mean is not None and std is not None:
        return mean, std
    if mean is std:
        return None
    raise QsdError("teacher_mean and teacher_std belong together; give both or neither.")


class Teacher:
    """A frozen network in evaluation mode. It is no module, so that its owner neither trains, copies nor saves it.

    Args:
        network: Network from images ``[B, C, H, W]`` to logits. It is copied, with the norms of this package's layers
            folded into the convolutions before them, which is faster and equal in evaluation.
        name: Its name in messages.
        statistics: Mean and standard deviation (in units of full scale, by channel) of the images that it expects;
            ``None`` for the student's.
    """

    def __init__(self, network: nn.Module, name: str, statistics: Statistics | None = None) -> None:
        network = copy.deepcopy(network).requires_grad_(False)
        for chain_name, chain in list(network.named_modules()):
            if isinstance(chain, LinearChain):
                network.set_submodule(chain_name, nn.Sequential(OrderedDict(fold_norms(chain, chain_name))))
        self.network = network.eval()  # Folded layers are new, and in training mode.
        self.name = name
        self.statistics = statistics
        self._recorder = AttentionRecorder(network) if attention_layers(network) else None
        for module in network.modules():
            if hasattr(module, "fused_attn"):  # timm's switch between one call, which can be seen, and its parts.
                setattr(module, "fused_attn", True)  # noqa: B010 - an attribute that no type knows
        self._fixed_size = _fixed_size(network)
        self._channels = next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), None)

    @property
    def num_classes(self) -> int:
        """Outputs of its classifier; 0 if it has none."""
        return int(getattr(self.network, "num_classes", 0))

    def prepare(self, images: Tensor, statistics: Statistics | None) -> Tensor:
        """Images as the teacher expects them: normalised, coloured and resized.

        Args:
            images: The student's, ``[B, C, H, W]``.
            statistics: The mean and standard deviation that they were normalised with.

        Returns:
            ``[B, C', H', W']``.

        Raises:
            QsdError: If they cannot be converted.
        """
        if self.statistics is not None and self.statistics != statistics:
            if statistics is None:
                raise QsdError(
                    f"teacher {self.name} has an input normalisation of its own, and the data does not tell its mean "
                    "and std; give the data module both, or pass the teacher's that are the data's."
                )
            mean, std, own_mean, own_std = (
                images.new_tensor(list(part)).view(1, -1, 1, 1) for part in (*statistics, *self.statistics)
            )
            if self._channels == 1:  # The grey version of a model for colour images.
                own_mean, own_std = own_mean.mean(1, keepdim=True), own_std.mean(1, keepdim=True)
            images = (images * std + mean - own_mean) / own_std
        if images.shape[1] == 1 and self._channels is not None:
            images = images.expand(-1, self._channels, -1, -1)
        if self._fixed_size is not None and tuple(images.shape[-2:]) != self._fixed_size:
            images = F.interpolate(images, self._fixed_size, mode="bicubic", antialias=True, align_corners=False)
        if images.shape[1] != (self._channels or images.shape[1]):
            raise QsdError(
                f"teacher {self.name} expects {self._channels} channels, the images have {images.shape[1]}; choose "
                "another teacher, or pass in_chans among teacher_args."
            )
        return channels_last(images)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, statistics: Statistics | None = None, attention: bool = True
    ) -> tuple[Tensor, list[AttentionMaps]]:
        """Run the teacher.

        Args:
            images: The student's, ``[B, C, H, W]``.
            statistics: The mean and standard deviation that they were normalised with.
            attention: Whether its maps are wanted.

        Returns:
            Logits ``[B, classes]``, and the maps of its attention layers if wanted.

        Raises:
            QsdError: If maps are wanted and it has none.
        """
        images = self.prepare(images, statistics)
        if not attention:
            return self._run(images), []
        if self._recorder is not None:
            self._recorder.start()
            logits = self._run(images)
            return logits, self._recorder.take()
        with ProductRecorder() as products:
            logits = self._run(images)
        maps = products.take(images, int(getattr(self.network, "num_prefix_tokens", 0)))
        if not maps:
            raise QsdError(
                f"teacher {self.name} has no attention that can be distilled: neither q_neuron, k_neuron and v_neuron "
                "nor scaled_dot_product_attention. Choose a vision transformer, or distil its logits alone with "
                "attention_weight=0."
            )
        return logits, maps

    def _run(self, images: Tensor) -> Tensor:
        try:
            return self.network(images)
        except AssertionError as error:  # timm's word for images of a wrong size.
            size = "x".join(map(str, images.shape[-2:]))
            raise QsdError(
                f"teacher {self.name} cannot see images of {size} pixels: {' '.join(str(error).split())} Pass img_size "
                "among teacher_args, or choose another."
            ) from error


def build_teacher(
    teacher: str,
    weights: str | None = None,
    arguments: dict[str, Any] | None = None,
    statistics: Statistics | None = None,
) -> Teacher:
    """Build a teacher and load its weights. Random number generators are left as they were.

    Args:
        teacher: A checkpoint of a training with qsd, from which the model is rebuilt, or a name known to timm, such as
            ``"csdformer_2_384.fashion_mnist_wide"``.
        weights: The weights of a model by name: a checkpoint of qsd, a ``.safetensors`` file, a state dict;
            ``None`` for those that timm distributes.
        arguments: Further arguments of the model.
        statistics: Mean and standard deviation of the images that the teacher expects. By default, a checkpoint of a
            training with qsd, and a model of qsd with ``weights``, get the student's images, any other what its timm
            configuration says.

    Raises:
        QsdError: If the model is unknown, or its weights are missing or do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        if weights is None and (Path(teacher).suffix == ".ckpt" or Path(teacher).exists()):
            network = _from_checkpoint(teacher, arguments or {})
        else:
            network = _from_name(teacher, weights, arguments or {})
            if statistics is None and (weights is None or not attention_layers(network)):
                statistics = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    return Teacher(network, teacher, statistics)


def _from_checkpoint(path: str, arguments: dict[str, Any]) -> Any:
    content = read_checkpoint(path)
    saved = part_of(content, "hyper_parameters", dict, path, {})
    if "model" not in saved:
        raise QsdError(
            f"{path} does not say which model it belongs to; give the model's name as teacher and the file as "
            "teacher_weights."
        )
    name, own = model_of_file(path, saved["model"], saved.get("model_args"))
    state = read_state_dict(content)
    own = {"num_classes": part_of(saved, "num_classes", int, path), **own}
    check_size(path, name, own, state)
    network = _create(name, **{**own, **arguments})
    load_weights(network, state)
    return network


def _from_name(name: str, weights: str | None, arguments: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        raise QsdError(f"teacher {name!r} is neither a file nor a model that timm knows.")
    if weights is None:
        own = timm.models.model_entrypoint(name).__module__.startswith("qsd.")
        if own and not timm.is_model_pretrained(name):
            shipped = timm.list_pretrained(f"{name.partition('.')[0]}.*")
            if shipped:
                raise QsdError(f"teacher {name} has no weights; names with weights are {', '.join(shipped)}.")
            raise QsdError(
                f"teacher {name} has no weights: train it first (qsd fit ... --model.model {name}) and give its "
                "checkpoint as teacher, or give a file of weights as teacher_weights."
            )
        return _create(name, pretrained=True, **arguments)
    classifier = timm.models.get_pretrained_cfg_value(name, "classifier") or "head"
    head = read_state_dict(weights).get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    network = _create(name, **{"num_classes": 0 if head is None else head.shape[0], **arguments})
    load_weights(network, weights)
    return network


def _create(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except QsdError:
        raise
    except Exception as error:  # timm and its hub raise whatever comes up.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QsdError(
            f"teacher {name} cannot be built with {arguments}: {reason[:300]}; weights from a file are given as "
            "teacher_weights."
        ) from error


def _fixed_size(network: nn.Module) -> tuple[int, ...] | None:
    embedding: Any = getattr(network, "patch_embed", None)
    if getattr(embedding, "img_size", None) is not None:
        return tuple(embedding.img_size) if getattr(embedding, "strict_img_size", True) else None
    config = getattr(network, "pretrained_cfg", {})
    return tuple(config["input_size"][1:]) if config.get("fixed_input_size") else None
