# RetinaNet on COCO with QSD-Transformer 15M. The published recipe: as in coco_qsd.py, but 36 epochs at one rate.
#   python tools/mmdet_train.py configs/coco_retinanet_qsd.py --pretrained CHECKPOINT --amp
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "_base_/coco.py"]

spike_cfg = dict(time_steps=4, weight_bits=4, threshold=1.0, amplitude=1.0)
model = dict(
    backbone=dict(_delete_=True, type="SpikeTransformerBackbone", model="qsd_15m"),
    neck=dict(type="SpikeFPN", spike_cfg=spike_cfg, in_channels=[64, 128, 256, 360]),
    bbox_head=dict(
        type="SpikeRetinaHead",
        spike_cfg=spike_cfg,
        # From the second stage on the strides are 8, 16, 16, then 32 and 64. Anchors keep the usual sizes.
        anchor_generator=dict(strides=[8, 16, 16, 32, 64], base_sizes=[8, 16, 32, 64, 128]),
    ),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=36)
param_scheduler = [dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000)]
