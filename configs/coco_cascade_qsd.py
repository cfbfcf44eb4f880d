# Cascade Mask R-CNN on COCO with QSD-Transformer 15M; the recipe is that of coco_qsd.py.
#   python tools/mmdet_train.py configs/coco_cascade_qsd.py --pretrained CHECKPOINT --amp
_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "_base_/coco.py"]

spike_cfg = dict(time_steps=4, weight_bits=4, threshold=1.0, amplitude=1.0)
strides = [4, 8, 16, 16, 32]


def box_head(deviations):
    """A stage's head; each stage refines the boxes of the one before."""
    return dict(
        type="SpikeShared2FCBBoxHead",
        spike_cfg=spike_cfg,
        in_channels=256,
        fc_out_channels=1024,
        roi_feat_size=7,
        num_classes=80,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=deviations),
        reg_class_agnostic=True,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )


model = dict(
    backbone=dict(_delete_=True, type="SpikeTransformerBackbone", model="qsd_15m"),
    neck=dict(type="SpikeFPN", spike_cfg=spike_cfg, in_channels=[64, 128, 256, 360]),
    rpn_head=dict(
        type="SpikeRPNHead",
        spike_cfg=spike_cfg,
        anchor_generator=dict(strides=strides, base_sizes=[4, 8, 16, 32, 64]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(featmap_strides=strides[:4]),
        bbox_head=[
            box_head([0.1, 0.1, 0.2, 0.2]),
            box_head([0.05, 0.05, 0.1, 0.1]),
            box_head([0.033, 0.033, 0.067, 0.067]),
        ],
        mask_roi_extractor=dict(featmap_strides=strides[:4]),
        mask_head=dict(type="SpikeFCNMaskHead", spike_cfg=spike_cfg),
    ),
)
