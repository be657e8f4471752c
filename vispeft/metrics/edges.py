"""F1 of predicted edges against labelled ones, at the threshold that is best for a whole split."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.data.thinning import thin
from vispeft.errors import ConfigError
from vispeft.metrics.boundary import NONE, near
from vispeft.metrics.dense_base import DenseMetric

__all__ = ["Edges"]


class Edges(DenseMetric):
    """F1 of edge pixels within a tolerance, at the best threshold of the split (ODS F).

    Predicted edges are the pixels whose probability is above a threshold (0.05, 0.10, ..., 0.95), thinned to lines of
    one pixel. Precision is the share of them with a labelled edge pixel within the tolerance, recall the share of
    labelled edge pixels with a predicted one, both over all images of the split together; ``odsf`` is F1 at the
    threshold where it is largest. Pixels without a label hold no predicted edge. Labels are taken as they are.

    This is an evaluator of its own, and its figures are not those of the multi-task papers. They use a MATLAB program
    (`seism`, with ``correspondPixels`` of Martin et al., PAMI 2004), which does not thin, assigns predicted and
    labelled pixels one to one, and tries 99 thresholds. There, a line that is too wide costs precision since its pixels
    lack partners; here it is thinned, as in the benchmark of Martin et al., and one labelled pixel may confirm several
    predicted ones. Tolerances below one pixel count as one pixel.
    """

    higher_is_better = True
    main = "odsf"

    THRESHOLDS = tuple(step / 20 for step in range(1, 20))
    """Probabilities above which a pixel counts as predicted."""

    COUNTS: ClassVar = {**dict.fromkeys(("predicted", "right", "met"), (len(THRESHOLDS),)), "labelled": ()}

    predicted: Tensor
    right: Tensor
    met: Tensor
    labelled: Tensor

    def __init__(self, target: DenseTarget, name: str, *, tolerance: float = 0.0075, **settings: Any) -> None:
        """Create the metric without images.

        Args:
            target: Description of the task.
            name: Name of the task, for messages.
            tolerance: Largest distance between matching pixels as a fraction of the image's diagonal, at least one
                pixel; 0.0075 as in the benchmark of Martin et al.
            settings: Settings of `torchmetrics.Metric`.

        Raises:
            ConfigError: If the tolerance is out of range.
        """
        super().__init__(target, name, **settings)
        if not 0 <= tolerance < 1:
            raise ConfigError(f"Edges(tolerance={tolerance}): a share of the diagonal, 0 to below 1, is needed.")
        self.tolerance = tolerance

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Count the edge pixels of each image (B, 1, h, w) at all thresholds."""
        thresholds = outputs.new_tensor(self.THRESHOLDS)[:, None, None]
        radius = max(1.0, self.tolerance * math.hypot(*labels.shape[-2:]))
        for logits, label in zip(outputs[:, 0], labels[:, 0], strict=True):
            known = label != IGNORE
            found = as_contour(thin((logits.sigmoid() > thresholds) & known))
            wanted = as_contour((label >= 0.5) & known).expand_as(found)
            self.predicted += (found != NONE).sum((1, 2))
            self.right += near(found, wanted, radius).sum((1, 2))
            self.met += near(wanted, found, radius).sum((1, 2))
            self.labelled += (wanted[0] != NONE).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return ``odsf``, from 0 to 1, and its ``threshold``; NaN if no edge was labelled."""
        precision = self.right / self.predicted.clamp_min(1)
        recall = self.met / self.labelled.clamp_min(1)
        f1 = 2 * precision * recall / (precision + recall).clamp_min(torch.finfo(precision.dtype).tiny)
        best = f1.argmax()
        measured = self.labelled > 0
        return {
            "odsf": f1[best].where(measured, math.nan),
            "threshold": f1.new_tensor(self.THRESHOLDS)[best].where(measured, math.nan),
        }


def as_contour(edges: Tensor) -> Tensor:
    """Write booleans as a map of contours of one class, in bytes.

    Args:
        edges: Whether each pixel is on an edge.
    """
    return torch.zeros_like(edges, dtype=torch.uint8).masked_fill(~edges, NONE)
