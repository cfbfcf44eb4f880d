# Mask R-CNN on COCO with E-SpikeFormer 19M, spiking and low-bit from the first layer to the last.
#   python tools/mmdet_train.py configs/coco_e_spikeformer.py --pretrained CHECKPOINT --amp
# The published recipe: 12 epochs, four images on each GPU. Strides are the true ones of coco_qsd.py: 4, 8, 16, 16, 32.
_base_ = ["coco_qsd.py"]

model = dict(
    # The published weights are floats; of 4 bits here, as those of neck and heads.
    backbone=dict(model="e_spikeformer_19m", model_args=dict(weight_bits=4, window="closed")),
)
train_dataloader = dict(batch_size=4)
max_epochs = 12
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=max_epochs, milestones=[8, 11], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=12)
