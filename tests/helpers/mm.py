"""Options that make OpenMMLab's published configurations small, and what a run logged."""

import json

# A network that takes a step in a fraction of a second; necks and heads keep their sizes.
NARROW = {"embed_dims": (8, 8, 16, 16), "depth": 2, "num_heads": 2}
SMALL = {
    "model.backbone.model_args": NARROW,
    "model.neck.in_channels": [8, 8, 16, 16],
    "model.backbone.norm_eval": False,  # without pretrained weights there are no statistics to keep
}

# The same backbone for command lines.
TINY_BACKBONE = [
    *(f'model.backbone.model_args.{key}="{value}"' for key, value in NARROW.items()),
    "model.neck.in_channels=[8,8,16,16]",
]
# Few features behind the backbone of a configuration for detection or segmentation.
NARROW_DETECTOR = [
    f"model.{key}=16"
    for key in (
        "neck.out_channels", "rpn_head.in_channels", "rpn_head.feat_channels",
        "roi_head.bbox_roi_extractor.out_channels", "roi_head.bbox_head.in_channels",
        "roi_head.bbox_head.fc_out_channels", "roi_head.mask_roi_extractor.out_channels",
        "roi_head.mask_head.in_channels", "roi_head.mask_head.conv_out_channels",
    )
]  # fmt: skip
NARROW_SEGMENTER = [
    "model.neck.out_channels=16", "model.decode_head.in_channels=[16,16,16,16]", "model.decode_head.channels=16",
]  # fmt: skip

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
ONE_PROCESS = [f"{loader}.{key}" for loader in LOADERS for key in ("num_workers=0", "persistent_workers=False")]
# The published scales, made small: pictures of 96x64 pixels.
COCO_SCALES = [
    'train_dataloader.dataset.pipeline.2.scale="(96,64)"',
    'train_dataloader.dataset.pipeline.4.transforms.0.0.scales="[(64,96)]"',
    'train_dataloader.dataset.pipeline.4.transforms.1.0.scales="[(48,96)]"',
    'train_dataloader.dataset.pipeline.4.transforms.1.1.crop_size="(40,60)"',
    'train_dataloader.dataset.pipeline.4.transforms.1.2.scales="[(64,96)]"',
    *(f'{part}_dataloader.dataset.pipeline.1.scale="(96,64)"' for part in ("val", "test")),
]
ADE_SCALES = [
    'train_dataloader.dataset.pipeline.2.scale="(128,64)"',
    'train_dataloader.dataset.pipeline.3.crop_size="(64,64)"',
    'model.data_preprocessor.size="(64,64)"',
    *(f'{part}_dataloader.dataset.pipeline.1.scale="(128,64)"' for part in ("val", "test")),
]
# Of the conversion behind the demonstrations' training; tests/mm/test_training_hooks.py looks at all of it.
LITTLE = [f"custom_hooks.2.{option}" for option in ("max_images=1", "step_images=1", "stages=[]")]


def scalars(folder):
    """Everything a run logged, in order."""
    (path,) = folder.rglob("vis_data/scalars.json")
    return [json.loads(line) for line in path.read_text().splitlines()]
