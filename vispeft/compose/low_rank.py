"""Terms of low rank ``B A``: their exact sum, and their best approximation of a lower rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Term", "compress", "concatenate", "decompose", "pad"]


class Term(NamedTuple):
    """A term ``B A`` without a further multiplier."""

    a: Tensor
    """(rank, in)."""
    b: Tensor
    """(rows, rank)."""

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return int(self.a.shape[0])

    def product(self) -> Tensor:
        """Return ``B A``, (rows, in)."""
        return self.b @ self.a


def concatenate(terms: Sequence[Term], weights: Sequence[float]) -> Term:
    """Add terms exactly: ``A = [A_1; A_2]``, ``B = [c_1 B_1, c_2 B_2]``, of rank ``r_1 + r_2``.

    Args:
        terms: Terms of one layer.
        weights: One number for each.
    """
    scaled = [weight * term.b for term, weight in zip(terms, weights, strict=True)]
    return Term(torch.cat([term.a for term in terms]), torch.cat(scaled, dim=1))


def compress(term: Term, rank: int) -> tuple[Term, float, float]:
    """Approximate a term by one of lower rank, the best one in the Frobenius norm (Eckart and Young, 1936).

    The product is never formed: with ``B = Q R`` and ``A^T = P S`` (QR), the singular values of ``B A`` are those of
    the small matrix ``R S^T``.

    Args:
        term: The term.
        rank: Largest rank of the result.

    Returns:
        The term, with singular values split evenly between the factors; the sum of squares of the kept singular values;
        and that of all.
    """
    q, r = torch.linalg.qr(term.b)
    p, s = torch.linalg.qr(term.a.t())
    u, values, v = torch.linalg.svd(r @ s.t(), full_matrices=False)
    return _truncated(q @ u, values, v @ p.t(), rank)


def decompose(change: Tensor, rank: int) -> tuple[Term, float, float]:
    """Approximate a matrix by a term of low rank; see `compress`.

    Args:
        change: (rows, in).
        rank: Largest rank of the result.
    """
    u, values, v = torch.linalg.svd(change, full_matrices=False)
    return _truncated(u, values, v, rank)


def _truncated(u: Tensor, values: Tensor, v: Tensor, rank: int) -> tuple[Term, float, float]:
    energy, kept = values.square(), values[:rank]
    root = kept.sqrt()
    term = Term(root[:, None] * v[:rank], u[:, :rank] * root)
    return term, float(energy[:rank].sum()), float(energy.sum())


def pad(term: Term, rank: int) -> Term:
    """Add rows and columns of zeros up to a rank, which leave the product as it is.

    Args:
        term: The term.
        rank: A rank not below the term's own.
    """
    more = rank - term.rank
    return Term(
        torch.cat([term.a, term.a.new_zeros(more, term.a.shape[1])]), torch.nn.functional.pad(term.b, (0, more))
    )
