"""Data modules for semantic segmentation: images with a mask each."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vispeft.data.joint import EvaluationPair, MaskAugmentation, TrainPair
from vispeft.data.listed import ListedData, PixelSplit
from vispeft.data.listing import Finding, Listing, Published, gather
from vispeft.data.masks import ListedMasks, MaskCoding, MaskFiles, own_coding
from vispeft.data.paired_folders import find_places
from vispeft.data.palettes import ClassTable, Colour, make_palette, read_palette
from vispeft.data.preprocessing import Preprocessing
from vispeft.data.published import PublishedSplits
from vispeft.data.sources import FileSource, Source
from vispeft.data.trees import EXTENSIONS, LeftOut, walk
from vispeft.errors import ConfigError, check_object, counted

__all__ = ["MaskFolderData", "MaskSplit", "PublishedMasks", "SegmentationData", "list_masks"]


class MaskSplit(PixelSplit):
    """A split that reads its images and masks on access; masks of a batch are (B, h, w)."""

    listed: ListedMasks

    @property
    def masks(self) -> Source:
        """Source of the masks."""
        return self.listed.masks

    def read_labels(self, index: int) -> Tensor:
        """Read the mask of an image (H, W)."""
        return self.masks.read(index)

    def stacked(self, labels: Sequence[Tensor]) -> Tensor:
        """Combine masks."""
        return torch.stack(list(labels))


class SegmentationData(ListedData):
    """Base of the data modules for semantic segmentation.

    Batches are images (B, 3, H, W) and masks int64 (B, h, w) of classes from 0, with 255 for unlabelled pixels.
    Training images are crops of one size. Validation and test use the whole image, and its mask keeps its size on disk,
    to which scores must be resized. Their batches hold one image, unless all images of a split have the same size.

    Subclasses return a listing whose splits are `ListedMasks` from `read`.
    """

    def __init__(
        self,
        *,
        augment: MaskAugmentation | None = MaskAugmentation(),  # noqa: B008 - it is frozen
        evaluation: Literal["stretch", "whole"] = "stretch",
        short_side: int | None = None,
        batch_size: int = 8,
        **settings: Any,
    ) -> None:
        """Validate and store the settings.

        Args:
            augment: Augmentation of training images; None stretches them to the size, without random changes.
            evaluation: Validation and test images are stretched to the size (``stretch``), or keep their aspect ratio
            (``whole``), for models that accept any size, or for sliding windows.
            short_side: Shorter side in pixels to which images are resized proportionally, in training before the random
            factor and with ``whole``; None keeps their size.
            batch_size: Images per batch.
            settings: Settings of `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(batch_size=batch_size, **settings)
        name = type(self).__name__
        if evaluation not in ("stretch", "whole"):
            raise ConfigError(f"{name}(evaluation={evaluation!r}): the choices are stretch and whole.")
        if short_side is not None and short_side < 1:
            raise ConfigError(f"{name}(short_side={short_side}): at least one pixel is needed, or None.")
        if "crop_pct" in self._given:
            raise ConfigError(f"{name}(crop_pct=...): it cuts images and not their masks; leave it out.")
        check_object(name, "augment", augment, MaskAugmentation)
        self.target = "mask"
        self.crops, self.evaluation, self.short_side = augment, evaluation, short_side

    @property
    def palette(self) -> tuple[Colour, ...]:
        """Colour of each class, red, green and blue from 0 to 255."""
        return self.own_palette if self._matched is None else self._matched.colours(self.own_palette)

    @property
    def own_palette(self) -> tuple[Colour, ...]:
        """Colour of each class in the order of the masks, which is that of `palette` unless classes were matched."""
        return make_palette(self.num_classes if self._matched is None else len(self._matched.found))

    def output_notes(self) -> dict[str, Any]:
        """Return the mask colours, the image sizing and how pixels are read, for the adapter's file."""
        return {
            **super().output_notes(),
            "palette": [list(colour) for colour in self.palette],
            "evaluation": self.evaluation,
            "short_side": self.short_side,
        }

    @property
    def smallest_size(self) -> tuple[int, int]:
        """Height and width of the smallest validation or test image, as the backbone sees it."""
        if self.evaluation == "stretch":
            return self.preprocessing.size
        facts = [known for name in ("validation", "test") for known in self.report().facts[name] if known.width]
        width, height = min((known.upright for known in facts), key=min)
        factor = 1.0 if self.short_side is None else self.short_side / min(height, width)
        return round(height * factor), round(width * factor)

    def load(self, preprocessing: Preprocessing) -> dict[str, Dataset[Any]]:
        """Check images and masks and return the splits.

        Args:
            preprocessing: Preprocessing of each image.

        Raises:
            DataError: If the data cannot be used; the message lists every problem.
        """
        self.accept()
        train = TrainPair(preprocessing, self.crops, self.short_side)
        evaluate = EvaluationPair(preprocessing, self.evaluation == "whole", self.short_side)
        listed: Mapping[str, Any] = self.listing.splits
        splits = {"train": MaskSplit(listed["train"], train, self.seed)}
        splits["train"].plainly = evaluate
        return {**splits, **{name: MaskSplit(listed[name], evaluate) for name in ("validation", "test")}}

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify the images and masks of all splits."""
        yield from super().identity()
        for name, split in self.listing.splits.items():
            for index in range(len(split)):
                yield f"{name} mask {split.label(index)}\n".encode()

    def _batch_of(self, split: Dataset[Any], training: bool) -> int:
        """Return a batch size of one if sizes differ."""
        if training:
            return self.batch_size
        names = [name for name, loaded in self._splits.items() if loaded is split]
        sizes = {known.upright for name in names for known in self.report().facts[name]}
        return self.batch_size if len(sizes) == 1 else 1


def list_masks(
    images: Iterable[str | Path], masks: Iterable[str | Path], root: str | Path, coding: MaskCoding
) -> ListedMasks:
    """List the image and mask files of a split.

    Args:
        images: Its images.
        masks: A mask for each of them.
        root: Folder that names in messages are relative to.
        coding: Mapping from mask values to classes.
    """
    return ListedMasks(FileSource(images, root), MaskFiles(masks, root, coding))


# ------------------------------------------------------------------ folders


class MaskFolderData(SegmentationData):
    """A folder of images and a folder of masks: ``root/images/train/a.jpg`` and ``root/masks/train/a.png``.

    Images and masks are paired by their path without suffix. The splits are folders inside these two, or around them
    (``root/train/images/a.jpg``), named as in `ImageFolderData`; missing splits are drawn from train.

    Masks hold a class index per pixel: grey files of 1 to 32 bits, or palette files, whose palette is ignored. With
    ``rgb_masks`` they hold the colours of `palette`, in RGB, grey or palette files.
    """

    def __init__(
        self,
        *,
        root: str,
        class_names: Sequence[str],
        images: str = "images",
        masks: str = "masks",
        palette: Sequence[tuple[int, int, int]] | None = None,
        rgb_masks: bool = False,
        reduce_zero_label: bool = False,
        ids: dict[int, int] | None = None,
        image_suffix: str = "",
        mask_suffix: str = ".png",
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            root: The folder.
            class_names: Names of the classes, in the order of their indices.
            images: Folder of the images.
            masks: Folder of the masks.
            palette: Colour of each class; None generates colours.
            rgb_masks: Whether masks hold the colours of `palette`.
            reduce_zero_label: Whether 0 marks unlabelled pixels and classes start at 1.
            ids: Class by mask value, if they differ, such as ``{0: 0, 255: 1}``; class 255 means no label.
            image_suffix: End of image file names, such as ``_leftImg8bit.png``; by default any image suffix.
            mask_suffix: End of mask file names.
            settings: Settings of `SegmentationData`, `ListedData` and `ImageData`.

        Raises:
            ConfigError: If a setting is invalid.
        """
        super().__init__(**settings)
        self.root, self.names = Path(root), tuple(class_names)
        self.coding = own_coding(
            "MaskFolderData",
            self.names,
            palette,
            rgb_masks=rgb_masks,
            ids=ids,
            reduce_zero_label=reduce_zero_label,
        )
        count = len(self.names)
        self._palette = make_palette(count) if palette is None else read_palette(palette, count, "MaskFolderData")
        self.images, self.masks = images, masks
        self.image_suffix, self.mask_suffix = image_suffix, mask_suffix

    @property
    def own_palette(self) -> tuple[Colour, ...]:
        """The given or generated colours."""
        return self._palette

    def read(self) -> Listing:
        """List images and masks.

        Raises:
            DataError: If there are no such folders, or their names leave open which split is meant.
        """
        left = LeftOut(self.root)
        places = find_places(self.root, self.images, [self.masks], left, "root, images and masks")
        findings: list[Finding] = []
        splits: dict[str, Any] = {}
        for split, (images, masks) in places.items():
            splits[split] = self._split(images, masks, left)
            findings += self._strays(split, splits[split], masks, left)
        if left:
            findings.append(Finding(left.level, "left-out", left.line()))
        return Listing(str(self.root), self.names, splits, target="mask", findings=findings)

    def _split(self, images: str, masks: str, left: LeftOut) -> ListedMasks:
        together = os.path.realpath(images) == os.path.realpath(masks)
        paths: list[Path] = []
        for path in walk(images, left):
            if together and not self.image_suffix and path.endswith(self.mask_suffix):
                continue
            if path.lower().endswith(self._endings()):
                paths.append(Path(path))
            elif not (together and path.endswith(self.mask_suffix)):
                left.add("ending", path)
        pairs = [(p, f"{masks}{os.sep}{self._stem(p.relative_to(images))}{self.mask_suffix}") for p in sorted(paths)]
        return list_masks((image for image, _ in pairs), (mask for _, mask in pairs), self.root, self.coding)

    def _endings(self) -> tuple[str, ...]:
        return (self.image_suffix.lower(),) if self.image_suffix else EXTENSIONS

    def _stem(self, path: Path) -> str:
        return str(path)[: -len(self.image_suffix)] if self.image_suffix else str(path.with_suffix(""))

    def _strays(self, split: str, listed: ListedMasks, masks: str, left: LeftOut) -> list[Finding]:
        """Find masks without an image."""
        assert isinstance(listed.masks, MaskFiles)
        assert isinstance(listed.source, FileSource)
        expected, images = set(listed.masks.paths), set(listed.source.paths)
        alone = []
        for path in walk(masks, left) if os.path.isdir(masks) else []:
            if not path.endswith(self.mask_suffix):
                if path not in images:
                    left.add("mask", path)
            elif path not in expected:
                alone.append(os.path.relpath(path, self.root))
        text = f"{counted(len(alone), 'mask')} in {split} without an image, left out"
        return gather("warning", {("mask-without-image", text): sorted(alone)})


# ------------------------------------------------------------------ published sets


class PublishedMasks(PublishedSplits, SegmentationData):
    """Base of the readers of published data sets, which have a train and a validation split with public masks."""

    @abstractmethod
    def pairs(self, split: Literal["train", "validation"]) -> Sequence[tuple[Path, Path]]:
        """List images and masks of a published split.

        Args:
            split: One of the two.

        Raises:
            DataError: If it is missing.
        """

    @property
    @abstractmethod
    def table(self) -> ClassTable:
        """The published classes."""

    @property
    def coding(self) -> MaskCoding:
        """Mapping from mask values to classes."""
        return MaskCoding(num_classes=len(self.table.class_names))

    @property
    def own_palette(self) -> tuple[Colour, ...]:
        """The published colours."""
        return self.table.palette

    def read(self) -> Listing:
        """List images and masks.

        Raises:
            DataError: If the layout differs.
        """
        listed = {}
        for split in ("train", "validation"):
            images, masks = zip(*self.pairs(split), strict=True)
            listed[split] = list_masks(images, masks, self.root, self.coding)
        splits, expected, repeats = self.arrange(listed)
        names = self.table.class_names
        known = Published(self.table.title, len(names), expected)
        return Listing(str(self.root), names, splits, target="mask", published=known, repeats=repeats)
