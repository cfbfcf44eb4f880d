# The demonstration: semantic FPN on scenes of digits, a small network of 4-bit weights, on two CPU cores.
#   qsd demo scenes data/digit_scenes
#   qsd fit --config configs/digit_crops.yaml
#   python tools/mmseg_train.py configs/digits_seg.py --pretrained runs/digit_crops/version_0/checkpoints/best.ckpt
_base_ = ["ade20k_qsd.py"]

classes = ("background", *"0123456789")
channels = 64
data_preprocessor = dict(size=(160, 160))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(model="qsd_tiny"),
    neck=dict(in_channels=[16, 32, 64, 80], out_channels=channels),
    decode_head=dict(
        in_channels=[channels] * 4,
        channels=channels,
        num_classes=len(classes),
        # Nineteen pixels in twenty are background: unweighted, a short training finds no digit at all. Larger weights
        # find digits sooner and make them too thick.
        loss_decode=dict(type="CrossEntropyLoss", class_weight=[1.0] + [5.0] * 10),
    ),
)

data_root = "data/digit_scenes/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),  # no flip: a mirrored digit is another sign or none
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),  # other images too
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]


def part(name, pipeline):
    return dict(
        _delete_=True,
        type="BaseSegDataset",
        metainfo=dict(classes=classes),
        reduce_zero_label=True,
        data_root=data_root,
        data_prefix=dict(img_path=f"images/{name}", seg_map_path=f"annotations/{name}"),
        pipeline=pipeline,
    )


train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=part("training", train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=part("validation", test_pipeline))
test_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=part("test", test_pipeline))

iterations = 1200
train_cfg = dict(max_iters=iterations, val_interval=300)
optim_wrapper = dict(optimizer=dict(lr=2e-3, weight_decay=0.05), clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=iterations, eta_min=0),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300, save_best="mIoU", rule="greater"))
custom_hooks = [
    dict(type="StepSizeHook"),
    dict(type="SpikeStatisticsHook"),
    dict(type="ConvertToSpikeDrivenHook", max_images=16, step_images=4),
]
