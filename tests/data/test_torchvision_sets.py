"""Torchvision's data sets from miniatures of their files: CIFAR, MNIST and its kin, SVHN, STL-10."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN

from qsd.data import CifarData, TorchvisionData
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
    return TorchvisionData(root, **{"name": "cifar10", "batch_size": 5, "num_workers": 0, "val_size": 20, **kwargs})


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


def write_idx(path, array):
    content = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_grey(folder, ending):
    random = np.random.RandomState(0)
    arrays = {}
    for prefix, count in (("train", 40), ("t10k", 10)):
        arrays[prefix] = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", arrays[prefix])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", (np.arange(count) % 10).astype(np.uint8))
    return arrays


def grey(root, **kwargs):
    return TorchvisionData(str(root), **{"name": "fashion_mnist", "batch_size": 5, "num_workers": 0, **kwargs})


@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_idx_files_plain_and_gzipped_where_others_put_them(tmp_path, folder):
    arrays = write_grey(tmp_path / folder, ".gz" if folder == "" else "")
    module = grey(tmp_path, val_size=10, download=True)  # what is there is not fetched
    module.prepare_data()
    assert (module.in_chans, module.img_size, module.num_classes) == (1, (28, 28), 10)
    assert module.class_names[9] == "Ankle boot"
    train, val, test = (module.load_part(part) for part in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (30, 10, 10)
    assert np.bincount(val.labels).tolist() == [1] * 10
    seen = {int(source.name(i).split()[-1]) for source in (train, val) for i in range(len(source))}
    assert seen == set(range(40))
    other = grey(tmp_path, val_size=10, split_seed=1).load_part("val")
    assert [val.name(i) for i in range(10)] != [other.name(i) for i in range(10)]
    images, labels = next(iter(module.test_dataloader()))
    expected = (arrays["t10k"][:5, None] / 255 - 0.2860) / 0.3530
    assert torch.allclose(images, torch.tensor(expected).float(), atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_grey_images_are_distorted_resized_and_given_channels(tmp_path, write_tree):
    write_grey(tmp_path, ".gz")
    folder = write_tree(tmp_path / "pictures", {"a": {"b": 1}}, size=(50, 40))
    for options, channels in (({}, 1), ({"in_chans": 3}, 3), ({"img_size": 32, "in_chans": 3}, 3), ({"hflip": 0.5}, 1)):
        module = grey(tmp_path, val_size=10, predict_path=str(folder), **options)
        for loader in (module.train_dataloader(), module.val_dataloader(), module.predict_dataloader()):
            images, _ = next(iter(loader))
            assert images.shape[1:] == (channels, *module.img_size)
            assert images.isfinite().all()
    assert grey(tmp_path, name="mnist")._augmentation_options["hflip"] == 0


def test_damaged_and_missing_idx_files_are_one_line(tmp_path):
    with pytest.raises(QsdError, match=r"no t10k-images-idx3-ubyte or .*--data.download true"):
        grey(tmp_path).load_part("test")
    write_grey(tmp_path, ".gz")
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    for content, message in (
        (labels.read_bytes()[:-9], "cannot be read"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x09" + bytes(10)), "has 10 values for the sizes"),
        (gzip.compress(b"not one"), "no IDX file"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x0a" + bytes([77] * 10)), "labels do not fit"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\0"), "labels do not fit"),
    ):
        labels.write_bytes(content)
        with pytest.raises(QsdError, match=message):
            grey(tmp_path).load_part("test")


def test_svhn_and_stl10(tmp_path, monkeypatch):
    random = np.random.RandomState(0)
    sums = {}
    for part, count in (("train", 20), ("test", 6)):
        images = random.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.arange(count)[:, None] % 10 + 1})
        sums[part] = hashlib.md5((tmp_path / f"{part}_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setattr(SVHN, "split_list", {p: ["", f"{p}_32x32.mat", sums.get(p)] for p in SVHN.split_list})
    module = TorchvisionData(str(tmp_path), "svhn", val_size=10, num_workers=0)
    assert np.array_equal(np.asarray(module.load_part("test").load(2)), images[..., 2])
    assert module.load_part("test").labels.tolist() == [1, 2, 3, 4, 5, 6]
    assert (len(module.load_part("train")), module.class_names[0]) == (10, "0")

    monkeypatch.setattr(STL10, "_check_integrity", intact)
    folder = tmp_path / STL10.base_folder
    folder.mkdir()
    pixels = random.randint(0, 256, (10, 3, 96, 96)).astype(np.uint8)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{part}_y.bin").write_bytes((np.arange(10) % 10 + 1).astype(np.uint8).tobytes())
    (folder / STL10.class_names_file).write_text("\n".join(f"class {i}" for i in range(10)))
    for root in (tmp_path, folder):
        module = TorchvisionData(str(root), "stl10", val_size=5, num_workers=0)
        assert np.array_equal(np.asarray(module.load_part("test").load(1)), pixels[1].transpose(2, 1, 0))
    assert module.class_names[3] == "class 3"


def test_the_former_name_of_the_cifar_module_works_and_tells_the_new_one(root, caplog):
    module = CifarData(root, num_workers=0, val_size=20)
    assert (module.name, len(module.load_part("train"))) == ("cifar10", 80)
    assert "TorchvisionData" in caplog.text
