"""The host of the base's classifier: it dispatches to the classifier of the route."""

from __future__ import annotations

from typing import Any

from vispeft.hosts.base import Host

__all__ = ["HeadHost"]


class HeadHost(Host):
    """The classifier at timm's path: it runs the last acting adapter's classifier, or the base's own if none acts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute (B, classes) from features (B, width)."""
        head = self.routing.present().head
        return super().forward(*args, **kwargs) if head is None else head(*args, **kwargs)
