# Mask R-CNN with QSD-Transformer 55M. No recipe is published for it: this is 31M's, neck and heads wider in proportion.
_base_ = ["coco_qsd_31m.py"]

channels = 512
model = dict(
    backbone=dict(model="qsd_55m"),
    neck=dict(in_channels=[128, 256, 512, 640], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=2048),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=channels),
    ),
)
