# Mask R-CNN on COCO with QSD-Transformer 15M, spiking and low-bit from the first layer to the last.
#   python tools/mmdet_train.py configs/coco_qsd.py --pretrained CHECKPOINT --amp
# The published recipe: 15 epochs of 24 images a step (8 on each of 3 GPUs), AdamW, mixed precision.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["qsd.mm.detection"], allow_failed_imports=False)

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

scales = [(size, 1333) for size in range(480, 801, 32)]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(853, 512), keep_ratio=True),  # as published, although it costs resolution
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [dict(type="RandomChoiceResize", scales=scales, keep_ratio=True)],
            [
                dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
                dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
                dict(type="RandomChoiceResize", scales=scales, keep_ratio=True),
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(batch_size=8, num_workers=4, dataset=dict(pipeline=train_pipeline))

max_epochs = 15
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="StepSizeOptimWrapperConstructor",
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=max_epochs, milestones=[8, 11], gamma=0.1),
]
sync_bn = "torch"
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
auto_scale_lr = dict(enable=False, base_batch_size=24)
