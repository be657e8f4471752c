"""Losses between embeddings and proxies that are given from outside."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Pull", "proxy_loss"]

Pull = Literal["all", "present"]
"""Divisor of the positive term: the number of all columns, or of those with a positive."""


def proxy_loss(
    embeddings: Tensor,
    proxies: Tensor,
    labels: Tensor,
    *,
    kind: Literal["anchor", "nca"] = "anchor",
    alpha: float = 32.0,
    margin: float = 0.1,
    pull: Pull = "all",
) -> Tensor:
    """Compute the Proxy-Anchor loss, or its form over samples, for proxies that need not be leaves.

    With cosine similarities s of sample j and proxy c, the loss is ``mean(log(1 + sum over positives of
    exp(-alpha (s - margin)))) + mean(log(1 + sum over negatives of exp(alpha (s + margin))))``. ``anchor`` sums over
    samples and takes the mean over proxies, ``nca`` sums over proxies and takes the mean over samples. Proxy-Anchor
    (Kim et al., CVPR 2020, arXiv 2003.13911, equation 4) divides the positive term by the number of classes present
    (``pull="present"``); VPTSP's public code (Noahsark/ParameterEfficient-DML c7c9416) by that of all.

    Args:
        embeddings: (B, d), of any length.
        proxies: (C, d), of any length.
        labels: Row of `proxies` of each embedding, int64 (B).
        kind: Where the sum and the mean are.
        alpha: Scale of the similarities; 32 in both papers.
        margin: Margin; 0.1 in both papers.
        pull: Divisor of the positive term.

    Returns:
        A scalar, float32 or wider.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        scores = F.normalize(_wide(embeddings), dim=1) @ F.normalize(_wide(proxies), dim=1).T
        positive = F.one_hot(labels, len(proxies)).bool()
        over = 0 if kind == "anchor" else 1
        near = _log1p_sum(-alpha * (scores - margin), positive, over)
        far = _log1p_sum(alpha * (scores + margin), ~positive, over)
        divisor = positive.any(over).sum() if pull == "present" else torch.tensor(len(near))
        return near.sum() / divisor.to(near) + far.mean()


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _log1p_sum(logits: Tensor, chosen: Tensor, over: int) -> Tensor:
    """Compute ``log(1 + sum of exp)`` over the chosen entries of an axis; 0 where none is chosen."""
    masked = logits.masked_fill(~chosen, float("-inf"))
    zero = masked.new_zeros(()).expand_as(masked.select(over, 0)).unsqueeze(over)
    return torch.cat([masked, zero], dim=over).logsumexp(over)
