"""The bytes that requests hold at the same time, up to a bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Place", "Room"]


class Room:
    """Bytes of images that were received and not answered yet. It belongs to one event loop."""

    def __init__(self, most: int) -> None:
        """Begin with nothing held.

        Args:
            most: The bound, in bytes.
        """
        self.most, self.held = most, 0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """Hold bytes for one request, which are free again behind the ``with`` block.

        Yields:
            The request's place, empty at first.
        """
        place = Place(self)
        try:
            yield place
        finally:
            place.holds(0)


class Place:
    """What one request holds."""

    def __init__(self, room: Room) -> None:
        """Begin empty.

        Args:
            room: The room of all requests.
        """
        self.room, self.own = room, 0

    def fits(self, size: int) -> bool:
        """Return whether there is room for so many bytes of this request.

        Args:
            size: All bytes of the request.
        """
        return self.room.held - self.own + size <= self.room.most

    def holds(self, size: int) -> bool:
        """Hold so many bytes in place of those before, if there is room.

        Args:
            size: All bytes of the request.

        Returns:
            Whether there is room; if not, nothing changes.
        """
        if not self.fits(size):
            return False
        self.room.held += size - self.own
        self.own = size
        return True
