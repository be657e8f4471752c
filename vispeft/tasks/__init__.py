"""Lightning modules that train adapters, with their schedules and callbacks."""

from vispeft.tasks.base import AdapterTask
from vispeft.tasks.callbacks import FiniteGuard, PlainProgress, progress_bar
from vispeft.tasks.checkpoints import Cadence, RunCheckpoints, SealedCheckpointIO, find_checkpoint
from vispeft.tasks.classification import Classification
from vispeft.tasks.dense import DenseTask
from vispeft.tasks.dense_losses import DenseLoss, dense_loss
from vispeft.tasks.head_start import HeadStart
from vispeft.tasks.inference import Inference, predict_masks
from vispeft.tasks.layer_schedules import LayerSchedule, ProgressiveLayers, TensorDecay
from vispeft.tasks.losses import SegmentationLoss
from vispeft.tasks.metric_learning import MetricLearning
from vispeft.tasks.metric_losses import list_metric_losses, list_miners, metric_loss, metric_miner
from vispeft.tasks.multilabel import MultiLabel
from vispeft.tasks.multitask import MultiTaskDense
from vispeft.tasks.predictions import Prediction, Predictor
from vispeft.tasks.refit import refit_head
from vispeft.tasks.regression import Regression
from vispeft.tasks.sampled_layers import SampledLayers
from vispeft.tasks.schedules import warmup_cosine, warmup_factor
from vispeft.tasks.segmentation import Segmentation, SegmentationNetwork
from vispeft.tasks.supervised import SupervisedTask
from vispeft.tasks.task_network import MultiTaskNetwork
from vispeft.tasks.task_weights import TaskWeights, task_weights
from vispeft.tasks.trackers import TrackioLogger

__all__ = [
    "AdapterTask",
    "Cadence",
    "Classification",
    "DenseLoss",
    "DenseTask",
    "FiniteGuard",
    "HeadStart",
    "Inference",
    "LayerSchedule",
    "MetricLearning",
    "MultiLabel",
    "MultiTaskDense",
    "MultiTaskNetwork",
    "PlainProgress",
    "Prediction",
    "Predictor",
    "ProgressiveLayers",
    "Regression",
    "RunCheckpoints",
    "SampledLayers",
    "SealedCheckpointIO",
    "Segmentation",
    "SegmentationLoss",
    "SegmentationNetwork",
    "SupervisedTask",
    "TaskWeights",
    "TensorDecay",
    "TrackioLogger",
    "dense_loss",
    "find_checkpoint",
    "list_metric_losses",
    "list_miners",
    "metric_loss",
    "metric_miner",
    "predict_masks",
    "progress_bar",
    "refit_head",
    "task_weights",
    "warmup_cosine",
    "warmup_factor",
]
