"""Pictures."""

from vispeft.viz.curves import learning_curves, read_history
from vispeft.viz.matrix import confusion_matrix
from vispeft.viz.reliability import reliability_diagram
from vispeft.viz.values import bars, predicted_against_true

__all__ = [
    "bars",
    "confusion_matrix",
    "learning_curves",
    "predicted_against_true",
    "read_history",
    "reliability_diagram",
]
