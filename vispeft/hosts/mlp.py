"""The host of an MLP: timm's own forward, or its layers one by one where a task branches at one of them."""

from __future__ import annotations

from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU

from vispeft.hosts.base import Host
from vispeft.hosts.streams import Streams, split

__all__ = ["MLP_HOSTS", "GatedMlpHost", "MlpHost", "SplitMlpHost"]


class MlpHost(Host):
    """An adapted ``Mlp``: two layers with an activation in between."""

    fc1: Any
    act: Any
    drop1: Any
    norm: Any
    fc2: Any
    drop2: Any

    def split(self, streams: Streams) -> Streams:
        """Run the MLP on all streams, and on those that start inside it.

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
    """An adapted ``GluMlp``: gate and value come out of one layer."""

    gate_last: bool

    def hidden(self, streams: Streams) -> Streams:
        """Run the first layer and the gate."""
        return split(self.fc1, streams).each(self._gated)

    def _gated(self, both: Any) -> Any:
        first, second = both.chunk(2, dim=-1)
        return first * self.act(second) if self.gate_last else self.act(first) * second


class SplitMlpHost(MlpHost):
    """An adapted ``SwiGLU``: gate and value come out of a layer each."""

    fc1_g: Any
    fc1_x: Any

    def hidden(self, streams: Streams) -> Streams:
        """Run the two first layers and the gate; a stream that starts in one of them reads the tokens in the other."""
        gate, value = split(self.fc1_g, streams).each(self.act), split(self.fc1_x, streams)
        names = dict.fromkeys([*gate.beside, *value.beside])
        beside = {name: gate.beside.get(name, gate.tokens) * value.beside.get(name, value.tokens) for name in names}
        return Streams(gate.tokens * value.tokens, beside, streams.rules)


MLP_HOSTS: dict[type, type[Host]] = {Mlp: MlpHost, GluMlp: GatedMlpHost, SwiGLU: SplitMlpHost}
"""The hosts of timm's MLPs, which several families share."""
