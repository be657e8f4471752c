"""Published data sets with labels for each pixel: their two splits, folders and lists."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vispeft.data.folder import SYNONYMS
from vispeft.data.list_files import read_text
from vispeft.data.listed import ListedData
from vispeft.errors import ConfigError, DataError

__all__ = ["LISTS", "PublishedSplits", "find_split", "read_stems"]

LISTS = {"train": "train.txt", "validation": "val.txt"}
"""Usual names of the lists of the two splits."""


class PublishedSplits(ListedData):
    """Base of the readers of published data sets that have labels for train and validation alone.

    Published results are on the validation split. The protocol ``final`` trains on all of train, uses the published
    validation images as test and as validation split, and keeps the last epoch. The protocol ``tune`` draws the
    validation split from train, so it may select settings and epochs.
    """

    def __init__(
        self,
        *,
        root: str,
        protocol: Literal["final", "tune"] = "final",
        validation: float = 0.1,
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            root: The folder of the set.
            protocol: Whether to train on all of train (``final``) or hold out a fraction for validation (``tune``).
            validation: With ``tune``, this fraction.
            settings: Settings of the other base class, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(validation=validation, **settings)
        if protocol not in ("final", "tune"):
            raise ConfigError(f"{type(self).__name__}(protocol={protocol!r}): the choices are final and tune.")
        self.root, self.protocol = Path(root), protocol
        self.validation_chooses = protocol == "tune"

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """Published number of images in ``train`` and ``validation``."""

    def arrange(self, listed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int], frozenset[str]]:
        """Turn the published splits into those of the protocol.

        Args:
            listed: The published splits ``train`` and ``validation``.

        Returns:
            The splits; the published number of images of each, as far as it applies; the splits that repeat others.
        """
        splits = {"train": listed["train"], "test": listed["validation"]}
        expected = {"test": self.counts["validation"]}
        if self.protocol == "tune":
            return splits, expected, frozenset()
        splits["validation"] = listed["validation"]
        return splits, {**expected, "train": self.counts["train"]}, frozenset({"validation"})

    def place(self, *candidates: str, needs: Sequence[str]) -> Path:
        """Find the folder of the data set.

        Args:
            candidates: Possible folders, relative to root.
            needs: Folders it must contain.

        Raises:
            DataError: If no candidate contains them.
        """
        for candidate in candidates:
            if all((self.root / candidate / need).is_dir() for need in needs):
                return self.root / candidate
        found = sorted(path.name for path in self.root.iterdir())[:6] if self.root.is_dir() else []
        raise DataError(
            f"{type(self).__name__}(root={str(self.root)!r}): no folder with {', '.join(needs)} there or in "
            f"{', '.join(c for c in candidates if c != '.')}; found {', '.join(found) or 'nothing'}."
        )


def find_split(place: Path, split: str) -> Path:
    """Find the folder of a split by its usual names.

    Args:
        place: The folder to search.
        split: train, validation or test.

    Raises:
        DataError: If there is none.
    """
    found = next((place / name for name in SYNONYMS[split] if (place / name).is_dir()), None)
    if found is None:
        raise DataError(f"{place} has no folder {SYNONYMS[split][0]}; the published layout has one.")
    return found


def read_stems(path: Path) -> list[str]:
    """Read a published list of images, one name without suffix per line.

    Args:
        path: Its file.

    Raises:
        DataError: If it is missing or empty.
    """
    if not path.is_file():
        found = sorted(other.name for other in path.parent.glob("*.txt")) if path.parent.is_dir() else []
        raise DataError(f"There is no list {path}; found {', '.join(found) or 'no list beside it'}.")
    # mmsegmentation's lists have one name per line; the development kit's class lists add a number.
    stems = [line.split()[0] for line in read_text(path).split("\n") if line.strip()]
    if not stems:
        raise DataError(f"No image is listed in {path}.")
    return stems
