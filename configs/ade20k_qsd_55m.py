# Semantic FPN with QSD-Transformer 55M; the recipe is that of ade20k_qsd.py.
_base_ = ["ade20k_qsd.py"]

model = dict(backbone=dict(model="qsd_55m"), neck=dict(in_channels=[128, 256, 512, 640]))
