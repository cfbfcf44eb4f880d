# Data and recipe on COCO as published: 15 epochs of 24 images a step (8 on each of 3 GPUs), AdamW, mixed precision.
_base_ = ["mmdet::_base_/datasets/coco_instance.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["qsd.mm.detection"], allow_failed_imports=False)

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
custom_hooks = [dict(type="StepSizeHook"), dict(type="SpikeStatisticsHook")]
auto_scale_lr = dict(enable=False, base_batch_size=24)
