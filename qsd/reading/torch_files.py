"""Reading what ``torch.save`` wrote, without running code that the file names."""

import pickletools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qsd.reading.archives import check_archive
from qsd.reading.files import FileError, describe, read_head, regular_file

# How PyTorch's restricted unpickler names what it refuses to call or to build, in its various messages.
_REFUSED = re.compile(
    r"(?:Unsupported global: GLOBAL |Unsupported class |[Tt]rying to (?:call reduce for unrecognized function )?"
    r"(?:load unsupported GLOBAL )?)([\w.<> ]+?) (?:was not|whose|found)"
)
_PLAIN_MODULES = ("torch.", "collections.OrderedDict", "numpy.", "argparse.Namespace")  # of old checkpoints
_UNSAFE_CALL = (
    "Unsupported global",
    "Unsupported class",
    "unrecognized function",
    "unsupported GLOBAL",
    "set state for",
)


class CodeError(FileError):
    """A file that would run code if it were read the usual way."""


def read_torch(path: str | Path, allowed: Sequence[Any] = (), noun: str = "checkpoint") -> Any:
    """Read a ``.ckpt``, ``.pth`` or ``.pt`` file onto the CPU.

    The file is an archive with check sums (since PyTorch 1.6), which are verified first, or a bare pickle. It is read
    by PyTorch's restricted unpickler, which builds tensors, numbers, texts and containers only.

    Args:
        path: Path of the file.
        allowed: Further classes and functions that the file may name, as for ``torch.serialization.safe_globals``.
        noun: Name of the file's role in messages.

    Returns:
        The contents of the file.

    Raises:
        FileError: If the file is missing, damaged, or holds something else.
        CodeError: If the file asks for any other function or class; the message names it.
    """
    path = regular_file(path, noun)
    head = read_head(path, 4)
    is_archive = head.startswith(b"PK\x03\x04")
    if is_archive:
        check_archive(path)
        _check_members(path, noun)
    elif head[:1] != b"\x80":  # the first byte of every pickle that PyTorch has written
        found = describe(path)
        raise FileError(
            f"{noun} {path} cannot be read: it is damaged, incomplete or no {noun}"
            f"{f' (it is {found})' if found else ''}."
        )
    try:
        with torch.serialization.safe_globals([*allowed]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise FileError(f"{noun} {path} cannot be read: it asks for more memory than there is.") from error
    except Exception as error:  # whatever damaged bytes lead to: PyTorch lists no types
        if (wanted := _wanted(path, error, allowed, is_archive)) is not None:
            raise CodeError(
                f"{noun} {path} is refused: this file wants to run code ({wanted}), which tensors never need; "
                "if you trust it, save its state dict alone."
            ) from error
        raise FileError(
            f"{noun} {path} cannot be read: it is damaged, incomplete or no {noun} ({type(error).__name__})."
        ) from error


def _check_members(path: Path, noun: str) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise CodeError(f"{noun} {path} is refused: it is a TorchScript program, which is code; save a state dict.")
    if not any(name.rsplit("/", 1)[-1] == "data.pkl" for name in names):
        shown = ", ".join(names[:3]) or "nothing"
        raise FileError(f"{noun} {path} is a zip archive, but no {noun}: it holds {shown}.")


def _wanted(path: Path, error: Exception, allowed: Sequence[Any], is_archive: bool) -> str | None:
    """The functions or classes that a refused file asks for, or ``None`` if that was not the reason."""
    if is_archive:
        try:
            with torch.serialization.safe_globals([*allowed]):
                names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if names:
                return ", ".join(sorted(names)[:3])
        except Exception:  # the pickle is damaged; the first error is the one to report
            return None
    else:
        # PyTorch's unpickler stops at the first opcode of a protocol that it does not know, before any name.
        names = [name for name in _named_globals(path) if not name.startswith(_PLAIN_MODULES)]
        if names:
            return ", ".join(dict.fromkeys(names[:3]))
    text = str(error)
    if not any(words in text for words in _UNSAFE_CALL):
        return None
    found = _REFUSED.search(text)
    return found[1].strip() if found else "a function that is not allowed"


def _named_globals(path: Path) -> list[str]:
    """Names of functions and classes in a file of pickles one after the other, found without executing any of them."""
    names: list[str] = []
    texts: list[str] = []
    with path.open("rb") as file:
        try:
            while True:
                for opcode, argument, _ in pickletools.genops(file):
                    if opcode.name == "GLOBAL":
                        names.append(str(argument).replace(" ", "."))
                    elif opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                        names.append(".".join(texts[-2:]))
                    elif isinstance(argument, str):
                        texts.append(argument)
        except Exception:  # the end of the pickles, or damage
            return names
