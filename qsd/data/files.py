"""Finding image files on disk."""

import logging
import os
from collections import Counter
from pathlib import Path

from qsd.errors import QsdError
from qsd.reading.files import regular_file, shown
from qsd.reading.images import image_endings

__all__ = ["ImageFinder", "class_folders", "find_images"]

logger = logging.getLogger(__name__)


def class_folders(folder: Path) -> list[str]:
    """The names of the visible folders in a folder, sorted.

    Args:
        folder: A folder that exists.

    Raises:
        QsdError: If one of them is a link to the folder itself or to one above it.
    """
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    above = _identities_above(str(folder))
    for name in names:
        path = os.path.join(folder, name)
        if os.path.islink(path) and _identity(path) in above:
            raise QsdError(f"{shown(path)} is a link to a folder that it lies in; remove it.")
    return names


class ImageFinder:
    """Lists image files in folders, and counts what it leaves out.

    Hidden files and folders are ignored. Links to folders are followed, except those that lead to a folder above or to
    one that was searched before: such a link would list images twice, or without end.

    Args:
        endings: Endings of the names that are listed, in lower case; ``None`` for those of images.

    Attributes:
        others: Number of files by the ending of their name, of those that are not read.
        links: Links that were not followed.
    """

    def __init__(self, endings: tuple[str, ...] | None = None) -> None:
        self.others: Counter[str] = Counter()
        self.links: list[str] = []
        self._endings = image_endings() if endings is None else endings

    def find(self, folder: Path) -> list[str]:
        """The visible image files in a folder and its visible folders, in a fixed order.

        Args:
            folder: A folder that exists.
        """
        counted = self.others.copy()
        found: list[str] = []
        # Identities of folders are needed only where there are links to folders: they cost a system call each.
        if not self._search(str(folder), found, None):
            self.others, found = counted, []
            self._search(str(folder), found, _identities_above(str(folder)))
        return found

    def _search(self, folder: str, found: list[str], seen: set[tuple[int, int]] | None) -> bool:
        """Add a folder's images; False if there is a link to a folder and no ``seen``, the folders not to enter."""
        names, subfolders, any_link = [], [], False
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_file(follow_symlinks=False) or not entry.is_dir():
                    names.append(entry.name)  # a link to a file and a pipe, too: reading it tells
                else:
                    subfolders.append(entry.name)
                    any_link |= entry.is_symlink()
        if any_link and seen is None:
            return False
        names.sort()
        images = [name for name in names if name.lower().endswith(self._endings)]
        if len(images) < len(names):
            self.others.update(os.path.splitext(name)[1].lower() for name in set(names).difference(images))
        start = os.path.join(folder, "")
        found += [start + name for name in images]
        for name in sorted(subfolders):
            path = start + name
            if seen is not None:
                identity = _identity(path)
                if identity in seen:
                    self.links.append(path)
                    continue
                seen.add(identity)
            if not self._search(path, found, seen):
                return False
        return True

    def report(self, folder: Path) -> None:
        """Warn of what was left out since the last report.

        Args:
            folder: The folder that was searched, for the message.
        """
        if self.others:
            kinds = ", ".join(f"{count} {shown(end) or 'without ending'}" for end, count in self.others.most_common(5))
            more = ", ..." if len(self.others) > 5 else ""
            logger.warning(
                "%s holds %d file(s) whose ending is not read (%s%s); read are %s.",
                shown(folder), self.others.total(), kinds, more, " ".join(self._endings),
            )  # fmt: skip
        if self.links:
            logger.warning(
                "%s holds %d link(s) to folders above or searched before, which are not followed: %s.",
                shown(folder), len(self.links), ", ".join(shown(link) for link in self.links[:3]),
            )  # fmt: skip
        self.others, self.links = Counter(), []


def find_images(path: str) -> list[str]:
    """The image files that a user asks for.

    Args:
        path: A file of any name, or a folder, which is searched recursively.

    Returns:
        At least one path.

    Raises:
        QsdError: If there is no such file or folder, or no image in the folder.
    """
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise QsdError(f"predict_path {shown(path)} does not exist; give an image file or a folder of images")
        return [str(regular_file(path, "predict_path"))]
    finder = ImageFinder()
    found = finder.find(Path(path))
    if not found:
        raise QsdError(f"predict_path {shown(path)} holds no image; known are {', '.join(image_endings())}")
    finder.report(Path(path))
    return found


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _identities_above(folder: str) -> set[tuple[int, int]]:
    """A folder and all that it lies in: by its path as it is written, and as it is without links."""
    found = set()
    for start in (Path(os.path.abspath(folder)), Path(os.path.realpath(folder))):
        found |= {_identity(str(path)) for path in (start, *start.parents)}
    return found
