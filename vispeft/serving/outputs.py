"""Answers as JSON: what the scores of an adapter mean, by the notes in its file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vispeft.data.images import Reading
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError

__all__ = ["Meaning"]

_TARGETS = ("class", "multilabel", "regression")


class Meaning:
    """How an adapter's images are prepared, and its scores read."""

    def __init__(self, name: str, notes: Mapping[str, Any], top: int = 5) -> None:
        """Read the notes of an adapter.

        Args:
            name: The adapter.
            notes: Its notes.
            top: Number of likeliest classes in an answer.

        Raises:
            ConfigError: If its outputs are no scores of one image, or its file does not say how images are prepared.
        """
        output = notes.get("output") or {}
        self.target = output.get("target", "class")
        if self.target not in _TARGETS:
            raise ConfigError(
                f"Adapter {name!r} gives {self.target!r}, and the HTTP server answers with classes, labels or numbers. "
                "Use vispeft predict, embed or vispeft.serve in Python."
            )
        if not notes.get("preprocessing"):
            raise ConfigError(f"The file of adapter {name!r} does not say how images are prepared; save it from a run.")
        self.names: list[str] = list(notes.get("class_names") or ())
        self.temperature, self.top = float(output.get("temperature", 1.0)), top
        self.mean, self.deviation = output.get("mean"), output.get("deviation")
        self.reading = Reading.from_notes(notes)
        preprocessing = Preprocessing.from_dict(notes["preprocessing"])
        self.prepare, self.least = preprocessing.transform(), preprocessing.least
        self.bytes = 3 * 4 * math.prod(preprocessing.size)
        """Bytes of a prepared image: three channels of float32."""

    def reading_up_to(self, pixels: int) -> Reading:
        """Return how pixels become RGB, for images of at most so many pixels.

        Args:
            pixels: The most pixels.
        """
        return replace(self.reading, max_pixels=min(self.reading.max_pixels, pixels))

    def read(self, scores: Tensor) -> dict[str, Any] | None:
        """Turn the scores of one image into plain values.

        Args:
            scores: (outputs,).

        Returns:
            The answer; None if a score is not finite.
        """
        scores = scores.detach().float().cpu()
        if not scores.isfinite().all():
            return None
        names = self.names or [str(number) for number in range(len(scores))]
        if self.target == "class":
            shares, places = (scores / self.temperature).softmax(0).topk(min(self.top, len(scores)))
            pairs = zip(places.tolist(), shares.tolist(), strict=True)
            classes = [{"class": names[place], "probability": share} for place, share in pairs]
            return {"class": classes[0]["class"], "probability": classes[0]["probability"], "classes": classes}
        names = _numbered(names)
        if self.target == "multilabel":
            shares = dict(zip(names, scores.sigmoid().tolist(), strict=True))
            return {"labels": [name for name, share in shares.items() if share >= 0.5], "probabilities": shares}
        values = scores.tolist()
        if self.mean is not None and self.deviation is not None:
            values = [v * d + m for v, d, m in zip(values, self.deviation, self.mean, strict=True)]
        return {"values": dict(zip(names, values, strict=True))}


def _numbered(names: Sequence[str]) -> list[str]:
    """Number further ones of equal names, as labels are the keys of an answer."""
    found: dict[str, None] = {}
    for name in names:
        number, own = 1, name
        while own in found:
            number += 1
            own = f"{name} ({number})"
        found[own] = None
    return list(found)
