"""Plots of embeddings in two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vispeft.errors import ConfigError, DataError
from vispeft.viz.names import drawn_names, settings_for
from vispeft.viz.style import save

__all__ = ["embedding_plot"]

_MOST_POINTS = 2000
"""Points above which some are drawn at random: t-SNE takes minutes, and points cover each other."""
_MOST_NAMED = 20
"""Classes above which the legend is left out; colours repeat then."""
_PERPLEXITY = 30
"""scikit-learn's default, lowered for few points."""


def embedding_plot(
    embeddings: Tensor,
    labels: Tensor,
    path: str | Path,
    names: Sequence[str] | None = None,
    method: Literal["pca", "tsne"] = "pca",
    seed: int = 0,
) -> Path:
    """Draw embeddings as points in two dimensions, coloured by class.

    Args:
        embeddings: (N, d), prepared as they are compared: of length one for the cosine.
        labels: Integer labels (N,).
        path: The PNG file to write.
        names: Name of each label, for the legend of up to 20 classes; None for numbers.
        method: ``pca``, the two directions of largest variance, with their shares; or ``tsne``, which keeps neighbours
            together and takes longer.
        seed: Seed of t-SNE, and of the choice among more than 2,000 points.

    Returns:
        The PNG file.

    Raises:
        ConfigError: If there is no such method.
        DataError: If there are fewer than three embeddings, labels do not fit, or values are not finite.
        FileError: If the picture cannot be written.
    """
    if method not in ("pca", "tsne"):
        raise ConfigError(f"method={method!r}: choose 'pca' or 'tsne'.")
    if embeddings.ndim != 2 or len(embeddings) < 3 or len(labels) != len(embeddings):
        raise DataError(
            f"Embeddings of the shape {tuple(embeddings.shape)} and {len(labels)} labels were given; (N, d) with N "
            "labels, at least 3, is needed."
        )
    if not embeddings.isfinite().all():
        raise DataError("Some of the embeddings are not finite, so they cannot be drawn. Did the training diverge?")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:_MOST_POINTS]
    classes, numbers = labels.cpu().unique(return_inverse=True)
    points, axes_names = _project(embeddings.detach().float().cpu()[chosen].numpy(), method, seed)
    colours = matplotlib.colormaps["tab20"]
    shown = drawn_names([str(label) if names is None else names[label] for label in classes.tolist()])
    with matplotlib.rc_context(settings_for(shown)):
        figure = Figure(figsize=(6.5, 5), layout="constrained")
        axes = figure.subplots()
        own = numbers[chosen].numpy()
        area = min(40.0, max(8.0, 2000 / len(chosen)))  # few points are large enough to tell their colours
        for number, name in enumerate(shown):
            rows = own == number
            axes.scatter(*points[rows].T, s=area, color=colours(number % 20), linewidths=0, label=name)
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.set_title(f"{len(chosen):,} of {len(labels):,} embeddings, {len(classes):,} classes", fontsize=10)
        if len(classes) <= _MOST_NAMED:
            figure.legend(loc="outside right upper", fontsize=8, markerscale=2)
        return save(figure, path)


def _project(rows: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Compute points (N, 2) of embeddings (N, d), and the names of the axes."""
    if method == "tsne":
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits

        perplexity = min(_PERPLEXITY, (len(rows) - 1) / 3)
        with threadpool_limits(
            1
        ):  # it has a thousand short steps, in which threads of a busy machine wait for each other
            points = TSNE(perplexity=perplexity, init="random", random_state=seed).fit_transform(rows)
        return points, ("t-SNE 1", "t-SNE 2")
    from sklearn.decomposition import PCA

    wide = rows if rows.shape[1] > 1 else np.pad(rows, ((0, 0), (0, 1)))
    found = PCA(2, svd_solver="full").fit(wide)
    first, second = (f"component {i + 1} ({share:.0%})" for i, share in enumerate(found.explained_variance_ratio_))
    return found.transform(wide), (first, second)
