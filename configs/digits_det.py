# The demonstration: Mask R-CNN on scenes of digits, a small network of 4-bit weights, on two CPU cores.
#   qsd demo scenes data/digit_scenes
#   qsd fit --config configs/digit_crops.yaml
#   python tools/mmdet_train.py configs/digits_det.py --pretrained runs/digit_crops/version_0/checkpoints/best.ckpt
_base_ = ["coco_qsd.py"]

classes = tuple("0123456789")
channels = 64
strides = [4, 8, 16, 16, 32]
model = dict(
    backbone=dict(model="qsd_tiny"),
    neck=dict(in_channels=[16, 32, 64, 80], out_channels=channels),
    rpn_head=dict(in_channels=channels, feat_channels=channels),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=300, max_per_img=100), rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)

data_root = "data/digit_scenes/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs"),  # no flip: a mirrored digit is another sign or none
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),  # other images too
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]


def part(name, pipeline):
    return dict(
        metainfo=dict(classes=classes),
        data_root=data_root,
        ann_file=f"annotations/instances_{name}.json",
        data_prefix=dict(img=f"images/{name}/"),
        pipeline=pipeline,
    )


train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=part("training", train_pipeline))
val_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=part("validation", test_pipeline))
test_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False, dataset=part("test", test_pipeline))
val_evaluator = dict(ann_file=f"{data_root}annotations/instances_validation.json")
test_evaluator = dict(ann_file=f"{data_root}annotations/instances_test.json")

iterations = 500
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=iterations, val_interval=250)
optim_wrapper = dict(optimizer=dict(lr=2e-3), clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=50, end=iterations, eta_min=0),
]
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=250, save_best="coco/segm_mAP_50", rule="greater"),
)
log_processor = dict(by_epoch=False)
custom_hooks = [
    dict(type="StepSizeHook"),
    dict(type="SpikeStatisticsHook"),
    dict(type="ConvertToSpikeDrivenHook", max_images=16, step_images=4),
]
