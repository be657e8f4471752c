"""Data modules, preprocessing and image reading."""

from vispeft.data.base import EpochSampler, ImageData, MemorySplit
from vispeft.data.digits import DigitsData
from vispeft.data.images import ImageFiles, find_images, read_image
from vispeft.data.preprocessing import Preprocessing

__all__ = [
    "DigitsData",
    "EpochSampler",
    "ImageData",
    "ImageFiles",
    "MemorySplit",
    "Preprocessing",
    "find_images",
    "read_image",
]
