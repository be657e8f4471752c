"""Whether code becomes part of a graph."""

from __future__ import annotations

from torch.compiler import is_dynamo_compiling, is_exporting

__all__ = ["in_graph"]


def in_graph() -> bool:
    """Return whether the calling code is traced by `torch.compile` or `torch.export`.

    `torch.compiler.is_compiling` answers for the whole process: while one thread compiles, it is true also in a thread
    that runs the model as it is.
    """
    return is_dynamo_compiling() or is_exporting()
