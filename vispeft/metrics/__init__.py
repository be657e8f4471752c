"""Metrics that torchmetrics lacks."""

from vispeft.metrics.boundary import BoundaryF
from vispeft.metrics.classes import ClassScores, known_values, per_class
from vispeft.metrics.dense import DenseClasses, Depth, Normals, Saliency, Values, delta_m, dense_metric
from vispeft.metrics.dense_base import DenseMetric
from vispeft.metrics.edges import Edges
from vispeft.metrics.explained import ExplainedVariance
from vispeft.metrics.ranking import nearest
from vispeft.metrics.retrieval import RetrievalScores, clustering_scores, retrieval_scores
from vispeft.metrics.segmentation import Absent, SegmentationScores, mean_over_classes
from vispeft.metrics.similarity import Cosine, Dot, Hyperbolic, Similarity, make_similarity

__all__ = [
    "Absent",
    "BoundaryF",
    "ClassScores",
    "Cosine",
    "DenseClasses",
    "DenseMetric",
    "Depth",
    "Dot",
    "Edges",
    "ExplainedVariance",
    "Hyperbolic",
    "Normals",
    "RetrievalScores",
    "Saliency",
    "SegmentationScores",
    "Similarity",
    "Values",
    "clustering_scores",
    "delta_m",
    "dense_metric",
    "known_values",
    "make_similarity",
    "mean_over_classes",
    "nearest",
    "per_class",
    "retrieval_scores",
]
