"""Files that want to do harm, and a watch over the files that reading opens."""

import errno
import io
import os
import pathlib
import pickle
import sys
import sysconfig
import zipfile
from contextlib import contextmanager
from unittest import mock

import torch

from qsd import QsdError


class Payload:
    """What runs a function when it is unpickled: here, one that leaves a folder behind as a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def save_payload(path, mark, way="archive", **beside):
    """Write a checkpoint with a payload: as an archive, in the format before PyTorch 1.6, or as a bare pickle."""
    content = {"payload": Payload(mark), **beside}
    if way == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "archive")
    return path


def zero_block(path, member_ending, size=64):
    """Overwrite bytes in the middle of an archive's member with zeros, as a failing disk does."""
    with zipfile.ZipFile(path) as archive:
        info = max((i for i in archive.infolist() if member_ending in i.filename), key=lambda i: i.file_size)
    content = bytearray(path.read_bytes())
    # Behind the member's own header: 30 bytes, its name and its extra field.
    name, extra = (int.from_bytes(content[info.header_offset + at :][:2], "little") for at in (26, 28))
    start = info.header_offset + 30 + name + extra + info.file_size // 2
    size = min(size, info.file_size - info.file_size // 2)
    content[start : start + size] = bytes(size)
    path.write_bytes(content)
    return path


def with_member(path, ending, content):
    """Replace a member of an archive by other bytes, with the right check sum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, content if info.filename.endswith(ending) else old.read(info))
    path.write_bytes(buffer.getvalue())
    return path


_LIBRARIES = tuple(
    {
        os.path.realpath(p)
        for p in (*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev")
    }
)
_WATCHED = (
    "open",
    "os.listdir",
    "os.scandir",
    "socket.connect",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "urllib.Request",
)
_current = None


def _hook(event, arguments):
    if _current is not None and event in _WATCHED:
        _current.append((event, arguments[0] if arguments else None))


@contextmanager
def only_opens(*allowed):
    """Fail when anything but the given files is opened, or a process or connection started.

    Python's own libraries may be opened: functions import modules at their first call. Hooks stay for the life of the
    process, so there is one, which is switched on here.
    """
    global _current
    if not getattr(only_opens, "installed", False):
        sys.addaudithook(_hook)
        only_opens.installed = True
    known = {os.path.realpath(path) for path in allowed}
    _current = events = []
    try:
        yield
    finally:
        _current = None
    for event, subject in events:
        if event in ("open", "os.listdir", "os.scandir"):
            if subject is None or isinstance(subject, int):
                continue  # a descriptor that is open already
            path = os.path.realpath(os.fsdecode(subject))
            if path in known or path.startswith((*_LIBRARIES, str(pathlib.Path(__file__).parents[2] / "qsd"))):
                continue
        raise AssertionError(f"{event} of {subject}")


@contextmanager
def works_or_one_line():
    """Let the body work, or refuse its file with one line: anything else is a fault."""
    try:
        yield
    except QsdError as error:
        lines = str(error).splitlines()
        if len(lines) != 1 or len(lines[0]) > 700:
            raise AssertionError(f"no single line: {error!r}") from error


@contextmanager
def full_disk():
    """Let no file reach the disk."""
    with mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
        yield
