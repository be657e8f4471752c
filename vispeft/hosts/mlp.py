"""The hosts of MLPs: timm's own forward pass, or its layers one by one where streams pass through or start."""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU

from vispeft.hosts.base import Host
from vispeft.hosts.streams import Streams, split

__all__ = ["MLP_HOSTS", "GatedMlpHost", "MlpHost", "SplitMlpHost"]


class MlpHost(Host):
    """An adapted ``Mlp``: two linear layers with an activation between them."""

    fc1: Any
    act: Any
    drop1: Any
    norm: Any
    fc2: Any
    drop2: Any

    def split(self, streams: Streams) -> Streams:
        """Run the MLP on all streams, including those that start inside it.

        Args:
            streams: Normalised tokens (..., D), and streams beside them.
        """
        if not self.acting.carries:
            return streams.each(self)
        hidden = self.hidden(streams).each(self.drop1).each(self.norm)
        return split(self.fc2, hidden).each(self.drop2)

    def hidden(self, streams: Streams) -> Streams:
        """Run the first layer and the activation."""
        return split(self.fc1, streams).each(self.act)


class GatedMlpHost(MlpHost):
    """An adapted ``GluMlp``: one layer computes gate and value."""

    gate_last: bool

    def hidden(self, streams: Streams) -> Streams:
        """Run the first layer and the gate."""
        return split(self.fc1, streams).each(self._gated)

    def _gated(self, both: Any) -> Any:
        first, second = both.chunk(2, dim=-1)
        return first * self.act(second) if self.gate_last else self.act(first) * second


class SplitMlpHost(MlpHost):
    """An adapted ``SwiGLU``: separate layers compute gate and value."""

    fc1_g: Any
    fc1_x: Any

    def hidden(self, streams: Streams) -> Streams:
        """Run both first layers and the gate; a stream that starts in one layer uses the tokens in the other."""
        gate, value = split(self.fc1_g, streams).each(self.act), split(self.fc1_x, streams)
        names = dict.fromkeys([*gate.beside, *value.beside])
        beside = {name: gate.beside.get(name, gate.tokens) * value.beside.get(name, value.tokens) for name in names}
        return Streams(gate.tokens * value.tokens, beside, streams.rules)


MLP_HOSTS: dict[type, type[Host]] = {Mlp: MlpHost, GluMlp: GatedMlpHost, SwiGLU: SplitMlpHost}
"""Hosts of timm's MLPs that several families share."""
