"""The base of all image classifiers: timm's contract, over a row of modules whose outputs are features."""

from collections.abc import Mapping
from typing import Any

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from qsd.errors import QsdError
from qsd.layers import LayerScale, QuantLinear
from qsd.layers.frames import EventCounts, FrameAxis, FrameMean
from qsd.layers.steps import step_names


class ImageClassifier(nn.Module):
    """A stem, a row of modules that are run one after another, and a head.

    A subclass builds ``stem``, the row (an `nn.ModuleList` under the name ``features_name``), ``head`` (by
    `build_head`), ``feature_info`` and ``total_stride``, and writes `forward_head`.

    A network over frames (`qsd.models.frames`) has a frame axis: its input are recordings ``[B, F, C, H, W]``, and the
    frames of all recordings are its batch of images.

    Args:
        num_features: Channels in front of the classifier.
        num_classes: Outputs of the classifier; 0 removes it.
        in_chans: Channels of the image.
        time_steps: T, or ``None`` for ReLUs.
        weight_bits: 2 to 8, or ``None`` for float weights.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: Stochastic depth of the last block.
        global_pool: ``"avg"``.

    Raises:
        QsdError: For values out of range.
    """

    features_name: str
    stem: nn.Module
    head: nn.Module
    feature_info: list[dict[str, Any]]
    total_stride: int

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        in_chans: int,
        time_steps: int | None,
        weight_bits: int | None,
        drop_rate: float,
        drop_path_rate: float,
        global_pool: str,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise QsdError(f"num_classes={num_classes} is negative; 0 removes the classifier.")
        if not 0 <= drop_path_rate < 1:
            raise QsdError(f"drop_path_rate={drop_path_rate} is not in [0, 1).")
        if global_pool != "avg":
            raise QsdError(f"global_pool={global_pool!r}: only 'avg' exists.")
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.time_steps = time_steps
        self.weight_bits = weight_bits
        self.drop_rate = drop_rate
        self.frame_axis: FrameAxis | None = None
        self.event_counts: EventCounts | None = None
        self.frame_mean: FrameMean | None = None

    @property
    def _row(self) -> nn.ModuleList:
        row = getattr(self, self.features_name)
        assert isinstance(row, nn.ModuleList)
        return row

    def run_features(self, module: nn.Module, x: Tensor) -> Tensor:
        """Run one module of the row.

        Args:
            module: A module of the row.
            x: Its input ``[B, C, H, W]``.
        """
        return module(x)

    def build_head(self, num_classes: int) -> nn.Module:
        """A fresh classifier.

        Args:
            num_classes: Its outputs; 0 for none.
        """
        if num_classes == 0:
            return nn.Identity()
        return QuantLinear(self.num_features, num_classes, weight_bits=self.weight_bits)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to the residual stream after the last block, ``[B, C, H', W']``.

        Raises:
            QsdError: If the input is no batch of images, has another number of channels, or is smaller than the total
                stride.
        """
        x = self._forward_stem(x)
        for module in self._row:
            x = self.run_features(module, x)
        return x

    def _forward_stem(self, x: Tensor) -> Tensor:
        if self.frame_axis is not None:
            x = self.frame_axis(x)
        self._check_images(x)
        return self.stem(x if self.event_counts is None else self.event_counts(x))

    def _check_images(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise QsdError(
                f"the input has the shape {list(x.shape)}, where images [B, C, H, W] are expected; add the batch "
                "dimension to a single image with images.unsqueeze(0)."
            )
        channels, height, width = x.shape[-3:]
        if channels != self.in_chans:
            raise QsdError(f"images have {channels} channels, the network expects in_chans={self.in_chans}.")
        if height < self.total_stride or width < self.total_stride:
            raise QsdError(
                f"images of {height}x{width} pixels are smaller than the network's total stride {self.total_stride}; "
                f"resize them to at least {self.total_stride}x{self.total_stride} or pass smaller strides."
            )

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features ``[B, C, H', W']`` to logits ``[B, num_classes]``.

        Args:
            x: Output of `forward_features`.
            pre_logits: Whether to stop in front of the classifier, at ``[B, C]``.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]``, or recordings ``[B, F, C, H, W]``, to logits ``[B, num_classes]``."""
        output = self.forward_head(self.forward_features(x))
        return output if self.frame_mean is None else self.frame_mean(output)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of chosen modules (QSD-Transformer: stages, CSDformer: blocks), as timm's models return them.

        Args:
            x: Images ``[B, in_chans, H, W]``.
            indices: Modules by number, from 0, or the number of last modules; ``None`` for all.
            norm: Must be false: no norm follows the last module.
            stop_early: Whether to stop after the last module that was asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: Whether to return the list alone.

        Returns:
            The list of features ``[B, C, H', W']``, after the last module's features unless ``intermediates_only``.
        """
        if output_fmt != "NCHW" or norm:
            raise QsdError(f"output_fmt={output_fmt!r}, norm={norm}: only output_fmt='NCHW' without norm exists here.")
        taken, last = feature_take_indices(len(self._row), indices)
        intermediates = []
        x = self._forward_stem(x)
        for i, module in enumerate(self._row):
            if stop_early and i > last:
                break
            x = self.run_features(module, x)
            if i in taken:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the modules after the last one in ``indices``, and the head.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Without effect: no norm follows the last module.
            prune_head: Whether to remove the classifier.

        Returns:
            The indices of the modules asked for.
        """
        del prune_norm
        taken, last = feature_take_indices(len(self._row), indices)
        setattr(self, self.features_name, self._row[: last + 1])
        self.total_stride = self.feature_info[last]["reduction"]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict; also that of a training's checkpoint, which timm's ``checkpoint_path`` passes on as it is.

        Args:
            state_dict: Tensors by name, perhaps under ``model.``; step sizes of weights that are missing are measured.
            strict: Whether all names have to be those of the model.
            assign: Whether the tensors take the place of the parameters, as in PyTorch.
        """
        from qsd.models.checkpoints import adapted_state  # which knows all families

        return super().load_state_dict(adapted_state(self, state_dict), strict, assign)

    def get_classifier(self) -> nn.Module:
        """The classifier, `QuantLinear` or identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a fresh classifier.

        Args:
            num_classes: Its outputs; 0 for none.
            global_pool: ``"avg"`` or ``None``.
        """
        if num_classes < 0 or global_pool not in (None, "avg"):
            raise QsdError(f"num_classes={num_classes}, global_pool={global_pool!r}: use num_classes >= 0 and 'avg'.")
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.head = self.build_head(num_classes).to(device=reference.device, dtype=reference.dtype)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: step sizes and layer scales."""
        scales = {f"{name}.gamma" for name, module in self.named_modules() if isinstance(module, LayerScale)}
        return step_names(self) | scales
