"""Metrics that torchmetrics lacks."""

from vispeft.metrics.boundary import BoundaryF
from vispeft.metrics.classes import ClassScores, known_values, per_class
from vispeft.metrics.dense import DenseClasses, Depth, Normals, Saliency, Values, delta_m, dense_metric
from vispeft.metrics.dense_base import DenseMetric
from vispeft.metrics.edges import Edges
from vispeft.metrics.explained import ExplainedVariance
from vispeft.metrics.segmentation import Absent, SegmentationScores, mean_over_classes

__all__ = [
    "Absent",
    "BoundaryF",
    "ClassScores",
    "DenseClasses",
    "DenseMetric",
    "Depth",
    "Edges",
    "ExplainedVariance",
    "Normals",
    "Saliency",
    "SegmentationScores",
    "Values",
    "delta_m",
    "dense_metric",
    "known_values",
    "mean_over_classes",
    "per_class",
]
