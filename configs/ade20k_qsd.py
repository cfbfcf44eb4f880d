# Semantic FPN on ADE20K with QSD-Transformer 15M, spiking and low-bit from the first layer to the last.
#   python tools/mmseg_train.py configs/ade20k_qsd.py --pretrained CHECKPOINT --amp
# The published recipe: 160,000 steps of 16 images per process, AdamW, mixed precision.
_base_ = [
    "mmseg::_base_/models/fpn_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
]
custom_imports = dict(imports=["qsd.mm.segmentation"], allow_failed_imports=False)

# Of neck and head. The published ones fire once per unit of input and pass quarters on; their weights are float.
spike_cfg = dict(time_steps=4, weight_bits=4, threshold=1.0, amplitude=0.25)
norm_cfg = dict(_delete_=True, type="BN")
crop_size = (512, 512)
data_preprocessor = dict(size=crop_size)
model = dict(
    pretrained=None,
    data_preprocessor=data_preprocessor,
    backbone=dict(_delete_=True, type="SpikeTransformerBackbone", model="qsd_15m"),
    neck=dict(type="SpikeSemanticFPN", spike_cfg=spike_cfg, norm_cfg=norm_cfg, in_channels=[64, 128, 256, 360]),
    decode_head=dict(
        type="SpikeFPNHead",
        spike_cfg=spike_cfg,
        norm_cfg=norm_cfg,
        feature_strides=[4, 8, 16, 16],  # those of the backbone's stages
        num_classes=150,
    ),
)
train_dataloader = dict(batch_size=16)

iterations = 160000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.005),
    constructor="StepSizeOptimWrapperConstructor",
    paramwise_cfg=dict(lr_mult=dict(decode_head=2.0)),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", by_epoch=False, begin=1500, end=iterations, power=1.0, eta_min=0.0),
]
sync_bn = "torch"
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=2),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
custom_hooks = [dict(type="StepSizeHook"), dict(type="SpikeStatisticsHook")]
