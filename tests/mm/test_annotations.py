"""Annotation files in COCO's format: what is refused, with its place, and what passes, counted."""

import copy
import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsd import QsdError
from qsd.mm.annotations import Use, check_annotations, check_images
from tests.helpers import sample
from tests.helpers.files import works_or_one_line

ALL = Use(("cat", "dog"), masks=True, all_masks=True)
SQUARE = [1.0, 1, 5, 1, 5, 5, 1, 5]


def good():
    annotation = {"image_id": 7, "category_id": 1, "bbox": [1, 1, 4.0, 4], "area": 16, "iscrowd": 0}
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 7, "file_name": "a.jpg", "height": 10, "width": 12},
            {"id": 9, "file_name": "b.jpg", "height": 8, "width": 8},
        ],
        "annotations": [
            {**annotation, "id": 1, "segmentation": [SQUARE]},
            {**annotation, "id": 2, "segmentation": {"size": [10, 12], "counts": [60, 60]}, "iscrowd": 1},
            {**annotation, "id": 3, "segmentation": [SQUARE, SQUARE[:6]], "category_id": 3},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog", "supercategory": "animal"}],
    }


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def changed(change):
    content = good()
    change(content)
    return content


def test_a_good_file_passes_counted(tmp_path):
    counts = check_annotations(write(tmp_path / "a.json", good()), ALL)
    assert counts["images"] == 2
    assert counts["annotations"] == 3
    assert counts["of crowds"] == 1
    assert counts["images without boxes"] == 1


FIELDS = [("images", f) for f in ("id", "file_name", "height", "width")]
FIELDS += [("annotations", f) for f in ("id", "image_id", "category_id", "bbox", "area", "segmentation")]
FIELDS += [("categories", f) for f in ("id", "name")]


@pytest.mark.parametrize(("part", "field"), FIELDS)
@pytest.mark.parametrize("value", ["missing", None, {}, [[]], True, float("nan")])
def test_missing_and_mistyped_fields_are_named_with_their_entry(part, field, value, tmp_path):
    content = good()
    entry = content[part][1 if part != "annotations" else 2]
    if value == "missing":
        del entry[field]
    else:
        entry[field] = value
    with pytest.raises(QsdError) as error:
        check_annotations(write(tmp_path / "a.json", content), ALL)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / "a.json") in message
    assert f"{part}[{1 if part != 'annotations' else 2}]" in message
    assert field in message or "polygon" in message


@pytest.mark.parametrize("field", ["bbox", "area", "segmentation", "iscrowd"])
def test_only_fields_that_are_read_are_asked_for(field, tmp_path):
    content = good()
    for entry in content["annotations"]:
        if field not in ("id", "image_id", "category_id"):
            entry.pop(field, None)
        entry["ignore"] = 1  # OpenMMLab reads no box of such an annotation
    check_annotations(write(tmp_path / "a.json", content), ALL)
    content = good()
    for entry in content["annotations"]:
        entry.pop("segmentation")
        entry.pop("iscrowd")
    check_annotations(write(tmp_path / "a.json", content), Use(("cat", "dog")))


def _annotation(**fields):
    return lambda content: content["annotations"][2].update(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"].append(dict(c["images"][0])), r"images\[2\] \(id 7\) repeats id=7"),
        (lambda c: c["annotations"].append(dict(c["annotations"][0])), r"annotations\[3\] \(id 1\) repeats id=1"),
        (lambda c: c["categories"].append({"id": 1, "name": "x"}), r"categories\[2\] \(id 1\) repeats id=1"),
        (lambda c: c["categories"].append({"id": 5, "name": "cat"}), r"categories\[2\] \(id 5\) repeats name='cat'"),
        (_annotation(bbox=[1, 1, 4]), r"annotations\[2\] \(id 3\) has bbox=\[1, 1, 4\]"),
        (_annotation(bbox=[1, 1, 4, "4"]), r"has bbox=.*\[x, y, width, height\] belongs"),
        (_annotation(bbox=[1, float("nan"), 4, 4]), r"annotations\[2\] \(id 3\) has bbox=.*nan.*no box"),
        (_annotation(bbox=[1, 1, float("inf"), 4]), r"no box"),
        (_annotation(bbox=[1, 1, -4, 4]), r"no box"),
        (_annotation(bbox=[1, 1, 10**400, 4]), r"no box"),
        (_annotation(area=float("nan")), r"annotations\[2\] \(id 3\) has area=NaN"),
        (_annotation(segmentation=[[1, 2, 3, 4]]), r"annotations\[2\] \(id 3\) has a polygon of 4 numbers"),
        (_annotation(segmentation=[[*SQUARE, 1]]), r"has a polygon of 9 numbers"),
        (_annotation(segmentation=[[*SQUARE[:6], float("nan"), 1]]), r"not finite"),
        (_annotation(segmentation=[["a"] * 8]), r"no list of numbers"),
        (_annotation(segmentation=SQUARE), r"no list of numbers"),
        (_annotation(segmentation=[]), r"has an empty segmentation"),
        (
            _annotation(segmentation={"size": [12, 10], "counts": [120]}),
            r"of the size \[12, 10\] in an image of \[10, 12\]",
        ),
        (_annotation(segmentation={"size": [10, 12], "counts": [100]}), r"cover 100 pixels, in an image of 120"),
        (_annotation(segmentation={"size": [10, 12], "counts": [130, -10]}), r"cover 120 pixels"),
        (_annotation(segmentation={"size": [10, 12], "counts": "h"}), r"run lengths that"),
        (_annotation(segmentation={"size": [10, 12], "counts": 3}), r"counts=3"),
        (_annotation(segmentation={"size": [10, 12]}), r"counts=None"),
        (lambda c: c.pop("images"), r"has no list 'images'"),
        (lambda c: c.pop("categories"), r"has no list 'categories'"),
        (lambda c: c.pop("annotations"), r"has no list 'annotations'"),
        (lambda c: c.update(annotations={}), r"has a dict where a list belongs, under 'annotations'"),
        (lambda c: c["annotations"].append(3), r"annotations\[3\] is a int, where a dictionary"),
        (lambda c: c["images"][0].update(width=0), r"images\[0\] \(id 7\) has width=0, which is no size"),
        (lambda c: c["categories"].pop(), r"has no category 'dog' \(1 of 2"),
        (lambda c: c["categories"].reverse(), r"in another order than metainfo\.classes"),
        (
            lambda c: [a.update(image_id="7") for a in c["annotations"]],
            r"annotations\[0\] \(id 1\) has image_id='7'; no",
        ),
        (_annotation(iscrowd="0"), r"annotations\[2\] \(id 3\) has iscrowd='0'; give 0 or 1"),
        (_annotation(ignore=[]), r"annotations\[2\] \(id 3\) has ignore=\[\]; give 0 or 1"),
        (
            lambda c: c["images"][1].update(height=float("inf")),
            r"images\[1\] \(id 9\) has height=inf, which is no size",
        ),
        (lambda c: c["images"][0].update(id=[7]), r"has id=\[7\], where int or str belongs"),
    ],
)
def test_wrong_entries_are_named(change, message, tmp_path):
    with pytest.raises(QsdError, match=message) as error:
        check_annotations(write(tmp_path / "a.json", changed(change)), ALL)
    assert "\n" not in str(error.value)


def test_classes_given_as_one_text_are_refused(tmp_path):
    with pytest.raises(QsdError, match=r"metainfo\.classes='cat' is one text; give a tuple of names: \('cat',\)"):
        check_annotations(write(tmp_path / "a.json", good()), Use("cat"))
    with pytest.raises(QsdError, match=r"metainfo\.classes names 'cat' twice"):
        check_annotations(write(tmp_path / "a.json", good()), Use(("cat", "dog", "cat")))


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"text"', "nonsense", "[" * 100000])
def test_files_that_are_no_annotations_are_named(content, tmp_path):
    with pytest.raises(QsdError, match=r"a\.json (is no JSON, or is cut off|holds a)"):
        check_annotations(write(tmp_path / "a.json", content), ALL)


@pytest.mark.timeout(20)
def test_pipes_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path, tmp_path / "pipe.json", tmp_path / "gone.json"):
        with pytest.raises(QsdError, match=r"is no file|does not exist"):
            check_annotations(path, ALL)


def test_what_official_files_contain_passes_and_is_counted(tmp_path):
    content = good()
    box = content["annotations"][0]
    content["annotations"] += [
        {**box, "id": 11, "bbox": [3, 3, 0, 5], "area": 0},  # zero width
        {**box, "id": 12, "bbox": [3, 3, 0.5, 0.5], "area": 0.25},  # less than a pixel
        {**box, "id": 13, "bbox": [40, 3, 5, 5]},  # outside
        {**box, "id": 14, "image_id": 404},  # of an image that is left out
        {**box, "id": 15, "category_id": 90},  # of another category
        {**box, "id": 16, "ignore": 1},
        {**box, "id": 17, "bbox": [-2, -2, 30, 30]},  # partly outside
        {**box, "id": 901100002299, "iscrowd": 1, "segmentation": {"size": [10, 12], "counts": [120]}},
    ]
    counts = check_annotations(write(tmp_path / "a.json", content), ALL)
    assert counts["of boxes without area"] == 2
    assert counts["of boxes outside their image"] == 1
    assert counts["of other images or classes, or ignored"] == 3
    assert counts["of crowds"] == 2
    small = Use(("cat", "dog"), masks=True)
    content["annotations"][3]["segmentation"] = []  # mmdet drops the box before it looks for its outline
    check_annotations(write(tmp_path / "a.json", content), small)


def test_test_sets_without_annotations_pass(tmp_path):
    content = good()
    del content["annotations"]
    assert check_annotations(write(tmp_path / "a.json", content), Use(("cat", "dog"), boxes=False))["images"] == 2


def test_compressed_run_lengths_are_those_of_pycocotools(tmp_path):
    mask = pytest.importorskip("pycocotools.mask")
    import numpy as np

    for seed in range(20):
        pixels = np.asfortranarray(np.random.RandomState(seed).rand(10, 12) > seed / 20, dtype=np.uint8)
        outline = mask.encode(pixels)
        outline["counts"] = outline["counts"].decode()
        check_annotations(write(tmp_path / "a.json", changed(_annotation(segmentation=outline))), ALL)
        outline["counts"] = outline["counts"][:-1]
        with pytest.raises(QsdError, match="run lengths that"):
            check_annotations(write(tmp_path / "a.json", changed(_annotation(segmentation=outline))), ALL)


@pytest.mark.timeout(20)
def test_images_that_are_missing_empty_or_no_files_are_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    check_images([str(tmp_path / "a.jpg")])
    (tmp_path / "empty.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, message in (("empty", "is an empty file"), ("pipe", "is no file"), ("gone", ", which does not exist")):
        with pytest.raises(QsdError, match=rf"{name}\.jpg ?{message}"):
            check_images([str(tmp_path / "a.jpg"), str(tmp_path / f"{name}.jpg")])


PLACES = [("images", 0), ("images", 1), ("annotations", 0), ("annotations", 1), ("categories", 1)]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 10**20), st.floats(), st.text(max_size=4)),
    lambda inner: (
        st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=sample(50, 500), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_fields_dropped_retyped_and_enlarged_end_in_one_line(tmp_path_factory, data):
    content = copy.deepcopy(good())
    for _ in range(data.draw(st.integers(1, 2))):
        part, index = data.draw(st.sampled_from(PLACES))
        entries = content.get(part)
        entry = entries[index] if isinstance(entries, list) and index < len(entries) else content
        where = data.draw(st.sampled_from([content, entry]))
        if not isinstance(where, dict) or not where:
            continue
        key = data.draw(st.sampled_from(sorted(where)))
        if data.draw(st.booleans()):
            del where[key]
        else:
            where[key] = data.draw(VALUES)
    with works_or_one_line():
        check_annotations(write(tmp_path_factory.getbasetemp() / "fuzz.json", content), ALL)


def large(path, images, annotations):
    """A file of COCO's size: its statistics of boxes, polygons and crowds, in its layout."""
    outline = ",".join(f"{100 + 37.5 * (i % 7):.2f},{200 - 11.25 * (i % 5):.2f}" for i in range(20))
    with path.open("w") as file:
        file.write('{"images": [')
        file.write(",".join(
            f'{{"license": 3, "file_name": "{i:012d}.jpg", "coco_url": "http://images.cocodataset.org/{i:012d}.jpg", '
            f'"height": 480, "width": 640, "date_captured": "2013-11-14 17:02:52", "id": {i}}}' for i in range(images)
        ))  # fmt: skip
        file.write('], "annotations": [')
        for i in range(annotations):
            crowd = i % 86 == 0
            runs = '{"counts": [' + ",".join(["1024"] * 300) + '], "size": [480, 640]}'
            file.write(
                f'{"," if i else ""}{{"segmentation": {runs if crowd else f"[[{outline}]]"}, "area": 702.1, '
                f'"iscrowd": {int(crowd)}, "image_id": {i % images}, "bbox": [100.5, 200.25, 37.5, 20.0], '
                f'"category_id": {1 + i % 80}, "id": {i}}}'
            )
        file.write('], "categories": [')
        file.write(",".join(f'{{"supercategory": "s", "id": {i + 1}, "name": "c{i}"}}' for i in range(80)))
        file.write("]}")
    return path


def test_a_file_of_coco_s_size_is_checked_in_half_a_minute(tmp_path):
    images, annotations = sample((2_000, 14_600), (118_000, 860_000))
    path = large(tmp_path / "instances.json", images, annotations)
    start = time.process_time()
    counts = check_annotations(path, Use(tuple(f"c{i}" for i in range(80)), masks=True, all_masks=True))
    assert time.process_time() - start < 30 * annotations / 860_000 + 1
    assert counts["annotations"] == annotations


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("part", ["train", "val"])
def test_the_files_that_a_configuration_names_are_checked(wrapped, part, coco, tmp_path):
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from qsd.mm import checks

    init_default_scope("mmdet")
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    dataset = {"type": "CocoDataset", "data_root": str(coco), "data_prefix": {"img": "train2017/"}}
    dataset |= {"ann_file": str(tmp_path / "a.json"), "pipeline": [{"type": "LoadAnnotations", "with_mask": True}]}
    config = Config(
        {f"{part}_dataloader": {"dataset": {"type": "RepeatDataset", "dataset": dataset} if wrapped else dataset}}
    )
    write(tmp_path / "a.json", content)
    checks._check_files(config, part)
    del content["annotations"][5]["bbox"]
    write(tmp_path / "a.json", content)
    with pytest.raises(QsdError, match=r"a\.json: annotations\[5\] .* has no field 'bbox'"):
        checks._check_files(config, part)
    (coco / "train2017" / "empty.jpg").write_bytes(b"")
    content["images"][0]["file_name"] = "empty.jpg"
    write(tmp_path / "a.json", content)
    with pytest.raises(QsdError, match=r"empty\.jpg is an empty file"):
        checks._check_files(config, part)
