"""Metrics that torchmetrics lacks."""

from vispeft.metrics.boundary import BoundaryF
from vispeft.metrics.classes import ClassScores, known_values, per_class
from vispeft.metrics.explained import ExplainedVariance
from vispeft.metrics.segmentation import Absent, SegmentationScores, mean_over_classes

__all__ = [
    "Absent",
    "BoundaryF",
    "ClassScores",
    "ExplainedVariance",
    "SegmentationScores",
    "known_values",
    "mean_over_classes",
    "per_class",
]
