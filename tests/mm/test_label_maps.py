"""Label maps of segmentation: legal ones pass, every other one is named."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qsd import QsdError
from qsd.mm.label_maps import check_maps


class Maps:
    """As much of a data set of mmseg as the check reads."""

    def __init__(self, folder, maps, reduce_zero_label=False, label_map=None, size=(6, 4), exif=None):
        self.folder, self.maps, self.reduce_zero_label, self.label_map = folder, maps, reduce_zero_label, label_map
        for i, content in enumerate(maps):
            Image.new("RGB", size).save(folder / f"{i}.jpg", **({"exif": exif} if exif else {}))
            if isinstance(content, np.ndarray):
                content = Image.fromarray(content)
            if content is not None:
                content.save(folder / f"{i}.png")

    def get_data_info(self, index):
        info = {"img_path": str(self.folder / f"{index}.jpg"), "seg_map_path": str(self.folder / f"{index}.png")}
        return info if self.maps[index] is not None else {"img_path": info["img_path"]}

    def check(self, classes):
        check_maps(self, classes, range(len(self.maps)))


def constant(*values):
    return np.resize(np.array(values, np.uint8), (4, 6))


@pytest.mark.parametrize(
    ("values", "options", "classes"),
    [
        ((0, 1, 2), {}, 3),
        ((0, 2, 255), {}, 3),
        ((0, 1, 3), {"reduce_zero_label": True}, 3),
        ((0, 1, 3, 255), {"reduce_zero_label": True}, 3),  # 255 stays what does not count
        ((0, 1, 4), {"label_map": {0: 255, 1: 0, 2: 255, 3: 255, 4: 1}}, 2),  # two classes of five
        ((0, 1, 5), {"label_map": {0: 255, 1: 0, 2: 255, 3: 255, 4: 1}, "reduce_zero_label": True}, 2),
    ],
)
def test_legal_maps_pass(values, options, classes, tmp_path):
    Maps(tmp_path, [constant(*values)], **options).check(classes)


def test_legal_labels_are_those_that_mmseg_makes(tmp_path):
    transforms = pytest.importorskip("mmseg.datasets.transforms")
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for options in ({}, {"reduce_zero_label": True}, {"label_map": {i: 255 if i % 2 else i // 2 for i in range(10)}}):
        maps = Maps(tmp_path, [every], size=(16, 16), **options)
        info = {**maps.get_data_info(0), "label_map": maps.label_map, "seg_fields": []}
        info["reduce_zero_label"] = maps.reduce_zero_label
        load = transforms.LoadAnnotations(imdecode_backend="pillow")
        made = load(info)["gt_seg_map"]
        for value in range(256):
            Image.fromarray(np.full((16, 16), value, np.uint8)).save(tmp_path / "0.png")
            legal = made[every == value][0] < 5 or made[every == value][0] == 255
            if legal:
                maps.check(5)
            else:
                with pytest.raises(QsdError, match=f"holds the label {value}, beyond the 5 classes"):
                    maps.check(5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (constant(0, 3), "holds the label 3, beyond the 3 classes"),
        (np.full((4, 6), 300, np.uint16), "holds the label 300"),
        (np.full((4, 6), -1, np.int32), "holds the label -1"),
        (Image.new("RGB", (6, 4)), r"is a colour image \(RGB\)"),
        (Image.new("RGBA", (6, 4)), r"is a colour image \(RGBA\)"),
        (Image.new("LA", (6, 4)), r"is a colour image \(LA\)"),
        (np.zeros((8, 12), np.uint8), "is 12x8 pixels, its image 6x4"),
        (np.zeros((6, 4), np.uint8), "is 4x6 pixels, its image 6x4"),
        (None, "has no label map"),
    ],
)
@pytest.mark.parametrize("position", [0, 11])
def test_every_wrong_map_is_named_wherever_it_lies(content, message, position, tmp_path):
    maps = [constant(0, 1)] * 12
    maps[position] = content
    if isinstance(content, np.ndarray) and content.min() < 0:
        Maps(tmp_path, [*maps[:position], constant(0), *maps[position + 1 :]])
        Image.fromarray(content).save(tmp_path / f"{position}.png", "TIFF")
        maps = Maps.__new__(Maps)
        maps.__dict__.update(folder=tmp_path, maps=[0] * 12, reduce_zero_label=False, label_map=None)
    else:
        maps = Maps(tmp_path, maps)
    with pytest.raises(QsdError, match=message) as error:
        maps.check(3)
    assert "\n" not in str(error.value)
    assert f"{position}." in str(error.value)


def test_a_palette_holds_numbers(tmp_path):
    image = Image.fromarray(constant(0, 2)).convert("P")
    image.putdata([0, 2] * 12)
    Maps(tmp_path, [image]).check(3)


@pytest.mark.timeout(20)
def test_files_that_are_damaged_empty_missing_or_pipes_are_named(tmp_path):
    maps = Maps(tmp_path, [constant(0)])
    path = tmp_path / "0.png"
    for content in (b"", b"text", path.read_bytes()[:40]):
        path.write_bytes(content)
        with pytest.raises(QsdError, match=r"0\.png cannot be read"):
            maps.check(3)
    path.unlink()
    with pytest.raises(QsdError, match="does not exist"):
        maps.check(3)
    os.mkfifo(path)
    with pytest.raises(QsdError, match="is no file"):
        maps.check(3)
    path.unlink()
    maps = Maps(tmp_path, [constant(0)])
    image = maps.get_data_info(0)["img_path"]
    os.unlink(image)
    os.mkfifo(image)
    with pytest.raises(QsdError, match=r"image .* is no file"):
        maps.check(3)


def test_the_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    maps = Maps(tmp_path, [np.zeros((6, 4), np.uint8)], exif=exif)  # a picture of 6x4 pixels that stands on its side
    maps.check(3)


def test_the_first_process_looks_and_all_know(monkeypatch):
    from qsd.mm import checks

    monkeypatch.setattr(checks, "from_first_process", lambda problem: problem or "told by another")

    def fail():
        raise AssertionError("only the first process looks")

    with pytest.raises(QsdError, match="told by another"):
        checks._in_first_process(SimpleNamespace(rank=1), fail)
