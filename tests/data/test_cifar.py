"""CIFAR from a miniature of torchvision's files: 10 training images per class and 5 test images in all."""

import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from qsd.data import CifarData
from qsd.errors import QsdError

MEAN = np.array([0.4914, 0.4822, 0.4465])
STD = np.array([0.2470, 0.2435, 0.2616])


def intact(*args):
    return True


@pytest.fixture
def root(tmp_path, monkeypatch):
    for dataset, labels_key, classes in ((CIFAR10, "labels", 10), (CIFAR100, "fine_labels", 100)):
        monkeypatch.setattr(dataset, "_check_integrity", intact)
        folder = tmp_path / dataset.base_folder
        folder.mkdir()
        random = np.random.RandomState(classes)
        files = [name for name, _ in dataset.train_list]
        counts = {name: 10 * classes // len(files) for name in files} | {dataset.test_list[0][0]: 5}
        for name, count in counts.items():
            content = {"data": random.randint(0, 255, (count, 3072)).astype(np.uint8)}
            content[labels_key] = [index % classes for index in range(count)]
            (folder / name).write_bytes(pickle.dumps(content))
        names = [f"class {index}" for index in range(classes)]
        (folder / dataset.meta["filename"]).write_bytes(pickle.dumps({dataset.meta["key"]: names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", intact)
    return str(tmp_path)


def data(root, **kwargs):
    return CifarData(root, **{"batch_size": 5, "num_workers": 0, "val_size": 20, **kwargs})


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_parts(root, name, classes):
    module = data(root, name=name, val_size=2 * classes)
    assert module.num_classes == classes
    assert module.class_names == [f"class {index}" for index in range(classes)]
    train, val, test = (module.load_part(part) for part in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (8 * classes, 2 * classes, 5)
    assert np.bincount(val.labels).tolist() == [2] * classes
    images = {source.load(index).tobytes() for source in (train, val, test) for index in range(len(source))}
    assert len(images) == 10 * classes + 5  # random images: disjoint and complete
    # the split is fixed, whatever the seed
    assert data(root, name=name, val_size=2 * classes, seed=9).load_part("val").labels.tolist() == val.labels.tolist()


def test_val_size_0_validates_on_the_test_images(root):
    module = data(root, val_size=0)
    assert len(module.load_part("train")) == 100
    names = [module.load_part(part).name(3) for part in ("train", "val", "test")]
    assert names == ["training image 3", "test image 3", "test image 3"]


def test_evaluation_at_32_only_normalises(root):
    images, labels = next(iter(data(root).test_dataloader()))
    raw = pickle.loads((data(root).root / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]
    expected = (raw.reshape(5, 3, 32, 32) / 255 - MEAN[:, None, None]) / STD[:, None, None]
    assert torch.allclose(images, torch.tensor(expected).float(), atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_training_at_32_is_a_shift_by_at_most_4(root):
    module = data(root, auto_augment=None, random_erasing=0, hflip=0)
    module.setup("fit")
    source = module.load_part("train")
    padded = {}
    for index in range(len(source)):
        pixels = np.pad(np.asarray(source.load(index)), ((4, 4), (4, 4), (0, 0)))
        padded.setdefault(int(source.labels[index]), []).append(pixels)
    shifts = set()
    for images, labels in module.train_dataloader():
        for image, label in zip(images, labels.tolist()):
            pixels = np.rint((image.permute(1, 2, 0).numpy() * STD + MEAN) * 255).astype(int)
            found = [
                (y, x)
                for whole in padded[label]
                for y in range(9)
                for x in range(9)
                if np.array_equal(whole[y : y + 32, x : x + 32][14:18, 14:18], pixels[14:18, 14:18])
            ]
            assert len(found) == 1
            shifts.add(found[0])
    assert len(shifts) > 20


@pytest.mark.parametrize("img_size", [32, 48, (24, 40)])
def test_any_size(root, img_size):
    module = data(root, img_size=img_size)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.predict_dataloader()):
        images, _ = next(iter(loader))
        assert images.shape == (5, 3, *module.img_size)


def test_predict_path_is_resized(root, tmp_path, write_tree):
    folder = write_tree(tmp_path / "pictures", {"a": {"b": 1}}, size=(50, 40))
    images, names = next(iter(data(root, predict_path=str(folder)).predict_dataloader()))
    assert images.shape == (1, 3, 32, 32)
    assert names == [str(folder / "a" / "b" / "0.png")]


def test_missing_files(tmp_path):
    with pytest.raises(QsdError) as error:
        data(tmp_path).setup("fit")
    message = str(error.value)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert "extract cifar-10-python.tar.gz" in message
    assert "--data.download true" in message
    assert "\n" not in message


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    asked = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    data(tmp_path).prepare_data()
    assert not asked
    with pytest.raises(QsdError, match=r"cannot download cifar10 from https://.*\(no network\)"):
        data(tmp_path, download=True).prepare_data()
    assert asked


def test_wrong_arguments(root):
    with pytest.raises(QsdError, match="name='cifar11' is unknown"):
        data(root, name="cifar11")
    with pytest.raises(QsdError, match="val_size=-1 is negative"):
        data(root, val_size=-1)
    with pytest.raises(QsdError, match="val_size=100 leaves none of the 100 images"):
        data(root, val_size=100).setup("fit")
    with pytest.raises(QsdError, match="hflip=2 is not a probability"):
        data(root, hflip=2).setup("fit")
