"""Several dense tasks at once: one adapted backbone, one decoder per task."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vispeft.adapters.task_maps import TaskMaps, map_shapes
from vispeft.core.method import Method
from vispeft.core.modes import evaluating
from vispeft.data.dense_targets import DenseTarget
from vispeft.errors import ConfigError, DataError, FileError, UnknownNameError, counted
from vispeft.heads import decoder as make_decoder
from vispeft.metrics import dense_metric, per_class
from vispeft.storage.files import DECODER
from vispeft.tasks.baselines import (
    MEASURED_ON,
    Baselines,
    Facts,
    compared,
    mean_gain,
    mean_score,
    measured,
    read_baselines,
)
from vispeft.tasks.dense import EXAMPLES, DenseTask
from vispeft.tasks.dense_losses import dense_loss
from vispeft.tasks.dense_outputs import as_targets, decode, finite_images, resized, target_notes
from vispeft.tasks.task_network import MultiTaskNetwork, OneOutput
from vispeft.tasks.task_predictions import TaskPredictor, written_folders
from vispeft.tasks.task_weights import task_weights
from vispeft.viz.strips import task_strips

__all__ = ["MultiTaskDense"]

logger = logging.getLogger(__name__)

SPLITS = ("validation", "test")


class MultiTaskDense(DenseTask):
    """Several predictions for every pixel by one backbone: classes, saliency, edges, normals, depth, other values.

    The method may know the tasks itself (MTLoRA, Polyhistor), have one copy of its units per task, or be shared. Logs
    the weighted loss and each task's, and of validation and test each task's figures. With baselines, ``delta_m`` (the
    mean relative improvement over them in percent) chooses the epoch; without, ``score`` does, the geometric mean of
    the tasks' main figures (of their inverse, where less is better), which ranks epochs alike to first order.
    """

    target: ClassVar[str] = "tasks"
    skips_tensors: ClassVar[bool] = True
    monitor = "validation/score"
    least_outputs: ClassVar[int] = 1
    ordered: ClassVar[bool] = False

    def __init__(
        self,
        *,
        targets: dict[str, Any],
        method: Method,
        shared: bool = False,
        batched: bool = False,
        decoder: str = "hrnet",
        output_norms: bool = False,
        loss_weights: dict[str, float] | None = None,
        weighting: Literal["fixed", "uncertainty", "average"] = "fixed",
        absent: Literal["skip", "zero"] = "zero",
        baselines: dict[str, float | str] | str | None = None,
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter, make the decoders, and verify that all of it trains.

        Args:
            targets: A `DenseTarget` by task; configs take them from the data.
            method: The adapter.
            shared: Let all tasks use the same units, which a method that knows tasks itself does not do; otherwise any
                other method has one copy of its units per task.
            batched: Run all tasks in one pass of a batch that holds the images once per task, where there is one pass
                per task otherwise; see `vispeft.forward_tasks`. Dropout then draws other random numbers.
            decoder: Name of the decoders; see `vispeft.heads.list_decoders`.
            output_norms: Put a layer norm in front of each decoder, one per task and map, in place of the backbone's
                last norm, as Polyhistor does.
            loss_weights: Weight of the losses of some or all tasks. Others have that of the data, or without one that
                of `vispeft.tasks.task_weights`; under other rules than ``fixed`` they have 1.
            weighting: How weights change: not at all, by a learned uncertainty (arXiv 1705.07115), or by how fast each
                loss falls (dynamic weight average, arXiv 1803.10704).
            absent: How a class that occurs in no label and no prediction counts in a mean IoU: as zero (``zero``, as in
                the public codes of both papers), or not at all (``skip``).
            baselines: Figure of a single-task model by task, or the directory of a run that measured the task; or one
                run that measured all of them. Delta m compares with these. A run has to have measured the same images
                and labels; a figure counts as it is.
            settings: Settings of `DenseTask` and `AdapterTask`.

        Raises:
            ConfigError: If a setting is out of range, the decoder is not known or cannot read these maps, the method
                changes no map, or, with `batched`, has units of a task that act on whole batches.
            UnknownNameError: If weights or baselines name a task that does not exist.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient through the maps.
        """
        # Set before the base class attaches the adapter, which asks for its tasks.
        self.targets = as_targets(targets)
        self._adapter_tasks = None if shared else list(self.targets)
        self.chosen: str | None = None
        _check(self.targets, method, shared, settings)
        super().__init__(method=method, decoder=decoder, num_classes=len(self.targets), **settings)
        self.shared, self.batched, self.weighting, self.absent = shared, batched, weighting, absent
        self.losses = nn.ModuleDict({task: dense_loss(target, task) for task, target in self.targets.items()})
        self.task_weights = task_weights(self.targets, weighting, loss_weights)
        self._weighted_by_data = set(self.targets) - set(loss_weights or {}) if weighting == "fixed" else set()
        self.metrics = nn.ModuleDict({split: self._metrics() for split in SPLITS})
        mains = {task: self._metric("test", task).main for task in self.targets}
        self.baselines = read_baselines(baselines, mains)
        self._seen: dict[str, int] = {}
        """Number of images that were measured, by split."""
        self._left_out: dict[str, list[str]] = {}
        """Tasks without a figure, by split."""
        self._told: set[str] = set()
        if self.baselines:
            self.monitor = "validation/delta_m"
        self.reader.norm = not output_norms  # the public code of Polyhistor has the norm of the task alone there
        widths, _ = map_shapes(self.model, self.reader.taps)
        self.norms = nn.ModuleDict(
            {task: nn.ModuleList(map(LayerNorm2d, widths)) for task in (self.targets if output_norms else ())}
        )
        self.decoders = nn.ModuleDict(
            {
                task: make_decoder(decoder, widths, target.channels, **self.decoder_args)
                for task, target in self.targets.items()
            }
        )
        self.check_maps()

    # ------------------------------------------------------------------ parts

    def adapter_tasks(self) -> Sequence[str] | None:
        """Return the tasks; None where they share all units."""
        return self._adapter_tasks

    def parts(self) -> dict[str, nn.Module]:
        """Map reader, norms and decoders."""
        return {"reader": self.reader, "norms": self.norms, "decoders": self.decoders}

    def network(self, tasks: Sequence[str] | None = None) -> MultiTaskNetwork:
        """Backbone, map reader, norms and decoders as one module, which shares their tensors.

        Args:
            tasks: Tasks to compute; None for all.
        """
        chosen = list(self.targets) if tasks is None else list(tasks)
        decoders = nn.ModuleDict({task: self.decoders[task] for task in chosen})
        routed = self.chosen is not None and self._routes
        return MultiTaskNetwork(self.model, self.reader, self.norms, decoders, routed, self.batched)

    def maps_network(self) -> nn.Module:
        """Return the backbone with the maps that the decoders read."""
        return (
            super().maps_network()
            if self.shared
            else TaskMaps(self.model, list(self.targets), self.reader.taps, self.reader.norm)
        )

    def unused_tensors(self) -> list[str]:
        """List the trainable tensors that get no gradient in any step, since no decoder reads what they change.

        One of them is the shared pair of the last block's ``mlp.fc2`` in MTLoRA. Training in several processes has to
        know them.
        """
        trained = self.trainable_parameters()
        with evaluating(self), torch.enable_grad():
            network = self.network().eval()
            image = torch.randn(1, 3, *self.probe_size(), generator=torch.Generator().manual_seed(0))
            outputs = network(image.to(self.device, self.base_dtype))
            total = torch.stack([values.float().square().sum() for values in outputs.values()]).sum()
            found = torch.autograd.grad(total, [p for _, p in trained], allow_unused=True)
        inside = {id(p) for p in self.task_weights.parameters()}
        pairs = zip(trained, found, strict=True)
        return [name for (name, p), gradient in pairs if gradient is None and id(p) not in inside]

    # ------------------------------------------------------------------ deployment

    def choose(self, output: str) -> None:
        """Choose the only task to deploy.

        Args:
            output: The task.

        Raises:
            UnknownNameError: If there is no such task.
        """
        if output not in self.targets:
            raise UnknownNameError("task", output, self.targets)
        self.chosen = output
        if self._routes:
            self.bank.set_active(self.bank.active, task=output)

    @property
    def _routes(self) -> bool:
        """Whether each task is a route of its own through the backbone."""
        return not self.shared and not self.bank.plan().method.one_pass

    def mergeable(self) -> str | None:
        """Return why the backbone cannot be merged for all tasks: each has weights of its own."""
        if self.chosen is not None or not self._routes:
            return None
        return "each task has weights of its own, so only one chosen task can be merged"

    def deployed(self) -> nn.Module:
        """Module to export: normalised images in, outputs by task out, or that of the chosen task."""
        network = self.network(None if self.chosen is None else [self.chosen])
        network.batched = False  # the graph holds a pass per task
        return network if self.chosen is None else OneOutput(network, self.chosen)

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors of norms and decoders by their names in files, those of the chosen task if there is one."""
        found, parts = super().head_tensors(), {f"{DECODER}{name}." for name in self.parts()}
        starts = tuple(f"{part}{self.chosen}." for part in parts)
        return {key: t for key, t in found.items() if self.chosen is None or key.startswith(starts)}

    # ------------------------------------------------------------------ data

    @classmethod
    def sized_by(cls, data: Any) -> dict[str, Any]:
        """Return the targets of the data.

        Args:
            data: A data module.

        Raises:
            ConfigError: If it has none.
        """
        if not getattr(data, "targets", None):
            raise ConfigError(f"{type(data).__name__} has no targets by task, by which a task knows its decoders.")
        return {"targets": dict(data.targets)}

    @classmethod
    def sized_by_file(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """Return the targets of a saved adapter.

        Args:
            header: The content of its ``adapter.json``.

        Raises:
            FileError: If it has none.
        """
        targets = (header.get("output") or {}).get("tasks")
        if not isinstance(targets, Mapping) or not targets:
            raise FileError("The adapter does not describe its tasks. Was it written by a run of MultiTaskDense?")
        return {"targets": dict(targets)}

    def output_names(self, data: Any) -> tuple[str, ...]:
        """Return the names of the tasks."""
        return tuple(self.targets)

    def check_outputs(self, data: Any) -> None:
        """Check that the data have labels of each task, and take their weights of the losses that were given none.

        Raises:
            DataError: If a task has no labels, or labels of another kind.
        """
        there = getattr(data, "targets", None)
        if not isinstance(there, Mapping):
            return
        for task, target in self.targets.items():
            if task not in there:
                raise DataError(
                    f"The task {task!r} has no labels in the data, which have {', '.join(there) or 'none'}. Leave it "
                    "out, or give data that have it."
                )
            if (there[task].kind, there[task].class_names) != (target.kind, target.class_names):
                raise DataError(
                    f"The labels of {task!r} in the data are {_described(there[task])}, and the task was made for "
                    f"{_described(target)}. Give the same data, or make the task for these."
                )
        weights = getattr(data, "loss_weights", None) or {}
        taken = {
            task: float(weights[task]) for task in self.targets if task in weights and task in self._weighted_by_data
        }
        self.task_weights.weights.update(taken)

    def check_data(self, data: Any) -> None:
        """Check that data fit the task and the model, and that baselines were measured on them.

        Raises:
            DataError: If targets, image sizes or batch size do not fit, or a baseline is of other images or labels.
        """
        super().check_data(data)
        if self.baselines.runs:
            self.baselines, said = compared(self.baselines, self._measured_on(data))
            for text in said:
                self._tell(text)

    def _measured_on(self, data: Any) -> dict[str, dict[str, Facts]]:
        """Describe what each task is measured on, by split; empty where the data do not say."""
        if not hasattr(data, "measured_on"):
            return {}
        rule = {task: {"absent": self.absent} if t.kind == "classes" else {} for task, t in self.targets.items()}
        return {
            task: {split: {**data.measured_on(split, task), **own} for split in SPLITS} for task, own in rule.items()
        }

    def _tell(self, text: str) -> None:
        """Log a warning once."""
        if text not in self._told:
            logger.warning("%s", text)
        self._told.add(text)

    def recall(self, run: str, metrics: Mapping[str, Any]) -> None:
        """Take the baselines of a finished run from its ``metrics.json``."""
        found = Baselines.recall(run, metrics)
        if all(set(self.targets) <= set(found.of(split)) for split in SPLITS):
            self.baselines = found

    # ------------------------------------------------------------------ steps

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute outputs (B, K, H, W) by task in float32.

        Args:
            images: Normalised images (B, 3, H, W).
        """
        assert isinstance(images, Tensor)
        return {task: values.float() for task, values in self.network()(images.to(self.base_dtype)).items()}

    def training_loss(self, output: dict[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
        """Compute the weighted loss of outputs (B, K, H, W) and labels by task; log each task's."""
        losses = self._losses("train", output, labels)
        self.task_weights.observe(losses)
        return cast(Tensor, self.task_weights(losses))

    def on_train_epoch_end(self) -> None:
        """Let the weights of the next epoch follow the losses of this one, and log changing ones."""
        if self.weighting != "fixed":
            self.log_dict({f"weight/{task}": factor for task, factor in self.task_weights.factors().items()})
        self.task_weights.end_epoch()

    def _losses(self, split: str, outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute each task's loss, before it is weighted, and log it; without an image it is 0, and weighs nothing."""
        size = len(next(iter(outputs.values())))
        losses = {
            task: self.losses[task](values, labels[task]) if size else values.new_zeros(())
            for task, values in outputs.items()
        }
        named = {f"{split}/loss_{task}": loss.detach() for task, loss in losses.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=size)
        return losses

    def measure(self, split: str, images: Tensor, labels: Mapping[str, Tensor]) -> None:
        """Compare outputs with labels by task, at the size of the labels."""
        sizes = {task: tuple(labels[task].shape[-2:]) for task in self.targets}
        outputs = {task: resized(values, sizes[task]) for task, values in self(images).items()}
        known = finite_images(outputs)
        self.outputs_seen.add(known)
        finite = {task: values[known] for task, values in outputs.items()}
        wanted = {task: labels[task][known] for task in self.targets}
        # In every process the same values are logged, also where no image of its batch is finite.
        loss = self.task_weights(self._losses(split, finite, wanted))
        self.log(f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=int(known.sum()))
        if known.any():
            for task, values in finite.items():
                self._metric(split, task).update(values, wanted[task])
        if len(self.examples) < EXAMPLES:
            kept = {"image": images}
            for task, values in outputs.items():
                kept |= {f"label/{task}": labels[task], f"prediction/{task}": decode(self.targets[task], values)}
            self.keep_examples(kept)

    def predict(self, images: Tensor, size: tuple[int, ...] | None = None) -> dict[str, Tensor]:
        """Compute predictions by task; see `vispeft.tasks.dense_outputs.decode`.

        Args:
            images: Normalised images (B, 3, H, W).
            size: Height and width of the predictions; None for those of the images.
        """
        outputs = self(images)
        self.outputs_seen.add(finite_images(outputs))
        size = size or tuple(images.shape[-2:])
        return {task: decode(self.targets[task], resized(values, size)) for task, values in outputs.items()}

    def predictor(self) -> TaskPredictor:
        """Create the predictor of images: files of each task, and a strip."""
        return TaskPredictor(self._raw, self.targets, self.bank.notes())

    def _raw(self, images: Tensor, size: tuple[int, ...]) -> dict[str, Tensor]:
        return {task: resized(values, size).cpu() for task, values in self(images.to(self.device)).items()}

    # ------------------------------------------------------------------ figures

    def _metrics(self) -> nn.ModuleDict:
        found = {task: dense_metric(target, task, self.absent) for task, target in self.targets.items()}
        return nn.ModuleDict(found)

    def _metric(self, split: str, task: str) -> Any:
        return cast(nn.ModuleDict, self.metrics[split])[task]

    def reset_metrics(self, split: str) -> None:
        """Reset the metrics of a split."""
        for task in self.targets:
            self._metric(split, task).reset()

    def figures(self, split: str) -> dict[str, Tensor]:
        """Compute the figures of each task, the score over all, and delta m where there are baselines."""
        found: dict[str, Tensor] = {}
        mains: dict[str, Tensor] = {}
        for task in self.targets:
            metric = self._metric(split, task)
            computed = metric.compute()
            mains[task] = computed[metric.main]
            found |= {f"{task}/{name}": value for name, value in computed.items()}
        higher = {task: bool(self._metric(split, task).higher_is_better) for task in self.targets}
        found["score"] = mean_score(mains, higher)
        if self.baselines:
            found["delta_m"] = mean_gain(mains, self.baselines.of(split), higher)
        self._seen[split] = self.outputs_seen.images
        left = self._left_out[split] = [task for task in mains if task not in measured(mains)]
        if 0 < len(left) < len(mains):
            means = "score and delta_m are means" if self.baselines else "score is a mean"
            others = counted(len(mains) - len(left), "other task")
            self._tell(f"No pixel of the {split} split has a label of {', '.join(left)}: {means} over {others}.")
        return found

    @property
    def curves(self) -> tuple[str, ...]:
        """The loss, what chooses the epoch, and the main figure of each task."""
        mains = [f"{task}/{self._metric('test', task).main}" for task in self.targets]
        return (*super().curves, *mains)

    def shown(self, metrics: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """Arrange metrics as one row per figure, the tasks one after the other, with the baselines beside them."""
        names = list(dict.fromkeys(name for found in metrics.values() for name in found))
        chosen = [name for task in self.targets for name in names if name.startswith(f"{task}/")]
        chosen += [name for name in names if name in ("loss", "score", "delta_m")]
        rows: dict[str, dict[str, Any]] = {
            name: {column: found.get(name) for column, found in metrics.items()} for name in chosen
        }
        for task, value in self.baselines.of("validation" if list(self._seen) == ["validation"] else "test").items():
            rows[f"{task}/{self._metric('test', task).main}"]["baseline"] = value
        left = self._left_out_of(metrics)
        return {
            f"{name} ({left})" if left and name in ("score", "delta_m") else name: row for name, row in rows.items()
        }

    def _left_out_of(self, metrics: Mapping[str, Mapping[str, Any]]) -> str:
        """Say which tasks the means of each column leave out."""
        mains = {task: f"{task}/{self._metric('test', task).main}" for task in self.targets}
        left = {
            column: [t for t, main in mains.items() if found.get(main) is None] for column, found in metrics.items()
        }
        some = {column: tasks for column, tasks in left.items() if 0 < len(tasks) < len(mains)}
        return "; ".join(f"{column} without {', '.join(tasks)}" for column, tasks in some.items())

    def details(self, split: str, outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Tell IoU by class, which figure of each task counts, and the baselines, for ``metrics.json``."""
        if split != "test":
            return {}
        mains = {task: self._metric("test", task).main for task in self.targets}
        by_class = {
            task: per_class(self._metric("test", task).per_class()["iou"], target.class_names)
            for task, target in self.targets.items()
            if target.kind == "classes"
        }
        found = {"main_figures": mains, "baselines": self.baselines.figures or None, "left_out": self._left_out}
        return {**found, MEASURED_ON: self._facts(), "test_iou": by_class}

    def _facts(self) -> dict[str, dict[str, Facts]]:
        """Describe what each task was measured on, by split, and say where that was a part of the split."""
        found = self._measured_on(self.shown_data())
        for by_split in found.values():
            for split, facts in by_split.items():
                if self._seen.get(split, facts["images"]) < facts["images"]:
                    by_split[split] = {**facts, "measured": self._seen[split]}
        return found

    # ------------------------------------------------------------------ pictures

    def draw_epoch(self, folder: Path, epoch: int) -> None:
        """Draw a strip of some validation images."""
        self.draw_examples(folder / f"strips_epoch_{epoch + 1:03d}.png")

    def draw_results(self, outputs: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> None:
        """Draw a strip of some test images."""
        self.draw_examples(folder / "strips_test.png")

    def draw_examples(self, path: Path) -> None:
        """Draw the first images of the split that was measured last: the image, each label and each prediction.

        Args:
            path: The PNG file.
        """
        if not self.examples:
            return
        pictures = [self.example_image(example, tuple(example["image"].shape[-2:])) for example in self.examples]
        labels, predictions = (
            [{task: example[f"{what}/{task}"] for task in self.targets} for example in self.examples]
            for what in ("label", "prediction")
        )
        task_strips(pictures, labels, predictions, self.targets, path)

    # ------------------------------------------------------------------ training and files

    def further_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups of norms and decoders, and of learned weights of the tasks."""
        learned = list(self.task_weights.parameters())
        own = {"params": learned, "lr": self.lr, "weight_decay": 0.0, "name": "task weights"}
        return [*super().further_groups(), *([own] if learned else [])]

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        norms = {"output_norms": bool(len(self.norms))}
        return {**super().output(), **norms, "shared": self.shared, "tasks": target_notes(self.targets)}

    def _check_output(self, path: str | Path, saved: Mapping[str, Any]) -> None:
        super()._check_output(path, saved)
        if not saved.get("tasks"):
            return
        there = as_targets(saved["tasks"])
        for task, target in self.targets.items():
            if task not in there:
                raise FileError(f"{path} was not trained for the task {task!r}; it has {', '.join(there)}.")
            if (there[task].kind, there[task].class_names) != (target.kind, target.class_names):
                raise FileError(f"{path} has {task!r} as {_described(there[task])}, not {_described(target)}.")


def _check(targets: Mapping[str, DenseTarget], method: Method, shared: bool, settings: Mapping[str, Any]) -> None:
    """Refuse what no model has to be made for."""
    for task in targets:
        if hasattr(nn.ModuleDict(), task):
            raise ConfigError(
                f"A task is called {task!r}, an attribute of PyTorch's modules, which cannot hold it. Choose another "
                f"name, such as {task + '_1'!r}."
            )
    folders = written_folders(targets)
    twice = next((task for task in targets if folders.count(task) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"A task is called {twice!r}, the name of another folder of predictions. Choose another name, such as "
            f"{twice + '_1'!r}."
        )
    if shared and getattr(method, "multi_task", False):
        raise ConfigError(f"shared=True was given, and {method.name} knows the tasks itself. Leave it out.")
    inference = settings.get("inference")
    if inference is not None and not (inference.mode == "whole" and inference.plain):
        raise ConfigError(
            "MultiTaskDense predicts whole images: normals change when an image is flipped, and windows and scales are "
            "defined for class scores alone. Leave inference out."
        )
    if settings.get("levels", "taps") != "taps":
        raise ConfigError(
            "MultiTaskDense reads the maps of each task as they are (levels='taps'). Leave levels out, and choose a "
            "decoder that reads maps of one size, such as hrnet or segformer."
        )


def _described(target: DenseTarget) -> str:
    count = len(target.class_names)
    return f"{target.kind} ({counted(count, 'class', 'classes')})" if count else target.kind
