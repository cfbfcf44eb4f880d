"""Tiny recordings of event cameras in the formats of the published data sets, written byte by byte."""

import struct
from pathlib import Path

import numpy as np


def random_events(number, width=128, height=128, seed=0, duration=100_000):
    """Sorted random events: x, y, microseconds, polarity."""
    random = np.random.default_rng(seed)
    events = np.empty(number, dtype=[("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")])
    events["x"], events["y"] = random.integers(0, width, number), random.integers(0, height, number)
    events["t"], events["p"] = np.sort(random.integers(0, duration, number)), random.integers(0, 2, number)
    return events


def write_npy(path, events):
    """A structured array."""
    np.save(path, events)


def write_gesture(path, events):
    """A gesture as tonic cuts it out: columns x, y, polarity and milliseconds."""
    columns = [events["x"], events["y"], events["p"].astype(np.int64), events["t"] // 1000]
    np.save(path, np.stack(columns, 1).astype(np.int64))


def write_bin(path, events):
    """N-MNIST and N-Caltech101: five bytes an event, 23 bits of time."""
    x, y, t, p = (events[name].astype(np.uint32) for name in "xytp")
    columns = [x, y, (p << 7) | (t >> 16 & 127), t >> 8 & 255, t & 255]
    Path(path).write_bytes(np.stack(columns, 1).astype(np.uint8).tobytes())


def write_aedat2(path, events):
    """The ``.aedat`` files of CIFAR10-DVS: addresses of a DVS128 and microseconds, big-endian."""
    address = (events["x"].astype(np.uint32) << 8) | (events["y"].astype(np.uint32) << 1) | events["p"]
    pairs = np.stack([address, events["t"].astype(np.uint32)], 1).astype(">u4")
    Path(path).write_bytes(b"#!AER-DAT2.0\r\n# a test\r\n" + pairs.tobytes())


def write_aedat3(path, events, packet=64):
    """The ``.aedat`` files of DVS128 Gesture: packets with a header, and addresses of another layout, little-endian."""
    address = (events["x"].astype(np.uint32) << 17) | (events["y"].astype(np.uint32) << 2) | events["p"] << 1
    pairs = np.stack([address, events["t"].astype(np.uint32)], 1).astype("<u4")
    parts = [pairs[start : start + packet] for start in range(0, len(pairs), packet)]
    packets = [struct.pack("<HH6I", 1, 0, 8, 4, 0, len(p), len(p), len(p)) + p.tobytes() for p in parts]
    Path(path).write_bytes(b"#!AER-DAT3.1\r\n#Start-Time: a day\r\n#!END-HEADER\r\n" + b"".join(packets))


def write_aedat4(path, events):
    """An AEDAT4 file with one stream of events, without compression."""
    import flatbuffers

    info = (
        '<dv version="2.0"><node name="outInfo" path="/mainloop/Recorder/outInfo/"><node name="0" path="/0/">'
        '<attr key="compression" type="string">NONE</attr><attr key="typeIdentifier" type="string">EVTS</attr>'
        '<node name="info" path="/0/info/"><attr key="sizeX" type="int">128</attr>'
        '<attr key="sizeY" type="int">128</attr><attr key="source" type="string">test</attr></node></node></node></dv>'
    )
    builder = flatbuffers.Builder(1024)
    text = builder.CreateString(info)
    builder.StartObject(3)
    builder.PrependInt32Slot(0, 0, -1)  # no compression
    builder.PrependInt64Slot(1, -1, 0)  # no table of the data
    builder.PrependUOffsetTRelativeSlot(2, text, 0)
    builder.FinishSizePrefixed(builder.EndObject(), b"IOHE")
    header = bytes(builder.Output())
    builder = flatbuffers.Builder(1024)
    builder.StartVector(16, len(events), 8)
    for event in reversed(events):
        builder.Prep(8, 16)
        builder.Pad(3)
        builder.PrependBool(bool(event["p"]))
        builder.PrependInt16(int(event["y"]))
        builder.PrependInt16(int(event["x"]))
        builder.PrependInt64(int(event["t"]))
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.FinishSizePrefixed(builder.EndObject(), b"EVTS")
    packet = bytes(builder.Output())
    Path(path).write_bytes(b"#!AER-DAT4.0\r\n" + header + struct.pack("<ii", 0, len(packet)) + packet)


def write_hdf5(path, events, group="events"):
    """Four lists in a group."""
    import h5py

    with h5py.File(path, "w") as file:
        for name in "xytp":
            file[f"{group}/{name}"] = events[name]


def write_cifar10_dvs(root, count=10, write=write_aedat4, ending=".aedat4", classes=("airplane", "cat")):
    """``root/<class>/*``, as tonic unpacks them."""
    for label, name in enumerate(classes):
        folder = Path(root) / name
        folder.mkdir(parents=True)
        for index in range(count):
            write(folder / f"cifar10_{name}_{index}{ending}", random_events(300, seed=100 * label + index))
    return Path(root)


def write_gestures(root, count=6):
    """``root/ibmGestureTrain/user01_fluorescent/0.npy`` and so on."""
    for part in ("ibmGestureTrain", "ibmGestureTest"):
        for user in range(count):
            folder = Path(root) / part / f"user{user:02d}_fluorescent"
            folder.mkdir(parents=True)
            for gesture in (0, 10):
                write_gesture(folder / f"{gesture}.npy", random_events(300, seed=10 * user + gesture))
    return Path(root)


def write_n_mnist(root, count=10):
    """``root/Train/0/00001.bin`` and so on."""
    for part in ("Train", "Test"):
        for digit in "01":
            folder = Path(root) / part / digit
            folder.mkdir(parents=True)
            for index in range(count):
                write_bin(folder / f"{index:05d}.bin", random_events(200, 34, 34, seed=index))
    return Path(root)
