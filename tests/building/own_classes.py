"""Classes as users write them, with names for type checkers alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vispeft.building.known import register_class

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lightning.pytorch import Callback as Hook
    from not_installed import Thing


@register_class
class OwnPart:
    def __init__(
        self,
        sizes: Sequence[int] = (),
        folder: Path | None = None,
        hook: Hook | None = None,
        monitor: str | Hook = "loss",
        hooks: Sequence[str | Hook] = (),
        thing: Thing | None = None,
        count: int = 1,
    ) -> None:
        self.given = (sizes, folder, hook, monitor, hooks, thing, count)


@register_class
@dataclass
class OwnBase:
    sizes: Sequence[int] = ()


@register_class
@dataclass
class OwnRecord(OwnBase):
    thing: Thing | None = None
    hook: Hook | None = None
