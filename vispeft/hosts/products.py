"""Products of matrices outside autograd, in the order of operands and by the operations that are fastest."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SMALL", "add_product", "as_rows", "outer", "product", "rows_as", "times_narrow"]

SMALL = 2**14
"""Entries below which a product and a sum are two operations."""
ONEDNN_WORK = 2**22
"""Products of numbers from which oneDNN's call, 15 microseconds longer, pays."""
TALL = 64
"""Rows from which the order of operands matters."""
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def as_rows(x: Tensor) -> Tensor:
    """Return (..., channels) as a matrix."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def rows_as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (..., channels) as a matrix of a type."""
    rows = as_rows(x)
    return rows if rows.dtype == dtype else rows.to(dtype)


def _is_tall(rows: Tensor) -> bool:
    """Return whether operand orders matter: with 8 columns, a CPU's BLAS is up to 7 times slower on the other one."""
    return rows.device.type == "cpu" and rows.shape[0] >= TALL


def times_narrow(rows: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute ``scale * rows B``, (rows, rank)."""
    b = b if scale == 1 else b * scale
    return F.linear(rows, b.t().contiguous()) if _is_tall(rows) else rows @ b


def outer(part: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Compute ``scale * part^T hidden``, (out, rank)."""
    product = (hidden.t() @ part).t() if _is_tall(part) else part.t() @ hidden
    return product if scale == 1 else product.mul_(scale)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x M + b`` of two matrices outside autograd.

    In float32 on a CPU this calls oneDNN, as PyTorch does for compiled linear layers: at the sizes of a ViT-S it is
    faster than `torch.addmm`. Small products take less time than its call.
    """
    large = x.shape[0] * matrix.numel() >= ONEDNN_WORK
    if large and _ONEDNN is not None and x.dtype == torch.float32 and x.device.type == "cpu":
        return cast(Tensor, _ONEDNN(x, matrix.t(), bias, "none", [], ""))
    return x @ matrix if bias is None else torch.addmm(bias, x, matrix)


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add ``scale * left right`` to a matrix in place.

    Of small matrices on a CPU the product in reduced precision is fast alone, and slow with the sum.
    """
    if out.numel() < SMALL and out.device.type == "cpu":
        out.add_(torch.mm(left, right), alpha=scale)
    else:
        out.addmm_(left, right, alpha=scale)
