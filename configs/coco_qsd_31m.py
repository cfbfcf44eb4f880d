# Mask R-CNN with QSD-Transformer 31M. The published recipe: 12 epochs, one image on each GPU, wider neck and heads.
_base_ = ["coco_qsd.py"]

channels = 384
model = dict(
    # The statistics of single images are no good: batch norms keep those of the pretrained weights. (Ours.)
    backbone=dict(model="qsd_31m", norm_eval=True),
    neck=dict(in_channels=[96, 192, 384, 480], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=1536),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=channels),
    ),
)
train_dataloader = dict(batch_size=1)
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=max_epochs, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=3)
