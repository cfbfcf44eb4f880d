"""Image folders in ImageNet's layout."""

from pathlib import Path
from typing import Any

from qsd.data.base import Part
from qsd.data.dataset import ImageFiles
from qsd.data.files import ImageFinder, class_folders
from qsd.data.photographs import PhotographData
from qsd.errors import QsdError
from qsd.reading.files import shown

_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


class ImageFolderData(PhotographData):
    """``root/train/<class>/*`` and ``root/val/<class>/*`` (or ``validation``), and perhaps ``root/test/<class>/*``.

    Images are searched recursively in each class folder; hidden files are ignored. The labels number the sorted class
    folders of the training part; without one (evaluation only) those of the others, which then must hold all classes
    for the labels to be right. Without a test folder the validation part is the test part.

    Args:
        root: Folder that holds ``train`` and ``val``.
        img_size: Height and width in pixels; one number for a square.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        **options: Augmentation, preprocessing and seed, as for `PhotographData`.
    """

    def __init__(
        self,
        root: str,
        img_size: int | tuple[int, int] = 224,
        batch_size: int = 64,
        num_workers: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, **options)
        self.root = Path(root)
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The name of every class folder, by label."""
        if self._class_names is None:
            self._class_names = self._find_classes()
        return self._class_names

    def load_part(self, part: Part) -> ImageFiles:
        """List the files of one part.

        Args:
            part: "train", "val" or "test".
        """
        label = {name: index for index, name in enumerate(self.class_names)}
        folder = self._folder(part) or (self._folder("val") if part == "test" else None)
        if folder is None:
            raise QsdError(f"{self.root} has no folder {part}; expected {part}/<class>/<image> in it.")
        found = class_folders(folder)
        if not found:
            raise QsdError(f"{folder} has no class folders; expected {folder}/<class>/<image>.")
        if unknown := [name for name in found if name not in label]:
            raise QsdError(
                f"{folder} has {_listed(unknown, 'class folder')} missing in {self.root / 'train'}; remove or rename."
            )
        paths: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        finder = ImageFinder()
        for name in found:
            images = finder.find(folder / name)
            paths += images
            labels += [label[name]] * len(images)
            if not images:
                empty.append(name)
        if empty:
            finder.report(folder)  # which may tell why
            raise QsdError(
                f"{folder} has {_listed(empty, 'class folder')} without images; add some or remove the folder."
            )
        finder.report(folder)
        return ImageFiles(paths, labels, self.exif_orientation)

    def _folder(self, part: Part) -> Path | None:
        return next((self.root / name for name in _FOLDERS[part] if (self.root / name).is_dir()), None)

    def _find_classes(self) -> list[str]:
        if not self.root.is_dir():
            raise QsdError(f"root {self.root} is not a folder; give the one that holds train/<class> and val/<class>.")
        train = self._folder("train")
        folders = [train] if train else [folder for part in ("val", "test") if (folder := self._folder(part))]
        if not folders:
            found = sorted(entry.name for entry in self.root.iterdir())
            holds = f"it holds {_listed(found, 'entry', 'entries')}" if found else "it is empty"
            raise QsdError(
                f"root {self.root} has no train or val; expected train/<class>/<image> and val/<class>/<image>, "
                f"{holds}."
            )
        return sorted({name for folder in folders for name in class_folders(folder)})


def _listed(names: list[str], singular: str, plural: str | None = None) -> str:
    """Number, noun and first names, such as "2 class folders (cat, dog)"."""
    noun = singular if len(names) == 1 else plural or singular + "s"
    return f"{len(names)} {noun} ({', '.join(map(shown, names[:5]))}{', ...' if len(names) > 5 else ''})"
