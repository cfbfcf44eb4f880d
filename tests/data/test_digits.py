import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from qsd.data import DigitsData
from qsd.errors import QsdError
from qsd.reading import digits as reading

SIZES = {"train": 1197, "val": 200, "test": 400}


@pytest.fixture(scope="module")
def digits():
    data = DigitsData()
    data.setup()
    return data


def indices(data, part):
    source = data.load_part(part)
    return [int(source.name(index).removeprefix("digit ")) for index in range(len(source))]


def test_parts_are_disjoint_complete_and_stratified(digits):
    target = load_digits().target
    assert sorted(index for part in SIZES for index in indices(digits, part)) == list(range(1797))
    for part, size in SIZES.items():
        chosen = indices(digits, part)
        assert len(chosen) == size
        assert digits.load_part(part).labels.tolist() == target[chosen].tolist()
        assert np.abs(np.bincount(target[chosen]) - np.bincount(target) * size / 1797).max() < 2


def test_digits_are_read_as_scikit_learn_reads_them(monkeypatch):
    expected = load_digits()
    for missing in (False, True):
        if missing:  # a scikit-learn that keeps its file elsewhere
            monkeypatch.setattr("qsd.reading.digits.find_spec", lambda name: None)
        images, classes = reading.load_digits()
        assert np.array_equal(images, expected.images)
        assert np.array_equal(classes, expected.target)


def test_parts_are_fixed_for_ever():
    # stored: accuracies of different runs and releases are only comparable on the same parts
    seeded = DigitsData(seed=5)
    digest = hashlib.sha256(str([indices(seeded, part) for part in SIZES]).encode()).hexdigest()
    assert digest == "b2d025e09007a584886d80494234c58c6600e9002dba20e66b4e615e8ce035af"


@pytest.mark.parametrize("img_size", [32, (8, 8), (20, 36)])
def test_images_are_the_digits_enlarged(img_size):
    data = DigitsData(img_size=img_size, batch_size=400)
    images, names = next(iter(data.predict_dataloader()))
    assert names[0] == f"digit {indices(data, 'test')[0]}"
    assert images.shape == (400, 1, *data.img_size)
    original = torch.tensor(load_digits().images[indices(data, "test")]).float()[:, None] / 16
    expected = torch.nn.functional.interpolate(original, data.img_size, mode="bilinear", antialias=False)
    # one step of 255 for rounding to 8 bits
    assert ((images * data.std[0] + data.mean[0]) - expected).abs().max() <= 1 / 255


def test_normalised_by_the_training_part(digits):
    source = digits.load_part("train")
    pixels = np.stack([np.asarray(source.load(index)) for index in range(len(source))]) / 255
    assert digits.mean == pytest.approx((pixels.mean(),))
    assert digits.std == pytest.approx((pixels.std(),))


def test_batches(digits):
    assert (digits.num_classes, digits.class_names, digits.in_chans) == (10, [str(digit) for digit in range(10)], 1)
    images, labels = next(iter(digits.train_dataloader()))
    assert (images.shape, images.dtype) == ((64, 1, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert len(digits.train_dataloader()) == 1197 // 64
    assert len(digits.val_dataloader()) == 4


def test_augmentation_is_light(digits):
    # a shift by 2 of 32 pixels, 10 degrees and 10 % keep a digit's ink and centre
    loader = digits.train_dataloader()
    images = torch.cat([images for images, _ in loader]) * digits.std[0] + digits.mean[0]
    source = digits.load_part("train")
    plain = torch.stack([torch.tensor(np.asarray(source.load(index))) for index in range(len(source))]) / 255
    assert images.mean() == pytest.approx(plain.mean().item(), rel=0.05)
    assert images.min() >= -1e-6
    assert images.max() <= 1 + 1e-6


def test_three_channels():
    data = DigitsData(in_chans=3)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (64, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert len(data.mean) == len(data.std) == 3
    with pytest.raises(QsdError, match="in_chans=2"):
        DigitsData(in_chans=2)


@pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("num_workers", -1), ("img_size", 0), ("seed", -1)])
def test_arguments_out_of_range(argument, value):
    with pytest.raises(QsdError, match=f"{argument}={value} is (too small|negative)"):
        DigitsData(**{argument: value})
    with pytest.raises(QsdError, match="img_size="):
        DigitsData(img_size=(32, 0))


def test_seed_is_that_of_seed_everything(monkeypatch):
    def first(data):
        return next(iter(data.train_dataloader()))[0]

    monkeypatch.setenv("PL_GLOBAL_SEED", "4")
    from_environment = first(DigitsData())
    assert torch.equal(from_environment, first(DigitsData(seed=4)))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert torch.equal(first(DigitsData()), first(DigitsData(seed=0)))
    assert not torch.equal(first(DigitsData()), from_environment)


def test_few_training_images_hold_every_class_and_leave_the_other_parts_alone(digits):
    few, again, other = (DigitsData(train_images=50, train_subset=subset) for subset in (1, 1, 2))
    source = few.load_part("train")
    assert len(source) == 50
    assert set(np.bincount(source.labels, minlength=10)) <= {4, 5, 6}
    assert set(indices(few, "train")) <= set(indices(digits, "train"))
    assert indices(few, "train") == indices(again, "train")
    assert indices(few, "train") != indices(other, "train")
    for part in ("val", "test"):
        assert indices(few, part) == indices(digits, part)
    for wrong in (0, 1198):
        with pytest.raises(QsdError, match=f"train_images={wrong} is not from 1 to 1197"):
            DigitsData(train_images=wrong)
