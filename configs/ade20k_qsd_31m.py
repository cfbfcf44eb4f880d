# Semantic FPN with QSD-Transformer 31M; the recipe is that of ade20k_qsd.py.
_base_ = ["ade20k_qsd.py"]

model = dict(backbone=dict(model="qsd_31m"), neck=dict(in_channels=[96, 192, 384, 480]))
