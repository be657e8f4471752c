"""Base class and registry of dense decoders, which turn checked maps into class scores."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from vispeft.errors import ConfigError, UnknownNameError

__all__ = ["Decoder", "decoder", "list_decoders", "register_decoder", "sizes_of"]


class Decoder(nn.Module):
    """Turn a backbone's maps into class scores: subclasses fuse the maps, a 1x1 convolution scores each pixel.

    To add a decoder, subclass it in one file of this package, name its options in ``__init__``, write `fuse`, and
    decorate the class with `register_decoder`.

    As in mmsegmentation 1.2.2, the last layer is called ``conv_seg``, is initialised from a normal distribution of
    standard deviation 0.01 with zero bias, and follows channel dropout.
    """

    name: ClassVar[str]
    """Name in the registry, in configs and in files."""
    paper: ClassVar[str]
    """Link to the publication."""
    needs_pyramid: ClassVar[bool] = False
    """Whether each map must be smaller than the one before."""
    least_batch: int = 1
    """Smallest batch size for training."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, channels: int, dropout: float) -> None:
        """Create the last layer and its dropout.

        Args:
            in_channels: Channels of each map, fine to coarse.
            num_classes: Number of scores per pixel.
            channels: Channels of the fused map.
            dropout: Probability of dropping a channel of the fused map during training, from 0 to below 1.

        Raises:
            ConfigError: If a number is out of range.
        """
        super().__init__()
        self.in_channels, self.num_classes = tuple(in_channels), num_classes
        if not self.in_channels:
            raise ConfigError(f"Decoder {self.name!r} was asked for with in_channels=(): it needs a map to read.")
        for option, number in (("num_classes", num_classes), ("channels", channels)):
            if number < 1:
                raise ConfigError(f"Decoder {self.name!r} was asked for with {option}={number}; give at least 1.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"Decoder {self.name!r} was asked for with dropout={dropout}; 0 up to below 1 is needed.")
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Fuse all maps into one, (B, channels, h, w).

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i), fine to coarse.
        """
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute class scores (B, num_classes, h, w), at the size of the finest map it reads.

        Args:
            maps: Maps (B, in_channels[i], h_i, w_i), fine to coarse.

        Raises:
            ConfigError: If number, channels or sizes of the maps do not match.
        """
        self.check(maps)
        return self.conv_seg(self.dropout(self.fuse(maps)))

    def check(self, maps: Sequence[Tensor]) -> None:
        """Refuse maps that do not match this decoder.

        Args:
            maps: Maps (B, C_i, h_i, w_i), on any device, meta included.

        Raises:
            ConfigError: If number, channels or sizes of the maps do not match.
        """
        found = tuple(level.shape[1] for level in maps)
        if found != self.in_channels:
            raise ConfigError(
                f"Decoder {self.name!r} was made for {len(self.in_channels)} maps of {_listed(self.in_channels)} "
                f"channels and got {len(found)} of {_listed(found)}; make it with in_channels={found}."
            )
        if self.needs_pyramid and not _shrinks(maps):
            others = ", ".join(repr(name) for name in list_decoders() if not _DECODERS[name].needs_pyramid)
            raise ConfigError(
                f"Decoder {self.name!r} needs a pyramid, each map smaller than the one before, and got maps of "
                f'{sizes_of(maps)}, as a plain ViT gives them. Make a pyramid of them with levels="vitdet", or take '
                f"{others}."
            )


_DECODERS: dict[str, type[Decoder]] = {}

AnyDecoder = TypeVar("AnyDecoder", bound=type[Decoder])


def register_decoder(cls: AnyDecoder) -> AnyDecoder:
    """Add a decoder class to the registry, under its ``name``.

    Args:
        cls: The class.

    Returns:
        The same class.
    """
    _DECODERS[cls.name] = cls
    return cls


def list_decoders() -> list[str]:
    """List the names of all decoders."""
    return sorted(_DECODERS)


def decoder(name: str, in_channels: Sequence[int], num_classes: int, **options: Any) -> Decoder:
    """Create a decoder by its name.

    Args:
        name: One of `list_decoders`.
        in_channels: Channels of each map, fine to coarse.
        num_classes: Number of scores per pixel.
        options: The decoder's own options.

    Returns:
        The decoder.

    Raises:
        UnknownNameError: If there is no such decoder, or it has no such option.
        ConfigError: If a value is out of range.

    Example:
        >>> head = decoder("segformer", in_channels=(96, 192, 384, 768), num_classes=150, channels=128)
        >>> scores = head(maps)  # (B, 150, H/4, W/4)
    """
    if name not in _DECODERS:
        raise UnknownNameError("decoder", name, list_decoders())
    cls = _DECODERS[name]
    known = list(inspect.signature(cls).parameters)[2:]
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of decoder {name!r}", option, known)
    return cls(in_channels, num_classes, **options)


def sizes_of(maps: Sequence[Tensor]) -> str:
    """Format the sizes of maps for a message.

    Args:
        maps: Maps (B, C_i, h_i, w_i).
    """
    return ", ".join(f"{level.shape[-2]}x{level.shape[-1]}" for level in maps)


def _shrinks(maps: Sequence[Tensor]) -> bool:
    """Whether both sides shrink from each map to the next, until they are one pixel."""
    sizes = [tuple(level.shape[-2:]) for level in maps]
    pairs = [sides for large, small in pairwise(sizes) for sides in zip(large, small, strict=True)]
    return all(after < before or before == 1 for before, after in pairs)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
