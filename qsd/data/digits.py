"""The handwritten digits that scikit-learn ships: real images without a download."""

from typing import Literal

from torchvision import transforms
from torchvision.transforms import InterpolationMode

from qsd.data.base import ImageData, Part
from qsd.data.dataset import ImageArray, Transform
from qsd.errors import QsdError
from qsd.reading.digits import SIZES, read_digits
from qsd.reading.splits import stratified_split


class DigitsData(ImageData):
    """1,797 handwritten digits of 8x8 pixels, enlarged; 1,197 to train, 200 to validate, 400 to test.

    The parts are fixed and hold every class in proportion. Training images are turned by up to 10 degrees, scaled by
    up to 10 %, and shifted by up to 6 % of the side (half a pixel of the original). Everything is in memory; loading in
    the training process is the fastest.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.

    Args:
        img_size: Height and width in pixels; one number for a square.
        batch_size: Images per step and process.
        num_workers: Loading processes per training process; 0 loads in the training process, None chooses the number
            of cores per training process, at most 8.
        in_chans: 1, or 3 equal channels for a model of colour images.
        seed: Seed of order and augmentation, not of the split; None takes that of ``seed_everything``, or 0.
        train_images: Use only so many of the training images, every class in proportion; None uses all. Validation and
            test stay as they are.
        train_subset: Which of the possible choices of ``train_images``; another number gives another one.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        batch_size: int = 64,
        num_workers: int | None = 0,
        in_chans: Literal[1, 3] = 1,
        seed: int | None = None,
        train_images: int | None = None,
        train_subset: int = 0,
    ) -> None:
        super().__init__(img_size, batch_size, num_workers, seed)
        if train_images is not None and not 1 <= train_images <= SIZES["train"]:
            raise QsdError(f"train_images={train_images} is not from 1 to {SIZES['train']}.")
        self.train_images, self.train_subset = train_images, train_subset
        if in_chans not in (1, 3):
            raise QsdError(f"in_chans={in_chans} is unknown; choose 1 (grey) or 3 (three equal channels).")
        self.in_chans = in_chans
        self._parts: dict[Part, ImageArray] = {}

    @property
    def class_names(self) -> list[str]:
        """The digits "0" to "9"."""
        return [str(digit) for digit in range(10)]

    def load_part(self, part: Part) -> ImageArray:
        """Enlarge and split the digits, once; the mean and standard deviation are those of the training part.

        Args:
            part: "train", "val" or "test".
        """
        if not self._parts:
            images, labels = read_digits(*self.img_size)
            for name, indices in zip(SIZES, stratified_split(labels, list(SIZES.values()))):
                if name == "train" and self.train_images is not None:
                    (chosen,) = stratified_split(labels[indices], [self.train_images], self.train_subset)
                    indices = indices[chosen]
                names = [f"digit {index}" for index in indices]
                self._parts[name] = ImageArray(images[indices], labels[indices], names)
                if name == "train":
                    self.mean = (float(images[indices].mean() / 255),) * self.in_chans
                    self.std = (float(images[indices].std() / 255),) * self.in_chans
        return self._parts[part]

    def train_transform(self) -> Transform:
        """See `ImageData`."""
        # No flip: a mirrored digit is another sign or no digit.
        affine = transforms.RandomAffine(
            degrees=10, translate=(0.06, 0.06), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR
        )
        return transforms.Compose([affine, self.eval_transform()])

    def eval_transform(self) -> Transform:
        """See `ImageData`."""
        channels = transforms.Grayscale(self.in_chans)
        return transforms.Compose([channels, transforms.ToTensor(), transforms.Normalize(self.mean, self.std)])
