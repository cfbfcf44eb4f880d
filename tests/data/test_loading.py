"""Augmentation, unreadable images, workers: what a batch does and does not depend on."""

import logging
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from qsd.data import BadImagePolicy, ImageArray, ImageDataset, ImageFiles, ImageLoader, TrainLoader, TrainSampler
from qsd.data.sampling import EvalSampler
from qsd.data.transforms import TableNormalize, crop_transform
from qsd.errors import QsdError
from tests.helpers import long

COUNT = 13
OPTIONS = {
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "interpolation": "bicubic",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.5,
}


def numpy_state():
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002 - timm draws from this generator
    return [*keys.tolist(), position]


class Draw:
    """Adds a draw of every global generator, so that equal images mean equal states."""

    def __call__(self, image):
        return transforms.functional.to_tensor(image) + random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002


def array_source(count=COUNT, size=8):
    images = np.random.RandomState(0).randint(0, 255, (count, size, size, 3)).astype(np.uint8)
    return ImageArray(images, np.arange(count), [str(index) for index in range(count)])


def train_loader(source=None, transform=None, seed=0, epoch=0, world=1, rank=0, batch_size=4, policy="error", **kwargs):
    dataset = ImageDataset(source or array_source(), transform or Draw(), seed, replace_bad=policy == "skip")
    sampler = TrainSampler(dataset, seed, world, rank)
    sampler.set_epoch(epoch)
    bad_images = BadImagePolicy(policy)
    return TrainLoader(dataset, bad_images=bad_images, sampler=sampler, batch_size=batch_size, **kwargs)


def eval_loader(source, policy="error", **kwargs):
    dataset = ImageDataset(source, transforms.ToTensor())
    return ImageLoader(dataset, bad_images=BadImagePolicy(policy), sampler=EvalSampler(dataset), **kwargs)


def by_label(*loaders):
    """Image by label over all batches; every label once."""
    found = {}
    for loader in loaders:
        for images, labels in loader:
            for image, label in zip(images, labels.tolist()):
                assert label not in found
                found[label] = image
    return found


def assert_equal_images(one, other):
    assert set(one) == set(other)
    for label in one:
        assert torch.equal(one[label], other[label])


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    timm = crop_transform((8, 8), **OPTIONS)
    for transform in (Draw(), timm):
        reference = by_label(train_loader(transform=transform, epoch=2))
        random.random()
        torch.rand(3)
        assert_equal_images(reference, by_label(train_loader(transform=transform, epoch=2, batch_size=5)))
        workers = train_loader(transform=transform, epoch=2, num_workers=2, persistent_workers=True)
        assert_equal_images(reference, by_label(workers))
        # two processes share 12 of the 13
        shards = by_label(*(train_loader(transform=transform, epoch=2, world=2, rank=rank) for rank in range(2)))
        assert_equal_images(shards, {label: reference[label] for label in shards})
        assert len(shards) == 12
        for other in ({"epoch": 3}, {"seed": 1, "epoch": 2}):
            changed = by_label(train_loader(transform=transform, **other))
            assert sum(not torch.equal(reference[label], changed[label]) for label in reference) > COUNT // 2


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "F"])
def test_normalisation_by_table_gives_the_same_bits(mode):
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "F": 1}[mode]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (7, 9, channels), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze().astype(np.float32) if mode == "F" else pixels.squeeze())
    assert image.mode == mode
    mean, std = generator.uniform(0.1, 0.9, (2, channels))
    parts = transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))
    assert torch.equal(TableNormalize(*parts)(image), transforms.Compose(parts)(image))


def test_every_image_has_an_augmentation_of_its_own():
    same = ImageArray(np.zeros((COUNT, 8, 8, 3), np.uint8), np.arange(COUNT), [""] * COUNT)
    images = by_label(train_loader(same))
    assert len({image.sum().item() for image in images.values()}) == COUNT


@long
def test_spawned_workers_load_the_same():
    timm = crop_transform((8, 8), **OPTIONS)
    spawned = train_loader(transform=timm, num_workers=1, multiprocessing_context="spawn")
    assert_equal_images(by_label(train_loader(transform=timm)), by_label(spawned))


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(workers):
    before = random.getstate(), numpy_state(), torch.get_rng_state()
    list(train_loader(num_workers=workers))
    list(eval_loader(array_source(), batch_size=4, num_workers=workers))
    after = random.getstate(), numpy_state(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_evaluation_is_in_order():
    images, labels = zip(*eval_loader(array_source(), batch_size=4))
    assert torch.cat(labels).tolist() == list(range(COUNT))
    assert [len(batch) for batch in images] == [4, 4, 4, 1]
    expected = torch.stack([transforms.functional.to_tensor(array_source().load(index)) for index in range(COUNT)])
    assert torch.equal(torch.cat(images), expected)
    assert labels[0].dtype == torch.int64


def test_nothing_is_drawn_before_the_first_batch():
    loader = train_loader()
    iterator = iter(loader)
    loader.sampler.set_epoch(7)
    assert torch.equal(next(iterator)[0], next(iter(train_loader(epoch=7)))[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_state_continues_with_the_next_batch_without_loading_those_before(done, workers):
    kwargs = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = train_loader(epoch=3, drop_last=True, **kwargs)
    whole = list(loader)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    if done:
        assert loader.state_dict() == {"epoch": 3, "batches": done}

    resumed = train_loader(epoch=0, drop_last=True, **kwargs)
    resumed.load_state_dict({"epoch": 3, "batches": done})
    assert resumed.state_dict() == {"epoch": 3, "batches": done}  # also if saved again before the first batch
    iterator = iter(resumed)
    resumed.sampler.set_epoch(3)
    rest = list(iterator)
    assert len(resumed) == 3
    assert [labels.tolist() for _, labels in rest] == [labels.tolist() for _, labels in whole[done:]]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(rest, whole[done:]))
    resumed.sampler.set_epoch(4)
    assert len(list(resumed)) == 3  # the next epoch is whole again
    assert resumed.state_dict() == {"epoch": 4, "batches": 3}


def test_resuming_loads_only_what_is_left():
    class Counting(ImageArray):
        loaded = 0

        def load(self, index):
            Counting.loaded += 1
            return super().load(index)

    source = Counting(np.zeros((12, 4, 4, 3), np.uint8), np.arange(12), [""] * 12)
    loader = train_loader(source)
    loader.load_state_dict({"epoch": 0, "batches": 2})
    assert len(list(loader)) == 1
    assert Counting.loaded == 4


@pytest.mark.parametrize("state", [{"epoch": 2, "batches": 4}, {"epoch": 1, "batches": 2}])
def test_state_of_a_finished_or_another_epoch_skips_nothing(state):
    loader = train_loader(epoch=2)
    loader.load_state_dict(state)
    assert len(list(loader)) == 4


@pytest.fixture
def files(tmp_path, truncated):
    """Ten images, of which 3, 4 and 9 are truncated."""
    paths = []
    for index in range(10):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", (4, 4), (index, 0, 0)).save(paths[-1])
    for index in (3, 4, 9):
        truncated(paths[index])
    return ImageFiles([str(path) for path in paths], list(range(10)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_clear_line(files, workers):
    with pytest.raises(QsdError) as raised:
        list(eval_loader(files, batch_size=4, num_workers=workers))
    message = str(raised.value)
    assert files.name(3) in message
    assert "truncated" in message
    assert "--data.on_bad_image skip" in message
    assert "\n" not in message
    with pytest.raises(QsdError, match="cannot read the image"):
        list(train_loader(files, transforms.ToTensor(), num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_images_out(files, workers, caplog):
    loader = eval_loader(files, "skip", batch_size=2, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        labels = [labels.tolist() for _, labels in loader]
    assert labels == [[0, 1], [2], [5], [6, 7], [8]]
    assert list(loader.bad_images.reasons) == [files.name(index) for index in (3, 4, 9)]
    assert len(caplog.records) == 1
    assert "skipped 3 image(s)" in caplog.text
    assert files.name(4) in caplog.text
    list(loader)
    assert len(caplog.records) == 1  # nothing new, no second warning


def test_the_report_comes_before_the_last_batch_is_asked_for(files, caplog):
    iterator = iter(eval_loader(files, "skip", batch_size=10))
    next(iterator)  # Lightning stops here
    assert "skipped 3 image(s)" in caplog.text


def test_an_empty_batch_is_not_yielded(files):
    loader = eval_loader(ImageFiles([files.name(index) for index in (3, 4, 0)], [3, 4, 0]), "skip", batch_size=2)
    assert [labels.tolist() for _, labels in loader] == [[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_bad_images_by_the_next_good_one(files, workers):
    loader = train_loader(files, transforms.ToTensor(), policy="skip", num_workers=workers, batch_size=5)
    order = [index for _, index in TrainSampler(range(10), 0)]
    labels = torch.cat([labels for _, labels in loader]).tolist()
    assert labels == [{3: 5, 4: 5, 9: 0}.get(index, index) for index in order]
    assert set(loader.bad_images.reasons) == {files.name(index) for index in (3, 4, 9)}


def test_a_replacement_is_augmented_differently_from_the_image_that_it_repeats(files):
    images = [batch for batch, labels in train_loader(files, Draw(), policy="skip", batch_size=1) if labels == 5]
    assert len(images) == 3
    assert len({image.sum().item() for image in images}) == 3


def test_only_bad_images_are_an_error_even_when_skipping(files):
    only_bad = ImageFiles([files.name(3), files.name(4)], [0, 1])
    with pytest.raises(QsdError, match="none of 2 images can be read; the first is"):
        list(eval_loader(only_bad, "skip", batch_size=1))
    with pytest.raises(QsdError, match="none of 2 images can be read; the first is"):
        list(train_loader(only_bad, policy="skip"))


def test_unknown_policy():
    with pytest.raises(QsdError, match="on_bad_image='ignore' is unknown"):
        BadImagePolicy("ignore")


def test_names_survive_bytes_that_are_not_text(tmp_path):
    names = [str(tmp_path / "a b.png"), str(tmp_path / "ü.png"), str(tmp_path / "\udcff.png")]
    source = ImageFiles(names)
    assert [source.name(index) for index in range(3)] == names
