"""Finding image files on disk, and what a configuration says of them."""

import os
from pathlib import Path
from typing import Any

import yaml
from torchvision.datasets.folder import IMG_EXTENSIONS

from qsd.errors import QsdError

__all__ = ["class_folders", "data_settings", "find_images", "list_images"]


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
        path: a file of any name, or a folder, searched recursively.

    Returns:
        At least one path.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise QsdError(f"predict_path {path} does not exist; give an image file or a folder of images")
    found = list_images(Path(path))
    if not found:
        raise QsdError(f"predict_path {path} holds no image; known are {', '.join(IMG_EXTENSIONS)}")
    return found


def data_settings(config: str) -> dict[str, Any]:
    """The data module of a training's configuration, as `jsonargparse` reads it.

    Args:
        config: a file.

    Raises:
        QsdError: if it names no data.
    """
    try:
        content = yaml.safe_load(Path(config).read_text())
    except yaml.YAMLError as error:
        raise QsdError(f"{config} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "data" not in content:
        raise QsdError(f"{config} has no data section; name the images with --data.")
    return content["data"]


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
