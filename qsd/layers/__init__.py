"""Layers of quantized spike-driven transformers."""

from qsd.layers.attention import MatrixProduct, NReluSelfAttention, SpikeDrivenSelfAttention, SpikeProduct
from qsd.layers.blocks import ConvBlock, Downsample, Mlp, SepConv, TransformerBlock, conv_norm
from qsd.layers.chains import BatchNormPad2d, LinearChain, rep_conv
from qsd.layers.heads import TokenMeanLinear
from qsd.layers.integer_operands import IntegerOperands, LargestSum, largest_sums, set_integer_operands
from qsd.layers.layer_scale import LayerScale
from qsd.layers.pooling import SpikeMaxPool2d, TokenMean
from qsd.layers.quantized import QuantConv2d, QuantLinear, initialize_steps, quantized_weight
from qsd.layers.recompute import frozen_statistics, recompute
from qsd.layers.steps import initialize_neurons
from qsd.lean import set_lean

__all__ = [
    "BatchNormPad2d",
    "ConvBlock",
    "Downsample",
    "IntegerOperands",
    "LargestSum",
    "LayerScale",
    "LinearChain",
    "MatrixProduct",
    "Mlp",
    "NReluSelfAttention",
    "QuantConv2d",
    "QuantLinear",
    "SepConv",
    "SpikeDrivenSelfAttention",
    "SpikeMaxPool2d",
    "SpikeProduct",
    "TokenMean",
    "TokenMeanLinear",
    "TransformerBlock",
    "conv_norm",
    "frozen_statistics",
    "initialize_neurons",
    "initialize_steps",
    "largest_sums",
    "quantized_weight",
    "recompute",
    "rep_conv",
    "set_integer_operands",
    "set_lean",
]
