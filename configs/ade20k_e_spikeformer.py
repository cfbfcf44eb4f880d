# Semantic FPN on ADE20K with E-SpikeFormer 19M; the recipe is that of ade20k_qsd.py, which the published code shares.
#   python tools/mmseg_train.py configs/ade20k_e_spikeformer.py --pretrained CHECKPOINT --amp
# The published code takes the stages of strides 2, 4, 8 and 16; these are 4, 8, 16 and 16, and declared as such.
_base_ = ["ade20k_qsd.py"]

# The published weights are floats; of 4 bits here, as those of neck and head.
model = dict(backbone=dict(model="e_spikeformer_19m", model_args=dict(weight_bits=4, window="closed")))
