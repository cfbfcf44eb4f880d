"""Recordings of event cameras: reading, frames, augmentation, cache, and the data modules."""

import os
import warnings
import zipfile

import numpy as np
import pytest
import torch

from qsd import QsdError
from qsd.data import DigitEvents, DvsData, EventFolderData
from qsd.data.events import Binning, FrameAugmentation, load_events
from qsd.data.events.pixels import PixelModel, record
from qsd.data.events.recordings import RecordingFiles
from qsd.reading.events import sorted_events
from qsd.reading.images import BadImage
from tests.helpers import recordings

WRITERS = {
    "a.npy": recordings.write_npy,
    "a.h5": recordings.write_hdf5,
    "a.bin": recordings.write_bin,
    "a.aedat": recordings.write_aedat2,
    "a.aedat4": recordings.write_aedat4,
}


def test_all_formats_give_the_events_that_were_written(tmp_path):
    events = recordings.random_events(500)
    for name, write in WRITERS.items():
        path = str(tmp_path / name)
        write(path, events)
        found = load_events(path)
        assert not isinstance(found, BadImage), (name, found)
        for field in "xytp":
            assert np.array_equal(getattr(found, field), events[field].astype(float)), (name, field)
    recordings.write_aedat3(tmp_path / "ibm.aedat", events)
    found = load_events(str(tmp_path / "ibm.aedat"), "ibm")
    assert all(np.array_equal(getattr(found, field), events[field].astype(float)) for field in "xytp")
    path = str(tmp_path / "gesture.npy")
    recordings.write_gesture(path, events)
    found = load_events(path, "gesture")
    assert np.array_equal(found.t, events["t"] // 1000 * 1000.0)
    np.savez_compressed(tmp_path / "a.npz", ts=events["t"], x=events["x"], y=events["y"], polarity=events["p"])
    assert np.array_equal(load_events(str(tmp_path / "a.npz"), time_unit="ms").t, events["t"] * 1e3)


def _harmful(tmp_path, events):
    """Files that no reader may follow or believe, with the reason why."""
    import h5py

    np.save(tmp_path / "objects.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    yield "objects.npy", "array of objects"
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file["events/x"] = events["x"]
        file["events/t"] = events["t"]
        file["events/y"] = h5py.ExternalLink("other.h5", "/y")
        file["events/p"] = events["p"]
    yield "external.h5", "is a link"
    with h5py.File(tmp_path / "outside.h5", "w") as file:
        for name in "xyp":
            file[f"events/{name}"] = events[name]
        (tmp_path / "raw").write_bytes(events["t"].tobytes())
        file.create_dataset("events/t", (len(events),), "<i8", external=[(str(tmp_path / "raw"), 0, 8 * len(events))])
    yield "outside.h5", "another file"
    recordings.write_npy(tmp_path / "claims.npy", events)
    content = (tmp_path / "claims.npy").read_bytes()
    (tmp_path / "claims.npy").write_bytes(content.replace(b"(500,)", b"(9e9,)".replace(b"9e9", b"999")))
    yield "claims.npy", "than the file holds"
    (tmp_path / "cut.bin").write_bytes(b"123456")
    yield "cut.bin", "no multiple of 5"
    (tmp_path / "noise.aedat4").write_bytes(os.urandom(200))
    yield "noise.aedat4", ""
    (tmp_path / "noise.aedat").write_bytes(b"#!AER-DAT7.0\r\n")
    yield "noise.aedat", "does not begin with #!AER-DAT2.0"
    for version, write in ((2, recordings.write_aedat2), (3, recordings.write_aedat3)):
        write(tmp_path / "whole", events)
        content = (tmp_path / "whole").read_bytes()
        for left in (1, 7) if version == 2 else (1, 8, 28, 60, 1000):
            (tmp_path / f"cut{version}.{left}.aedat").write_bytes(content[:-left])
            yield f"cut{version}.{left}.aedat", "truncated"
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    yield "empty.npz", "no field x"
    (tmp_path / "nothing.npy").write_bytes(b"")
    yield "nothing.npy", "empty"
    os.mkfifo(tmp_path / "pipe.npy")
    yield "pipe.npy", "pipe"
    for name, field, values, reason in (
        ("negative", "x", events["x"] - 1, "no range of pixels"),
        ("bytes", "p", np.where(events["p"], 1, 255), "from 1 to 255, where polarities are 0 or -1 and 1"),
        ("halves", "p", np.full(500, 0.5), "where polarities are"),
        ("unknown", "p", np.full(500, np.nan), "not finite"),
        ("ages", "t", np.linspace(0, 1e300, 500), "71 years"),
    ):
        fields = {n: values if n == field else events[n] for n in "xytp"}
        np.savez(tmp_path / f"{name}.npz", **fields)
        yield f"{name}.npz", reason


def test_harmful_and_damaged_recordings_are_refused_with_a_reason(tmp_path):
    for name, reason in _harmful(tmp_path, recordings.random_events(500)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load_events(str(tmp_path / name))
        assert isinstance(found, BadImage), name
        assert reason in found.reason, (name, found.reason)
        assert "\n" not in found.reason


def test_frames_count_the_events_of_each_bin():
    events = recordings.random_events(3000, 40, 30)
    for bin_ms in (None, 7.0):
        frames = Binning(4, (15, 20), (30, 40), bin_ms)(sorted_events(*(events[name] for name in "xytp")))
        expected = np.zeros((4, 2, 15, 20))
        start, span = events["t"][0], events["t"][-1] - events["t"][0] + 1
        for x, y, t, p in events:
            f = int((t - start) // (span / 4 if bin_ms is None else bin_ms * 1000))
            if f < 4:
                expected[f, int(p), y // 2, x // 2] += 1
        assert np.array_equal(frames, expected)
    assert frames.sum() < 3000
    with pytest.raises(ValueError, match="outside of the sensor of 20x30"):
        Binning(4, (15, 20), (30, 20))(sorted_events(*(events[name] for name in "xytp")))


def test_augmentation_is_the_same_for_all_frames_and_keeps_whole_counts():
    frame = torch.poisson(torch.full((1, 2, 12, 12), 2.0))
    frames = frame.expand(5, -1, -1, -1).clone()
    torch.manual_seed(0)
    for _ in range(20):
        changed = FrameAugmentation(20, 0.2, 0.2, 0.5)(frames)
        assert all(torch.equal(changed[0], other) for other in changed)
        assert set(changed.unique().tolist()) <= set(frames.unique().tolist()) | {0.0}
    dropped = FrameAugmentation(drop=1.0)(frames)
    assert bool((dropped <= frames).all())
    assert torch.equal(dropped, dropped.round())


def test_a_cache_gives_the_same_frames_and_follows_the_file(tmp_path):
    path, cache = str(tmp_path / "a.npy"), tmp_path / "cache"
    recordings.write_npy(path, recordings.random_events(300))
    source = RecordingFiles([path], [0], Binning(3, (16, 16), (128, 128)), cache=str(cache))
    first = source.load(0)
    (kept,) = cache.rglob("*.npz")
    assert np.array_equal(source.load(0), first)
    kept.write_bytes(b"damaged")
    assert np.array_equal(source.load(0), first)
    other = RecordingFiles([path], [0], Binning(4, (16, 16), (128, 128)), cache=str(cache)).load(0)
    assert other.shape[0] == 4
    recordings.write_npy(path, recordings.random_events(200, seed=1))
    assert source.load(0).sum() == 200
    with pytest.raises(QsdError, match=r"the folder cache=.* cannot be made"):
        RecordingFiles([path], [0], Binning(3, (16, 16)), cache=path)


def test_a_pixel_reports_changes_of_log_intensity():
    def picture(now):  # one pixel becomes e times as bright, one e times as dark, one stays
        return np.array([[[np.exp(now / 100 - 1), np.exp(-now / 100), 0.5]]], dtype=np.float32)

    model = PixelModel(threshold=0.25, mismatch=0.0, refractory_ms=0.0, dark=0.0, noise_hz=0.0)
    (events,) = record(picture, 100, model, np.random.default_rng(0))
    assert sorted(zip(events.x.tolist(), events.p.tolist())).count((0, 1)) in (3, 4)
    assert {(x, p) for x, p in zip(events.x.tolist(), events.p.tolist())} == {(0, 1), (1, 0)}
    assert np.diff(events.t[events.x == 0]).mean() == pytest.approx(25_000, rel=0.05)
    slow = PixelModel(threshold=0.25, mismatch=0.0, refractory_ms=60.0, dark=0.0, noise_hz=0.0)
    (rested,) = record(picture, 100, slow, np.random.default_rng(0))
    assert len(rested.t) < len(events.t)


def test_digit_events_are_the_same_every_time():
    data = DigitEvents(num_workers=0)
    frames, labels = next(iter(data.whole_part("val")))
    assert (frames.shape, frames.dtype, labels.dtype) == ((64, 3, 2, 16, 16), torch.float32, torch.int64)
    assert torch.equal(frames, next(iter(DigitEvents(num_workers=0).whole_part("val")))[0])
    assert [len(data.whole_part(part).dataset) for part in ("train", "val", "test")] == [1197, 200, 400]
    assert 100 < frames.sum((1, 2, 3, 4)).mean() < 3000
    assert bool((frames.sum((2, 3, 4)) > 0).all()), "every frame of every digit sees events"


def test_published_layouts_are_divided_into_parts(tmp_path):
    roots = {
        "cifar10_dvs": recordings.write_cifar10_dvs(tmp_path / "a", 10, recordings.write_aedat2, ".aedat"),
        "dvs128_gesture": recordings.write_gestures(tmp_path / "b"),
        "n_mnist": recordings.write_n_mnist(tmp_path / "c"),
    }
    for name, root in roots.items():
        data = DvsData(str(root), name, frames=2, img_size=16, batch_size=2, num_workers=0)
        parts = {part: data.whole_part(part).dataset.source for part in ("train", "val", "test")}
        files = {part: {source.name(i) for i in range(len(source))} for part, source in parts.items()}
        assert len(files["train"] | files["val"] | files["test"]) == sum(map(len, files.values())), "parts overlap"
        frames, labels = next(iter(data.train_dataloader()))
        assert frames.shape == (2, 2, 2, 16, 16), name
        assert set(parts["train"].labels.tolist()) == {0, 10} if name == "dvs128_gesture" else {0, 1}
        assert int(labels.max()) < data.num_classes
        whole = DvsData(str(root), name, val_share=0, num_workers=0)
        val, test = (whole.whole_part(part).dataset.source for part in ("val", "test"))
        assert [val.name(i) for i in range(len(val))] == [test.name(i) for i in range(len(test))]
    with pytest.raises(QsdError, match="n_caltech101 is missing"):
        DvsData(str(tmp_path), "n_caltech101", num_workers=0).class_names  # noqa: B018


def test_a_folder_of_recordings_with_a_damaged_one(tmp_path):
    for part in ("train", "val"):
        for name in ("left", "right"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(2):
                recordings.write_npy(tmp_path / part / name / f"{index}.npy", recordings.random_events(200, seed=index))
    (tmp_path / "train" / "left" / "bad.npy").write_bytes(b"\x93NUMPY broken")
    options = {"frames": 3, "img_size": 16, "sensor": 128, "batch_size": 5, "num_workers": 0}
    data = EventFolderData(str(tmp_path), **options, on_bad_image="skip")
    frames, _ = next(iter(data.train_dataloader()))
    assert (data.class_names, frames.shape) == (["left", "right"], (5, 3, 2, 16, 16))
    assert len(data.skipped_images) == 1
    with pytest.raises(QsdError, match=r"bad\.npy"):
        list(EventFolderData(str(tmp_path), **options).train_dataloader())
    predicted = EventFolderData(str(tmp_path), **options, predict_path=str(tmp_path / "val"))
    frames, names = next(iter(predicted.predict_dataloader()))
    assert (len(frames), names[0]) == (4, str(tmp_path / "val" / "left" / "0.npy"))
    with pytest.raises(QsdError, match="frames=0 is not from 1"):
        EventFolderData(str(tmp_path), frames=0)
