"""The report of an adapter: its parameter counts by role and its size in a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, RenderResult
from rich.table import Table
from rich.text import Text

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """Counts of one adapter, printed as a table."""

    adapter: str
    """Name of the adapter on its model."""
    method: str
    """Registry name of its method."""
    family: str
    """Family of the backbone."""
    trainable: int
    """Trainable parameters, without the classifier."""
    trainable_head: int
    """Trainable parameters of the adapter's classifier."""
    backbone: int
    """Parameters of the backbone, without the classifier."""
    stored_bytes: int
    """Bytes of the adapter's tensors in a file, its classifier's included, without headers."""
    stored_bytes_head: int
    """Bytes of its classifier among them."""
    by_role: dict[str, int]
    """Trainable parameters per role."""
    decoder: int | None = None
    """Parameters of map reader and decoder, which train with the adapter; None without a decoder."""

    criterion: int | None = None
    """Parameters of a criterion, which train and are not stored; None without such a one."""

    @property
    def deployed(self) -> int:
        """Trained parameters that are stored: those of the adapter, of the classifier, and of modules behind it."""
        return self.trainable + self.trainable_head + (self.decoder or 0)

    @property
    def trained(self) -> int:
        """All trained parameters."""
        return self.deployed + (self.criterion or 0)

    @property
    def share(self) -> float:
        """Trainable parameters over those of the backbone."""
        return self.trainable / max(1, self.backbone)

    def to_dict(self) -> dict[str, Any]:
        """Return all counts as plain values."""
        return {**asdict(self), "share": self.share, "deployed": self.deployed, "trained": self.trained}

    def __rich_console__(self, console: Console, _: object) -> RenderResult:
        """Render as a table."""
        table = Table(title=Text(f"Adapter {self.adapter!r}: {self.method} on {self.family}", style="table.title"))
        table.add_column("role")
        table.add_column("parameters", justify="right")
        table.add_column("share of the backbone", justify="right")
        for role, count in self.by_role.items():
            table.add_row(Text(role), f"{count:,}", f"{count / max(1, self.backbone):.3%}")
        table.add_section()
        table.add_row("all roles", f"{self.trainable:,}", f"{self.share:.3%}")
        behind = "decoder" if self.criterion is None else "embedding head"
        name, further = ("head", self.trainable_head) if self.decoder is None else (behind, self.decoder)
        table.add_row(name, f"{further:,}", "")
        if self.criterion is not None:
            table.add_row("criterion (not stored)", f"{self.criterion:,}", "")
        table.add_row("backbone (frozen)", f"{self.backbone:,}", "")
        if self.decoder is None:
            table.add_row("stored bytes", f"{self.stored_bytes:,}", "")
            table.add_row("of them for the head", f"{self.stored_bytes_head:,}", "")
        else:
            table.add_row(f"stored bytes, without {name}", f"{self.stored_bytes:,}", "")
        yield table

    def __str__(self) -> str:
        """Render as text."""
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
