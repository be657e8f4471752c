"""Losses of metric learning that pytorch-metric-learning lacks."""

from vispeft.losses.base import MetricLoss
from vispeft.losses.hist import Hist
from vispeft.losses.hyperbolic import Hyperbolic
from vispeft.losses.recall_at_k import RecallAtK

__all__ = ["Hist", "Hyperbolic", "MetricLoss", "RecallAtK"]
