"""What the demo shows: adapters of finished runs, on one backbone where they have the same one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vispeft.cli.evaluate import header_of, load_task
from vispeft.cli.inside import Seen, first_task
from vispeft.cli.runs import Run
from vispeft.data.images import Reading, read_image
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError
from vispeft.metrics import nearest
from vispeft.retrieval import Collection, collect
from vispeft.tasks import Classification, MetricLearning, MultiLabel, Regression
from vispeft.tasks.base import AdapterTask
from vispeft.tasks.embedding import embed_images, similarity_of
from vispeft.tasks.predictions import Predictor
from vispeft.viz import attention_of, attention_picture

__all__ = ["Answer", "Model", "load_models"]

NEIGHBOURS = 6
"""Neighbours of an image."""
GALLERY = 2000
"""Largest number of images that are embedded when the demo begins."""
LEAST = 300
"""Longest side of a picture of attention in pixels, at least; some backbones see 32 pixels."""
SIDE = 400
"""Longest side of a neighbour's picture in pixels."""
_COUNTED = "Pixels of each class; of other tasks the mean:"
"""Line above the numbers of dense tasks."""
_MADE_FOR_FILES = ("masks",)
"""Folders of pictures that are for programs: class indices, which look black."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says of one image."""

    probabilities: dict[str, float] = field(default_factory=dict)
    """Probability of each class or label; empty for other tasks."""
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)
    """Overlays, maps of the tasks, or neighbours, with their names."""
    text: str = ""
    """Numbers in words, one a line."""
    attention: Image.Image | None = None
    """Where the last block looks."""


class Model:
    """One adapter in the demo."""

    def __init__(self, run: Run, label: str, shared: AdapterTask | None) -> None:
        """Load the adapter of a run.

        Args:
            run: The run.
            label: Its name in the demo, and on the backbone.
            shared: The task of another run with the same backbone, on which the adapter is put as well; None for a
                backbone of its own.

        Raises:
            FileError: If the run cannot be read.
            BaseMismatchError: If the backbone has other weights than the adapter was trained on.
        """
        self.label, self.run = label, run
        self.task, _ = load_task(run)
        if shared is None:
            before = self.task.bank.names
            self.task.bank.load(run.adapter, name=label)
            for name in before:
                self.task.bank.detach(name)
        else:
            shared.bank.load(run.adapter, name=label)
            self.task.model, self.task.bank = shared.model, shared.bank
        self.gallery: _Gallery | None = None
        with self.task.bank.using(label):
            self.notes = self.task.bank.notes()
            self.predictor: Predictor = self.task.predictor()
        self.reading = Reading.from_notes(self.notes)
        self.preprocessing = Preprocessing.from_dict(self.notes["preprocessing"])

    @property
    def facts(self) -> str:
        """What stands below the choice of the adapter."""
        header = header_of(self.run)
        method, backbone = header["method"]["name"], header["backbone"]["name"]
        trained = self.task.bank.report(self.label).trainable
        return f"{type(self.task).__name__}: {method} on {backbone}, {trained:,} parameters in the adapter"

    def show_neighbours(self, images: Collection) -> None:
        """Embed images that are searched for neighbours; other tasks than metric learning ignore them.

        Args:
            images: The images.
        """
        if isinstance(self.task, MetricLearning):
            self.gallery = _Gallery(self, images)

    @torch.inference_mode()
    def embed(self, images: Sequence[Tensor]) -> Tensor:
        """Embed images of any size.

        Args:
            images: uint8 (3, H, W) each.

        Returns:
            (N, d), on the CPU.
        """
        prepare = self.preprocessing.transform()
        batch = torch.stack([prepare(image) for image in images]).to(self.task.device)
        with self.task.bank.using(self.label):
            return embed_images(self.task.eval(), batch).cpu()

    def answer(self, image: Tensor) -> Answer:
        """Say what the model makes of an image.

        Args:
            image: uint8 (3, H, W).
        """
        task = self.task.eval()
        with torch.inference_mode(), self.task.bank.using(self.label):
            attention = self._attention(image)
            if isinstance(task, MetricLearning):
                return Answer(pictures=self._neighbours(image), text=self._told(), attention=attention)
            if isinstance(task, Classification | MultiLabel | Regression):
                prepared = self.preprocessing.transform()(image)[None].to(task.device)
                values = task.predict_step(prepared, 0)[0].float().tolist()
                named = dict(zip(task.class_names(), values, strict=True))
                if isinstance(task, Regression):
                    numbers = "\n".join(f"{name}: {value:.4g}" for name, value in named.items())
                    return Answer(text=numbers, attention=attention)
                return Answer(probabilities=named, attention=attention)
            (found,) = self.predictor([image])
        kept = [(p, name) for name, p in found.pictures.items() if name not in (*_MADE_FOR_FILES, "strips")]
        cells = zip(self.predictor.columns, found.row, strict=True)
        return Answer(
            pictures=[(picture.convert("RGB"), name) for picture, name in kept if picture.mode != "I;16"],
            text="\n".join([_COUNTED, *(f"{name}: {value}" for name, value in cells)]),
            attention=attention,
        )

    def _attention(self, image: Tensor) -> Image.Image:
        prepared = self._prepared(image)
        seen = Seen(prepared[None], None, self.preprocessing)
        with first_task(self.task):
            found = attention_of(self.task.model, prepared[None].to(self.task.device, self.task.base_dtype))
        drawn = attention_picture(seen.pictures(1)[0], found[-1].to_tokens[0].mean(0))
        picture = _picture(drawn)
        larger = -(-LEAST // max(picture.size))
        return picture.resize((picture.width * larger, picture.height * larger), Image.Resampling.NEAREST)

    def _prepared(self, image: Tensor) -> Tensor:
        """Prepare an image (3, h, w) as the model's own predictions do."""
        prepare: Any = getattr(self.predictor, "prepare", None)
        found = (prepare or self.preprocessing.transform())(image)
        return found[1] if isinstance(found, tuple) else found

    def _neighbours(self, image: Tensor) -> list[tuple[Image.Image, str]]:
        return [] if self.gallery is None else self.gallery.nearest(self.embed([image]))

    def _told(self) -> str:
        if self.gallery is None:
            return "Neighbours are found among the images of --gallery FOLDER, which was not given."
        return f"{len(self.gallery.images):,} images were searched."


class _Gallery:
    """Embedded images, in which neighbours are found."""

    def __init__(self, model: Model, images: Collection) -> None:
        self.images, self._model = images, model
        batches = [images.paths[start : start + 32] for start in range(0, len(images), 32)]
        read = ([read_image(path, reading=model.reading) for path in batch] for batch in batches)
        self._vectors = torch.cat([model.embed(batch) for batch in read])

    def nearest(self, vector: Tensor) -> list[tuple[Image.Image, str]]:
        """Return the nearest images with label and score."""
        scores, found = nearest(vector, self._vectors, NEIGHBOURS, similarity_of(self._model.task))
        shown = []
        for score, index in zip(scores[0].tolist(), found[0].tolist(), strict=True):
            picture = _picture(read_image(self.images.paths[index], reading=self._model.reading))
            picture.thumbnail((SIDE, SIDE))
            shown.append((picture, f"{self.images.labels[index]} {score:.3f}".strip()))
        return shown


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


def load_models(runs: Sequence[str], gallery: str | None = None) -> dict[str, Model]:
    """Load the adapters of runs; those of one backbone share it.

    Args:
        runs: Run directories.
        gallery: Folder or list of images in which runs of metric learning find neighbours; None for none.

    Returns:
        The models by their names: the run as it was given.

    Raises:
        ConfigError: If a run is given twice, or the gallery is too large.
        DataError: If an image of the gallery cannot be read.
        FileError: If a run is not finished.
    """
    if len(set(runs)) < len(runs):
        twice = next(run for run in runs if list(runs).count(run) > 1)
        raise ConfigError(f"{twice} was given twice. Name each adapter once.")
    images = None if gallery is None else collect(Path(gallery))
    if images is not None and len(images) > GALLERY:
        raise ConfigError(
            f"--gallery has {len(images):,} images, and the demo embeds at most {GALLERY:,} when it begins. Give "
            "fewer; `vispeft embed` and `vispeft search` take any number."
        )
    models: dict[str, Model] = {}
    first: dict[str, AdapterTask] = {}
    for number, given in enumerate(runs, start=1):
        run = Run.open(given)
        key = _backbone_of(run)
        model = Model(run, f"adapter{number}", first.get(key))
        first.setdefault(key, model.task)
        models[given] = model
        if images is not None:
            model.show_neighbours(images)
    return models


def _backbone_of(run: Run) -> str:
    """Return what has to be equal for two adapters to share a backbone; their classifiers are their own."""
    found = header_of(run).get("backbone")
    described = dict(found) if isinstance(found, dict) else {}
    args = described.get("args")
    if isinstance(args, dict):
        described["args"] = {key: value for key, value in args.items() if key != "num_classes"}
    return repr(sorted(described.items()))
