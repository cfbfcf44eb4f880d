"""Exported networks in ONNX Runtime, to be timed."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsd
from qsd.errors import QsdError
from qsd.export import to_onnx


class OnnxFile:
    """An ONNX file and a session that runs it, with as many threads as PyTorch uses.

    Args:
        path: The file.

    Attributes:
        content: The bytes of the file.

    Raises:
        QsdError: If ONNX Runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise QsdError("measuring exported files needs more packages: pip install 'qsd[export]'.") from error
        self.content = path.read_bytes()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Tensor) -> Any:
        """Evaluate ``[B, C, H, W]``."""
        return self.session.run(None, {"images": images.numpy()})

    @classmethod
    def of_spiking(cls, spiking: qsd.SpikingNetwork, images: Tensor, integer: bool) -> "OnnxFile":
        """The file that `qsd.export` writes.

        Args:
            spiking: The converted network.
            images: Images ``[B, C, H, W]``, which give the size of the input and the ranges of activations.
            integer: Whether the file computes in integers, or else in floats.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spiking.onnx"
            to_onnx(spiking, path, integer, images)
            return cls(path)

    @classmethod
    def of_float(cls, network: nn.Module, images: Tensor) -> "OnnxFile":
        """The file of an ordinary network.

        Args:
            network: The network in evaluation mode.
            images: Images ``[B, C, H, W]``, which give the size of the input.
        """
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "float.onnx"
            options: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False}
            torch.onnx.export(network, (images[:1],), path, input_names=["images"], **options)
            return cls(path)

    def quantized(self, images: Tensor) -> "OnnxFile":
        """The same network after the plain static 8-bit quantization of ONNX Runtime.

        Args:
            images: Images ``[B, C, H, W]``, which give the ranges of activations.
        """
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        with tempfile.TemporaryDirectory() as folder:
            path, prepared, quantized = (Path(folder) / f"{name}.onnx" for name in ("float", "prepared", "quantized"))
            path.write_bytes(self.content)
            quant_pre_process(path, prepared)
            quantize_static(prepared, quantized, _Reader(images), per_channel=True, weight_type=QuantType.QInt8)
            return OnnxFile(quantized)


class _Reader:
    """Gives images one by one, in the form that ONNX Runtime's calibration takes."""

    def __init__(self, images: Tensor) -> None:
        self._images: Iterator[Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"images": image.numpy()}
