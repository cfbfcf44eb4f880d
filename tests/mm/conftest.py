"""Small data in the layouts of COCO and ADE20K, and the tools' entry points."""

import json
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from qsd.commands.demo.scenes import make_scenes

# `make test` installs OpenMMLab; an environment without it still runs the other tests.
collect_ignore_glob = [] if find_spec("mmengine") else ["test_*.py"]


def _spare_mmengine_its_slow_steps():
    """Half of the time of a short training goes into pretty-printing its configuration, and into an index in YAML.

    The configuration is written as valid Python all the same, and each file of the index is read once. (A cache of what
    is found in the index would not do: parts of configurations, such as ours are built on, are not in it.)
    """
    import yapf.yapflib.yapf_api
    from mmengine.config import utils

    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, True)
    utils.load = cache(utils.load)


if find_spec("mmengine"):
    _spare_mmengine_its_slow_steps()


def _picture(path, seed, size=(96, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """Four and two images in COCO's layout, with its 80 classes, whose numbers have gaps."""
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp("coco")
    names = CocoDataset.METAINFO["classes"]
    categories = [{"id": i + 1 + (i > 10), "name": name} for i, name in enumerate(names)]
    for part, count in (("train2017", 4), ("val2017", 2)):
        images, annotations = [], []
        for i in range(1, count + 1):
            _picture(root / part / f"{i:012d}.jpg", i)
            images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": 96, "height": 64})
            for j, (x, y, w, h) in enumerate([(8, 8, 40, 40), (50, 10, 36, 44)]):
                polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
                annotation = {"id": 10 * i + j, "image_id": i, "category_id": categories[11 * j + i]["id"]}
                box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": [polygon]}
                annotations.append({**annotation, **box})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def ade(tmp_path_factory):
    """Four and two images in ADE20K's layout: maps hold 0 for what is no class, and 1 to 150."""
    root = tmp_path_factory.mktemp("ade")
    for part, count in (("training", 4), ("validation", 2)):
        for i in range(1, count + 1):
            name = f"ADE_{'train' if part == 'training' else 'val'}_{i:08d}"
            _picture(root / "images" / part / f"{name}.jpg", i)
            classes = np.repeat(np.array([0, 1, 75, 150], np.uint8), 24)[None].repeat(64, 0)
            (root / "annotations" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(classes).save(root / "annotations" / part / f"{name}.png")
    return root


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A few scenes of digits."""
    folder = tmp_path_factory.mktemp("data") / "digit_scenes"
    make_scenes(folder, (16, 4, 4))
    return folder
