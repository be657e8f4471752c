"""The bundle that passes through a block: the tokens, and named streams of rows beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vispeft.core.streams import StreamRule
from vispeft.hosts.token_merging import Merged

__all__ = ["Streams", "split"]

_NONE: Mapping[str, Any] = {}


class Streams(NamedTuple):
    """The tokens of a block and the streams beside them. Blocks take and return one bundle and share no other state.

    Streams hold rows (B, R, D), or maps of the tokens' shape.
    """

    tokens: Tensor
    """The residual stream, (B, N, D) or a map (B, H, W, D)."""
    beside: Mapping[str, Tensor] = _NONE
    """Further streams by name."""
    rules: Mapping[str, StreamRule] = _NONE
    """How the block's attention treats each stream, including those that start inside the block."""
    whole: bool = False
    """Whether all tokens pass through the block's MLP, whatever its units decide."""
    passed: Tensor | None = None
    """What the units of the block decided of each patch token, see `ParallelUnit.passes`."""
    merged: Merged | None = None
    """At the input and the output of a block: which patches its tokens were merged from."""

    def changed(self, **fields: Any) -> Streams:
        """Return a bundle with other values in some fields; torch 2.11 cannot compile `_replace`.

        Args:
            **fields: The values.
        """
        values: list[Any] = [fields.get(name, value) for name, value in zip(self._fields, self, strict=True)]
        return Streams(*values)

    def each(self, change: Callable[[Tensor], Tensor]) -> Streams:
        """Apply a function that acts on each row independently, such as a norm, a layer scale or an MLP.

        Args:
            change: The function.
        """
        tokens, beside, rules = self.tokens, self.beside, self.rules
        return Streams(change(tokens), {name: change(x) for name, x in beside.items()} if beside else _NONE, rules)

    def plus(self, added: Streams, *terms: Streams) -> Streams:
        """Add the output of a branch, and further terms, to the residual streams.

        A stream that is new in `added` starts as a copy of the tokens. A stream missing in `added` passes through
        unchanged if its rule neither reads nor is seen, and ends otherwise.

        Args:
            added: The output of the branch.
            *terms: Further terms, of some or all streams.
        """
        if not (self.beside or added.beside):
            tokens = self.tokens
            for term in (added, *terms):
                tokens = tokens + term.tokens
            return Streams(tokens, _NONE, self.rules)
        passing = {name: x for name, x in self.beside.items() if not any(self.rules[name])}
        starts = {name: self.beside.get(name, self.tokens) for name in added.beside}
        sums = {**passing, **starts}
        tokens = self.tokens
        for term in (added, *terms):
            tokens = tokens + term.tokens
            sums.update({name: sums[name] + x for name, x in term.beside.items() if name in sums})
        return Streams(tokens, sums, self.rules)


def split(module: Any, streams: Streams) -> Streams:
    """Run a layer or an MLP on a bundle; branch units inside it add new streams.

    Args:
        module: The module.
        streams: Its inputs.
    """
    run = getattr(module, "split", None)
    return streams.each(module) if run is None else run(streams)
