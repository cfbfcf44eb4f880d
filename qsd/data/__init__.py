"""Data modules for Lightning, and the loaders and samplers that they are made of."""

from qsd.data.base import ImageData
from qsd.data.dataset import ImageArray, ImageDataset, ImageFiles
from qsd.data.digits import DigitsData
from qsd.data.events import DigitEvents, DvsData, EventData, EventFolderData
from qsd.data.image_folder import ImageFolderData
from qsd.data.loading import BadImagePolicy, ImageLoader, TrainLoader
from qsd.data.photographs import PhotographData
from qsd.data.readers import ReaderData
from qsd.data.sampling import EvalSampler, TrainSampler
from qsd.data.torchvision_sets import CifarData, TorchvisionData
from qsd.reading.images import BadImage, load_image
from qsd.reading.splits import stratified_split

__all__ = [
    "BadImage",
    "BadImagePolicy",
    "CifarData",
    "DigitEvents",
    "DigitsData",
    "DvsData",
    "EvalSampler",
    "EventData",
    "EventFolderData",
    "ImageArray",
    "ImageData",
    "ImageDataset",
    "ImageFiles",
    "ImageFolderData",
    "ImageLoader",
    "PhotographData",
    "ReaderData",
    "TorchvisionData",
    "TrainLoader",
    "TrainSampler",
    "load_image",
    "stratified_split",
]
