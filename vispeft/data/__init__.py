"""Data modules, preprocessing and image reading."""

from vispeft.data.ade20k import ADE20KData
from vispeft.data.augmentation import Augmentation
from vispeft.data.base import BatchSplit, EpochSampler, ImageData, MemorySplit
from vispeft.data.cars import CarsMetricData
from vispeft.data.checks import Report, examine
from vispeft.data.cityscapes import CityscapesData
from vispeft.data.cub import CUBMetricData
from vispeft.data.dense_targets import DenseTarget
from vispeft.data.digits import DigitsData
from vispeft.data.earth import EarthData
from vispeft.data.earth_tasks import EarthMultiTaskData
from vispeft.data.emoji import EmojiData
from vispeft.data.fgvc import FgvcData
from vispeft.data.folder import ImageFolderData
from vispeft.data.images import ImageFiles, find_images, read_image
from vispeft.data.inaturalist import INaturalistMetricData
from vispeft.data.inshop import InShopMetricData
from vispeft.data.joint import MaskAugmentation
from vispeft.data.joint_tasks import TaskAugmentation
from vispeft.data.listed import ImageSplit, ListedData
from vispeft.data.listing import Finding, ListedSplit, Listing, Published
from vispeft.data.lists import ImageListData, JsonData
from vispeft.data.masks import IGNORE, ListedMasks, MaskCoding
from vispeft.data.metric_data import MetricData
from vispeft.data.metric_own import MetricFolderData, MetricListData
from vispeft.data.multitask import MultiTaskData
from vispeft.data.nyud_mt import NyudMultiTaskData
from vispeft.data.pascal_mt import PascalMultiTaskData
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.products import SOPMetricData
from vispeft.data.scene_tasks import SceneMultiTaskData
from vispeft.data.scenes import Scene, ScenesData, render_scene
from vispeft.data.segmentation import MaskFolderData, SegmentationData, list_masks
from vispeft.data.shards import WebDatasetData
from vispeft.data.task_folder import TaskFolderData, TaskLabels
from vispeft.data.torchvision_sets import TorchvisionData
from vispeft.data.voc import PascalContextData, VOCData
from vispeft.data.vtab import Vtab1kData

__all__ = [
    "IGNORE",
    "ADE20KData",
    "Augmentation",
    "BatchSplit",
    "CUBMetricData",
    "CarsMetricData",
    "CityscapesData",
    "DenseTarget",
    "DigitsData",
    "EarthData",
    "EarthMultiTaskData",
    "EmojiData",
    "EpochSampler",
    "FgvcData",
    "Finding",
    "INaturalistMetricData",
    "ImageData",
    "ImageFiles",
    "ImageFolderData",
    "ImageListData",
    "ImageSplit",
    "InShopMetricData",
    "JsonData",
    "ListedData",
    "ListedMasks",
    "ListedSplit",
    "Listing",
    "MaskAugmentation",
    "MaskCoding",
    "MaskFolderData",
    "MemorySplit",
    "MetricData",
    "MetricFolderData",
    "MetricListData",
    "MultiTaskData",
    "NyudMultiTaskData",
    "PascalContextData",
    "PascalMultiTaskData",
    "Preprocessing",
    "Published",
    "Report",
    "SOPMetricData",
    "Scene",
    "SceneMultiTaskData",
    "ScenesData",
    "SegmentationData",
    "TaskAugmentation",
    "TaskFolderData",
    "TaskLabels",
    "TorchvisionData",
    "VOCData",
    "Vtab1kData",
    "WebDatasetData",
    "examine",
    "find_images",
    "list_masks",
    "read_image",
    "render_scene",
]
