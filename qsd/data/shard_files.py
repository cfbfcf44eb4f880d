"""The tar files of a split: by the list that lies beside them, or by their names."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

from qsd.errors import QsdError
from qsd.reading import regular_file, shown

_LISTS = ("_info.json", "info.json")  # timm's names
_LARGEST_LIST = 1 << 26  # bytes
_MOST_FILES = 1_000_000
_COMPRESSED = r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4|Z))"


def find_shards(root: Path, split: str) -> list[Path]:
    """The tar files of a split, in a fixed order; none if there are none.

    Args:
        root: Folder of the tar files.
        split: Name of the split, or the names of its files: ``{0000..0127}`` stands for numbers, ``{a,b}`` for texts,
            ``*`` for any text.

    Raises:
        QsdError: If a name leads out of the folder, or a file that is listed or numbered is missing or named twice.
    """
    if ":" in split:
        raise _no_file(split, root)
    listed = _listed(root, split)
    if listed is not None or any(sign in split for sign in "{*") or split.endswith(".tar"):
        names = listed if listed is not None else _expanded(split)
        paths = [path for name in names for path in _files(root, name)]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise QsdError(f"the split {shown(split)} names the file {shown(twice)} twice; name it once.")
        return paths
    if (root / f"{split}.tar").is_file():
        return [root / f"{split}.tar"]
    if (root / split).is_dir():
        return sorted((root / split).glob("*.tar"))
    word = _word(split, r"\.tar")
    return sorted(path for path in root.glob("*.tar") if word.fullmatch(path.name))


def find_compressed(root: Path, split: str) -> Path | None:
    """A compressed tar file of a split, of which no image can be read alone; ``None`` if there is none.

    Args:
        root: Folder of the tar files.
        split: Name of the split.
    """
    word = _word(split, _COMPRESSED)
    found = [path for path in root.iterdir() if word.fullmatch(path.name)]
    if (root / split).is_dir():
        found += [path for path in (root / split).iterdir() if re.fullmatch(f".+{_COMPRESSED}", path.name)]
    return min(found, default=None)


def _word(split: str, ending: str) -> re.Pattern[str]:
    """File names of which a split is a word: "train" of imagenet-train-0001.tar, but not of constrained-0001.tar."""
    return re.compile(rf"(.*[^a-zA-Z])?{re.escape(split)}([^a-zA-Z].*)?{ending}")


def _files(root: Path, name: str) -> list[Path]:
    """The files of one name, which must lie in the folder."""
    path = Path(name)
    if ":" in name or path.is_absolute() or ".." in path.parts:
        raise _no_file(name, root)
    if "*" in name:
        return sorted(root.glob(name))
    return [regular_file(root / path, "tar file")]


def _no_file(name: str, root: Path) -> QsdError:
    return QsdError(f"{shown(name)} is no file in {shown(root)}; commands and addresses of shards are not opened.")


def listed_images(root: Path, split: str) -> int | None:
    """The number of images that the list beside the files gives for a split, or ``None``.

    Args:
        root: Folder of the tar files.
        split: Name of the split.
    """
    listed = _entry(root, split)
    return None if listed is None else listed[1]


def _listed(root: Path, split: str) -> list[str] | None:
    listed = _entry(root, split)
    return None if listed is None else listed[0]


def _entry(root: Path, split: str) -> tuple[list[str], int | None] | None:
    """The files and the number of images of a split, in the list beside the files."""
    path = next((root / name for name in _LISTS if (root / name).is_file()), None)
    if path is None:
        return None
    if path.stat().st_size > _LARGEST_LIST:
        raise QsdError(f"{shown(path)} is too large for a list of shards.")
    try:
        entry: Any = json.loads(path.read_bytes())["splits"].get(split)
        if entry is None:
            return None
        count = entry.get("num_samples")
        return [str(name) for name in entry["filenames"]], None if count is None else int(count)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise QsdError(f"{shown(path)} is no list of shards as timm reads it; mend or remove it.") from error


def _expanded(pattern: str) -> list[str]:
    """All names of a pattern with braces."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MOST_FILES:
        raise QsdError(f"{shown(pattern)} stands for {count} files.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _choices(text: str) -> list[str]:
    numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text)
    if numbers is None:
        return text.split(",")
    first, last = numbers[1], numbers[2]
    if int(last) - int(first) > _MOST_FILES:
        raise QsdError(f"{{{text}}} stands for more than {_MOST_FILES} files.")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
