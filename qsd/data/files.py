"""Finding image files on disk."""

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from qsd.errors import QsdError


def class_folders(folder: Path) -> list[str]:
    """The names of the visible folders in a folder, sorted.

    Args:
        folder: exists.
    """
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def list_images(folder: Path) -> list[str]:
    """The visible image files in a folder and its visible folders, in a fixed order.

    Args:
        folder: exists.
    """
    found = []
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [os.path.join(directory, name) for name in sorted(names) if _is_image(name)]
    return found


def find_images(path: str) -> list[str]:
    """The image files that a user asks for.

    Args:
        path: A file of any name, or a folder, searched recursively.

    Returns:
        At least one path.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise QsdError(f"predict_path {path} does not exist; give an image file or a folder of images.")
    found = list_images(Path(path))
    if not found:
        raise QsdError(f"predict_path {path} holds no image; known are {', '.join(IMG_EXTENSIONS)}.")
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
