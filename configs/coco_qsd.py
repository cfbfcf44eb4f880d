# Mask R-CNN on COCO with QSD-Transformer 15M, spiking and low-bit from the first layer to the last.
#   python tools/mmdet_train.py configs/coco_qsd.py --pretrained CHECKPOINT --amp
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "_base_/coco.py"]

# Of neck and heads. The published ones fire once per unit of input and pass counts on; their weights are float.
spike_cfg = dict(time_steps=4, weight_bits=4, threshold=1.0, amplitude=1.0)
# The backbone's stages have the strides 4, 8, 16, 16, the pyramid's fifth level 32. Anchors keep the usual sizes.
strides = [4, 8, 16, 16, 32]
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
        bbox_head=dict(type="SpikeShared2FCBBoxHead", spike_cfg=spike_cfg),
        mask_roi_extractor=dict(featmap_strides=strides[:4]),
        mask_head=dict(type="SpikeFCNMaskHead", spike_cfg=spike_cfg),
    ),
)
