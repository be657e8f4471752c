"""Plots of metrics and predictions, and looks inside of a model."""

from vispeft.viz.attention import Attention, attention_of, attention_picture, draw_attention, draw_prompts
from vispeft.viz.curves import learning_curves, read_history
from vispeft.viz.heads import head_map
from vispeft.viz.matrix import confusion_matrix
from vispeft.viz.neighbours import Neighbour, NeighbourRow, draw_neighbours
from vispeft.viz.overlays import colour_mask, lay_over, overlay_grid
from vispeft.viz.projection import embedding_plot
from vispeft.viz.reliability import reliability_diagram
from vispeft.viz.shift import Shift, activation_shift, draw_shift
from vispeft.viz.strips import dense_picture, task_strips
from vispeft.viz.values import bars, predicted_against_true

__all__ = [
    "Attention",
    "Neighbour",
    "NeighbourRow",
    "Shift",
    "activation_shift",
    "attention_of",
    "attention_picture",
    "bars",
    "colour_mask",
    "confusion_matrix",
    "dense_picture",
    "draw_attention",
    "draw_neighbours",
    "draw_prompts",
    "draw_shift",
    "embedding_plot",
    "head_map",
    "lay_over",
    "learning_curves",
    "overlay_grid",
    "predicted_against_true",
    "read_history",
    "reliability_diagram",
    "task_strips",
]
