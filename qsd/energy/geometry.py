"""Shapes of convolutions and their operations; the layers of `qsd.spiking` count with them."""

from qsd.spiking.layers.geometry import Geometry, dense_macs, fan_out

__all__ = ["Geometry", "dense_macs", "fan_out"]
