"""Generated scenes with exact labels of five dense tasks: classes, saliency, normals, depth and edges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from vispeft.data.dense_targets import DenseTarget
from vispeft.data.facts import ImageFacts
from vispeft.data.joint_tasks import TaskAugmentation
from vispeft.data.label_files import LabelFacts, class_facts, label_facts
from vispeft.data.listed_tasks import ListedTasks, TaskListing
from vispeft.data.masks import MaskCoding, MaskFacts
from vispeft.data.multitask import MultiTaskData
from vispeft.data.scenes import COLOURS, SCENE_CLASSES, GeneratedScenes, Scene, SceneSource

__all__ = ["SceneMultiTaskData"]

TARGETS = MappingProxyType(
    {
        "semseg": DenseTarget(kind="classes", class_names=SCENE_CLASSES, palette=COLOURS),
        "sal": DenseTarget(kind="saliency"),
        "normals": DenseTarget(kind="normals"),
        "depth": DenseTarget(kind="depth"),
        "edge": DenseTarget(kind="edge"),
    }
)


def _saliency(scene: Scene) -> Tensor:
    """Whether a pixel shows a ball, a box or a cylinder."""
    return (scene.mask >= SCENE_CLASSES.index("ball")).float()[None]


def _normals(scene: Scene) -> Tensor:
    """Normals to the right, down and towards the camera; a scene has them up."""
    return scene.normals * scene.normals.new_tensor([1, -1, 1]).view(3, 1, 1)


LABELS: Mapping[str, Callable[[Scene], Tensor]] = {
    "semseg": lambda scene: scene.mask[None],
    "sal": _saliency,
    "normals": _normals,
    "depth": lambda scene: scene.depth[None],
    "edge": lambda scene: scene.edges.float()[None],
}
"""Label (C, H, W) of each task."""


class SceneLabels(SceneSource):
    """Labels of a task for scenes by index."""

    def __init__(self, seed: int, numbers: Sequence[int], size: tuple[int, int], task: str) -> None:
        """Store the settings of the scenes.

        Args:
            seed: Seed of the set of scenes.
            numbers: Indices of the scenes.
            size: Height and width in pixels.
            task: The task.
        """
        super().__init__(seed, numbers, size)
        self.task = task

    def read(self, index: int) -> Tensor:
        """Render a scene and return its label (C, H, W)."""
        return LABELS[self.task](self.scene(index))

    def take(self, indices: Sequence[int]) -> SceneLabels:
        """Return a source of some of the labels."""
        return SceneLabels(self.seed, [self.numbers[index] for index in indices], self.size, self.task)

    def _facts(self, index: int, full: bool) -> ImageFacts:
        target = TARGETS[self.task]
        if full:
            label = self.read(index)
            found = class_facts(label) if target.kind == "classes" else label_facts(label, target.kind)
        else:
            found = MaskFacts() if target.kind == "classes" else LabelFacts()
        height, width = self.size
        known = replace(found, width=width, height=height, digest=self.digest(index))
        return known.read_with(MaskCoding(num_classes=len(SCENE_CLASSES))) if isinstance(known, MaskFacts) else known


class SceneMultiTaskData(GeneratedScenes, MultiTaskData):
    """Generated scenes with exact labels of the tasks ``semseg``, ``sal``, ``normals``, ``depth`` and ``edge``.

    Saliency is 1 on balls, boxes and cylinders. Depths are along the camera's axis in metres. Edges are pixels whose
    neighbour to the right or below shows another object or face.
    """

    known_weights = MappingProxyType({"semseg": 1.0, "sal": 5.0, "normals": 10.0, "depth": 1.0, "edge": 50.0})

    def __init__(
        self,
        *,
        augment: TaskAugmentation | None = TaskAugmentation(scales=(1.0, 1.2, 1.5)),  # noqa: B008 - it is frozen
        **settings: Any,
    ) -> None:
        """Store the settings.

        Args:
            augment: Augmentation of training images; None leaves random changes out.
            settings: Settings of `GeneratedScenes`, `MultiTaskData`, `ListedData` and `ImageData`.
        """
        super().__init__(augment=augment, **settings)

    @property
    def known_targets(self) -> Mapping[str, DenseTarget]:
        """The five tasks."""
        return TARGETS

    def read(self) -> TaskListing:
        """List the scenes."""
        settings = (self.scene_seed, range(self.images), self.scene_size)
        labels = {task: SceneLabels(*settings, task) for task in self.targets}
        return self.listing_of(self.place, {"train": ListedTasks(SceneSource(*settings), labels)})
