"""The settings of token merging: how many tokens each block of a model merges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vispeft.errors import ConfigError, counted

__all__ = ["TokenMerging"]


@dataclass(frozen=True)
class TokenMerging:
    """Token merging (ToMe, arXiv 2210.09461): each block averages pairs of patch tokens with similar keys.

    Behind the attention of each block, every second patch token finds the other token with the most similar key; the
    most similar pairs become one token each. Later blocks then compute fewer tokens, which saves time and activations.
    """

    r: int | list[int] = 0
    """Tokens that each block merges away, or a list with one number per block; missing ones at its end are 0. A block
    merges at most half of its patch tokens. 0 switches token merging off."""
    inflection: float = 0.0
    """Slope over the blocks, from -1 to 1: block i of n merges ``r (1 - inflection) + 2 r inflection i / (n - 1)``, cut
    to an integer; -1 falls from 2 r to 0, and 1 rises from 0 to 2 r (public code, facebookresearch/ToMe)."""
    proportional_attention: bool = True
    """Whether the attention weighs a key by the number of patches in its token. The authors use it for models trained
    without merging, and advise against it in training and for models of masked autoencoding."""

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: If one is of another type or out of range.
        """
        if isinstance(self.r, tuple):
            object.__setattr__(self, "r", list(self.r))
        counts = self.r if isinstance(self.r, list) else [self.r]
        if any(type(count) is not int or count < 0 for count in counts):
            raise ConfigError(
                f"Token merging was asked for with r={self.r!r}; give the tokens to merge per block, a whole number "
                "from 0 on, or a list of them."
            )
        slope = self.inflection
        if isinstance(slope, bool) or not isinstance(slope, int | float) or not math.fabs(slope) <= 1:
            raise ConfigError(f"Token merging was asked for with inflection={slope!r}; it lies between -1 and 1.")
        if isinstance(self.r, list) and slope:
            raise ConfigError(
                f"Token merging was asked for with a list of r and inflection={slope!r}, which gives a single r its "
                "slope. Leave one of them out."
            )
        if not isinstance(self.proportional_attention, bool):
            raise ConfigError(
                f"Token merging was asked for with proportional_attention={self.proportional_attention!r}; it is true "
                "or false."
            )

    def __bool__(self) -> bool:
        """Tell whether any block merges."""
        return any(self.r) if isinstance(self.r, list) else self.r > 0

    def schedule(self, depth: int) -> tuple[int, ...]:
        """Compute the number of tokens that each block merges away.

        Args:
            depth: Number of blocks.

        Raises:
            ConfigError: If `r` lists more blocks than there are.
        """
        if isinstance(self.r, list):
            if len(self.r) > depth:
                raise ConfigError(
                    f"Token merging was asked for with r for {counted(len(self.r), 'block')}, and the model has "
                    f"{depth}. Give at most one number per block."
                )
            return (*self.r, *(0,) * (depth - len(self.r)))
        first = int(self.r * (1 - self.inflection))
        step = 2 * (self.r - first) / max(depth - 1, 1)
        return tuple(int(first + step * block) for block in range(depth))

    @classmethod
    def parsed(cls, text: str) -> TokenMerging:
        """Read settings from an argument of the command line.

        Args:
            text: ``off``, a number such as ``8``, or numbers per block such as ``16,16,8``.

        Raises:
            ConfigError: If it is something else.
        """
        if text == "off":
            return cls()
        parts = text.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(
                f"Token merging was asked for as {text!r}; give a number of tokens such as 8, numbers per block such "
                "as 16,16,8, or off."
            )
        counts = [int(part) for part in parts]
        return cls(counts[0] if len(counts) == 1 else counts)
