"""Data modules, preprocessing and image reading."""

from vispeft.data.augmentation import Augmentation
from vispeft.data.base import BatchSplit, EpochSampler, ImageData, MemorySplit
from vispeft.data.checks import Report, examine
from vispeft.data.digits import DigitsData
from vispeft.data.fgvc import FgvcData
from vispeft.data.folder import ImageFolderData
from vispeft.data.images import ImageFiles, find_images, read_image
from vispeft.data.listed import ImageSplit, ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, Published
from vispeft.data.lists import ImageListData, JsonData
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.shards import WebDatasetData
from vispeft.data.torchvision_sets import TorchvisionData
from vispeft.data.vtab import Vtab1kData

__all__ = [
    "Augmentation",
    "BatchSplit",
    "DigitsData",
    "EpochSampler",
    "FgvcData",
    "Finding",
    "ImageData",
    "ImageFiles",
    "ImageFolderData",
    "ImageListData",
    "ImageSplit",
    "JsonData",
    "ListedData",
    "ListedSplit",
    "Listing",
    "MemorySplit",
    "Preprocessing",
    "Published",
    "Report",
    "TorchvisionData",
    "Vtab1kData",
    "WebDatasetData",
    "examine",
    "find_images",
    "read_image",
]
