"""Layers of quantized spike-driven transformers."""

from qsd.layers.attention import SpikeDrivenSelfAttention
from qsd.layers.blocks import ConvBlock, Downsample, Mlp, SepConv, TransformerBlock, conv_norm
from qsd.layers.chains import BatchNormPad2d, LinearChain, rep_conv
from qsd.layers.quantized import QuantConv2d, QuantLinear, initialize_steps, quantized_weight
from qsd.layers.recompute import recompute

__all__ = [
    "BatchNormPad2d",
    "ConvBlock",
    "Downsample",
    "LinearChain",
    "Mlp",
    "QuantConv2d",
    "QuantLinear",
    "SepConv",
    "SpikeDrivenSelfAttention",
    "TransformerBlock",
    "conv_norm",
    "initialize_steps",
    "quantized_weight",
    "recompute",
    "rep_conv",
]
