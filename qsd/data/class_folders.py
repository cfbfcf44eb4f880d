"""Folders of files by part and class, in ImageNet's layout."""

from pathlib import Path

from qsd.data.base import Part
from qsd.data.files import ImageFinder, class_folders
from qsd.errors import QsdError
from qsd.reading.files import shown

_FOLDERS: dict[Part, tuple[str, ...]] = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}


class ClassFolders:
    """``root/train/<class>/*`` and ``root/val/<class>/*`` (or ``validation``), and perhaps ``root/test/<class>/*``.

    Args:
        root: Folder that holds ``train`` and ``val``.
        endings: Endings of the files that are listed; ``None`` for those of images.
        noun: Name of a file in messages.
    """

    def __init__(self, root: Path, endings: tuple[str, ...] | None = None, noun: str = "image") -> None:
        self.root, self.endings, self.noun = root, endings, noun
        self._class_names: list[str] | None = None

    @property
    def class_names(self) -> list[str]:
        """The name of every class folder, by label."""
        if self._class_names is None:
            self._class_names = self._find_classes()
        return self._class_names

    def list_part(self, part: Part) -> tuple[list[str], list[int]]:
        """Files and labels of one part; without a test folder the validation part is the test part.

        Args:
            part: "train", "val" or "test".

        Raises:
            QsdError: If the folder is missing, or a class folder is unknown or empty.
        """
        label = {name: index for index, name in enumerate(self.class_names)}
        folder = self._folder(part) or (self._folder("val") if part == "test" else None)
        if folder is None:
            raise QsdError(f"{self.root} has no folder {part}; expected {part}/<class>/<{self.noun}> in it.")
        found = class_folders(folder)
        if not found:
            raise QsdError(f"{folder} has no class folders; expected {folder}/<class>/<{self.noun}>.")
        if unknown := [name for name in found if name not in label]:
            raise QsdError(
                f"{folder} has {_listed(unknown, 'class folder')} missing in {self.root / 'train'}; remove or rename."
            )
        paths: list[str] = []
        labels: list[int] = []
        empty: list[str] = []
        finder = ImageFinder(self.endings)
        for name in found:
            files = finder.find(folder / name)
            paths += files
            labels += [label[name]] * len(files)
            if not files:
                empty.append(name)
        finder.report(folder)  # which may tell why folders are empty
        if empty:
            raise QsdError(
                f"{folder} has {_listed(empty, 'class folder')} without {self.noun}s; add some or remove the folder."
            )
        return paths, labels

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
                f"root {self.root} has no train or val; expected train/<class>/<{self.noun}> and "
                f"val/<class>/<{self.noun}>, {holds}."
            )
        return sorted({name for folder in folders for name in class_folders(folder)})


def _listed(names: list[str], singular: str, plural: str | None = None) -> str:
    """Number, noun and first names, such as "2 class folders (cat, dog)"."""
    noun = singular if len(names) == 1 else plural or singular + "s"
    return f"{len(names)} {noun} ({', '.join(map(shown, names[:5]))}{', ...' if len(names) > 5 else ''})"
