"""Pictures."""

from vispeft.viz.curves import learning_curves, read_history
from vispeft.viz.matrix import confusion_matrix

__all__ = ["confusion_matrix", "learning_curves", "read_history"]
