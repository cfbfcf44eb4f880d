"""Image folders in ImageNet's layout."""

from pathlib import Path
from typing import Any

from qsd.data.base import Part
from qsd.data.class_folders import ClassFolders
from qsd.data.dataset import ImageFiles
from qsd.data.photographs import PhotographData


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
        self._folders = ClassFolders(self.root)

    @property
    def class_names(self) -> list[str]:
        """The name of every class folder, by label."""
        return self._folders.class_names

    def load_part(self, part: Part) -> ImageFiles:
        """List the files of one part.

        Args:
            part: "train", "val" or "test".
        """
        return ImageFiles(*self._folders.list_part(part), self.exif_orientation)
