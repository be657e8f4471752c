"""Metrics that torchmetrics lacks."""

from vispeft.metrics.boundary import BoundaryF
from vispeft.metrics.segmentation import SegmentationScores

__all__ = ["BoundaryF", "SegmentationScores"]
