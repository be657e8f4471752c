"""The start of a linear head: from a probe, a regularised linear model of features, or from class embeddings of a CLIP.

Training from there keeps what the frozen features already tell, and a pass over few images does not have to find it
again (linear probing, then fine-tuning: Kumar et al., arXiv 2202.10054; from the zero-shot classifier: Wortsman et al.,
arXiv 2109.01903).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vispeft.core.method import Method
from vispeft.core.modes import evaluating
from vispeft.data.base import ImageData, has_plain
from vispeft.data.cache import CachedSplit, changes_between_epochs
from vispeft.data.splitting import cross_validation
from vispeft.errors import ConfigError, DataError, TrainingError, counted
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks.logs import RunLog
from vispeft.tasks.probe import FITS, STRENGTHS, Affine, fit_path
from vispeft.tasks.state import random_state, set_random_state

__all__ = ["HeadStart", "check_head_start", "is_start"]

logger = logging.getLogger(__name__)

PROBE = "probe"
"""The setting that starts the head from a probe; any other one is a file of class embeddings."""
FOLDS = 5
"""Parts of the training images that choose a strength where validation must not choose."""
ROWS = 20_000
"""Most rows of features of a split that are kept where an image has several of them, one for each cell of a map."""
Advance = Callable[[], None]


def check_head_start(task: Any, method: Method, head_start: str | None) -> None:
    """Refuse a start from a probe that cannot be, before there is a backbone.

    Args:
        task: The task, or its class.
        method: The adapter.
        head_start: The setting.

    Raises:
        ConfigError: If there is no such start, or the head is not linear.
    """
    if head_start is None:
        return
    name = f"{getattr(task, '__name__', type(task).__name__)}(head_start={head_start!r})"
    if head_start != PROBE and not str(head_start).endswith(".safetensors"):
        raise ConfigError(
            f"{name}: choose 'probe', or a file of class embeddings (.safetensors), or None for a head that starts at "
            "random."
        )
    if head_start != PROBE and not (task.classifies and getattr(task, "target", None) == "class"):
        raise ConfigError(f"{name}: class embeddings start the classifier of the task Classification alone.")
    if getattr(task, "probe_kind", None) not in FITS:
        raise ConfigError(
            f"{name}: a probe fits a linear classifier or regression, and this task has another head (its "
            f"{task.head_name}). Leave head_start out."
        )
    if task.classifies and method.low_bit_head() != 32:
        raise ConfigError(
            f"{name}: the classifier of {method.name} has {counted(method.low_bit_head(), 'bit')} per weight and is "
            "not linear in its tensors, so that a fitted one would not survive rounding. Leave head_start out."
        )
    if task.classifies and not method.trains_head():
        raise ConfigError(
            f"{name}: the classifier of {method.name} does not train, and a fitted one would replace it. Leave "
            "head_start out (null in a config)."
        )


def is_start(module: LightningModule) -> bool:
    """Return whether a task is measured before its first step.

    Args:
        module: The task.
    """
    return bool(getattr(getattr(module, "head_start", None), "measuring", False))


@dataclass(frozen=True)
class Kept:
    """What the head sees of a split."""

    features: Tensor
    """float32 (N, width), on the CPU; one row per image, or several."""
    targets: Tensor
    """Targets of the rows, on the CPU."""


class HeadStart(Callback):
    """Fit the head of a task before the first step of a fresh training, and measure the task as it then is.

    The features are those that the head sees in evaluation: of images prepared as for an evaluation, through the model
    with the adapter at its start, behind pooling and norm, without dropout. Of a linear decoder they are those of each
    cell of its map. The strength of the regularisation is the one with the best validation figure; at equal figures
    that with the smaller loss, then the stronger one. Where the validation images choose nothing, five folds of the
    training images choose it.

    A new adapter is set to the identity first, where its form has one, so that the features are those of the frozen
    backbone. Where it has none, as prompts, the probe of the frozen features is measured as well: `frozen_is_better`
    tells whether a training has ended below it.

    From class embeddings the head is ``scale / n * T P`` (`ClassEmbeddings.linear_weight`), where n is the mean norm of
    the training images' features in the joint space, and has no bias; nothing is fitted.
    """

    def __init__(self, source: str = PROBE) -> None:
        """Begin with a head that was not fitted.

        Args:
            source: ``probe``, or a file of class embeddings, which is read when a training begins.
        """
        self.source = source
        self.due = False
        """Whether the head is to be fitted before the next step."""
        self.done = False
        """Whether it was fitted, here or before the training was gone on with."""
        self.anew = False
        """Whether it is to be fitted although the adapter is a loaded one, whose own head does not fit."""
        self.measuring = False
        """Whether the task is validated before its first step."""
        self.record: dict[str, Any] = {}
        """Strength, what chose it, numbers of images, and figures of validation; empty before the start. Of an adapter
        that cannot start at the identity also the strength and the figure of the frozen backbone's own probe."""

    def check(self, task: Any, data: Any) -> None:
        """Check that head and data allow a probe.

        Args:
            task: The task.
            data: The data module of its trainer.

        Raises:
            ConfigError: If the classifier is not a linear layer.
            DataError: If training images cannot be had without augmentation.
        """
        head, what = task.probe_layer(), f"head_start is {self.source!r}"
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise ConfigError(
                f"{what}, and the classifier is a {type(head).__name__}, which no linear model can start. Leave "
                "head_start out, or give the adapter a linear one: model.reset_classifier(num_classes)."
            )
        if not isinstance(data, ImageData):
            raise DataError(
                f"{what}, and {type(data).__name__} is no data module of vispeft, so its training images cannot be had "
                "without augmentation. Leave head_start out, or derive it from ImageData."
            )
        if self.source != PROBE:
            self.embeddings(task, data, cast(nn.Linear, head).in_features)
        split: Any = data.split("train")
        if not has_plain(split) and changes_between_epochs(split):
            raise DataError(
                f"{what}, and {type(split).__name__} does not say how its training images are without augmentation. "
                "Leave head_start out, or give it a method plain; see BatchSplit."
            )

    def embeddings(self, task: Any, data: Any, width: int) -> ClassEmbeddings:
        """Read the embeddings of the data's classes, in their order.

        Args:
            task: The task.
            data: Its data module.
            width: Number of features that the classifier takes.

        Raises:
            FileError: If the file cannot be read.
            ConfigError: If a class has no embedding, or they are for other features.
        """
        found = ClassEmbeddings.load(self.source)
        if found.projection.shape[1] != width:
            raise ConfigError(
                f"head_start is {self.source!r}, whose class embeddings are for {found.projection.shape[1]} features, "
                f"and the classifier takes {width}. Make them with the text tower of the same CLIP."
            )
        return found.ordered(task.output_names(data))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look whether the head is trained or loaded already, before methods begin."""
        # A start that failed is still due: methods have begun by then, and the task looks started.
        self.due = not self.done and (self.due or self.anew or not cast(Any, pl_module).started)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head, where that is due."""
        if not self.due:
            return
        random, began = random_state(), time.perf_counter()
        try:
            self.record = self._begin(cast(Any, pl_module), trainer)
        finally:
            set_random_state(random)  # the steps draw the same numbers as without it
        self.due, self.done = False, True
        logger.info("The start of the head took %.1f s", time.perf_counter() - began)
        self.measuring = True

    def _begin(self, task: Any, trainer: Trainer) -> dict[str, Any]:
        """Start the head, and describe the start."""
        if self.source == PROBE:
            return _start(task, trainer, fresh=not self.anew)
        data, head = cast(Any, trainer).datamodule, task.probe_layer()
        return _start_from_classes(task, trainer, self.embeddings(task, data, head.in_features))

    def measure(self, task: Any, trainer: Trainer) -> None:
        """Validate the task before its first step, if its head was fitted now; the curves then have an epoch 0.

        Args:
            task: The task.
            trainer: Its trainer, when all callbacks have begun.
        """
        if not self.measuring:
            return
        random, connector = random_state(), trainer._logger_connector
        first, logs = connector._first_loop_iter, [log for log in trainer.loggers if isinstance(log, RunLog)]
        for log in logs:
            log.at_start = True
        try:
            trainer.validating = True  # as Lightning does for the validation inside of a training
            trainer.fit_loop.epoch_loop.val_loop.run()
        finally:
            trainer.training = True
            connector._first_loop_iter, self.measuring = first, False
            for log in logs:
                log.at_start = False
            set_random_state(random)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the figures of the start, before a checkpoint is written."""
        if not self.measuring:
            return
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.record["validation"] = {
            name.partition("/")[2]: value if math.isfinite(value) else None
            for name, value in figures.items()
            if name.startswith("validation/")
        }
        monitor = cast(Any, pl_module).monitor
        logger.info("epoch 0  %s %.4f  (before the first step)", monitor, figures.get(monitor, math.nan))

    def frozen_is_better(self, score: float, mode: str) -> bool:
        """Return whether the probe of the frozen features alone is better on validation than an epoch.

        Args:
            score: The figure of the epoch.
            mode: ``max`` or ``min``.
        """
        found = self.record.get("frozen", {}).get("figure")
        return found is not None and (found > score if mode == "max" else found < score)

    def recall(self, record: Any) -> None:
        """Take over what a checkpoint says of the start.

        Args:
            record: Its entry; None in checkpoints of earlier versions.
        """
        self.done = True
        self.record = dict(record) if isinstance(record, dict) else {}


# ------------------------------------------------------------------ the steps of a start


@torch.no_grad()
def _start(task: Any, trainer: Trainer, fresh: bool) -> dict[str, Any]:
    """Fit the head, copy the result into it, and describe it; a fresh adapter starts at the identity if it can."""
    data, head = cast(Any, trainer).datamodule, task.probe_layer()
    neutral = fresh and not [unit for unit in task.bank.units().values() if not unit.to_identity()]
    chooses = data.validation_chooses and trainer.limit_val_batches != 0
    loaders = {name: _loader(trainer, name) for name in ("train", "validation") if name == "train" or chooses}
    # Kept outputs are those that the method's own part reads, so there are no features without it.
    kept_outputs = isinstance(data.split("train"), CachedSplit)
    passes = 1 if neutral or not chooses or kept_outputs else 2
    models = len(STRENGTHS) * (passes if chooses else 1 + FOLDS)
    logger.info(
        "Start from a probe: features of %s, then %d linear models of them",
        " and ".join(f"{len(loader.sampler)} {name} images" for name, loader in loaders.items()),
        models,
    )
    with _shown(trainer, "Start from a probe", passes * sum(map(len, loaders.values())) + models) as advance:
        frozen = {} if passes == 1 else {"frozen": _measure_frozen(task, trainer, loaders, advance)}
        kept = {name: _features(task, head, trainer, loader, advance) for name, loader in loaders.items()}
        strength, model, _ = _best(task, kept, head.bias is not None, advance)
    task.start_from_probe(model, kept["train"].features)
    _share(head, trainer)
    logger.info("The probe's strength %g is the best one", strength)
    return {
        "strength": strength,
        "chosen_on": "validation" if chooses else f"{FOLDS} folds of the training images",
        "images": {name: len(loader.sampler) for name, loader in loaders.items()},
        **frozen,
    }


def _measure_frozen(task: Any, trainer: Trainer, loaders: dict[str, Any], advance: Advance) -> dict[str, Any]:
    """Fit and measure the probe of the frozen backbone's own features, without the adapter."""
    with task.bank.disabled():
        layer = task.frozen_layer()
        kept = {name: _features(task, layer, trainer, loader, advance) for name, loader in loaders.items()}
    strength, _, (more, _) = _best(task, kept, True, advance)
    figure = more if task.monitor_mode == "max" else -more
    return {"strength": strength, "figure": figure if math.isfinite(figure) else None}


def _best(task: Any, kept: dict[str, Kept], bias: bool, advance: Advance) -> tuple[float, Affine, tuple[float, float]]:
    """Fit the linear models of all strengths, and choose one: by validation, else by folds of the training images."""
    path = _path(task, kept["train"], bias, advance)
    if "validation" in kept:
        judged = [_judge(task, model(kept["validation"].features), kept["validation"].targets) for _, model in path]
    else:
        judged = _judge_by_folds(task, kept["train"], bias, advance)
    best = max(range(len(path)), key=lambda index: judged[index])
    return *path[best], judged[best]


@torch.no_grad()
def _start_from_classes(task: Any, trainer: Trainer, classes: ClassEmbeddings) -> dict[str, Any]:
    """Copy the linear classifier nearest to class embeddings into the head, and describe it."""
    head, loader = task.probe_layer(), _loader(trainer, "train")
    logger.info("Start from class embeddings: features of %d train images", len(loader.sampler))
    with _shown(trainer, "Start from class embeddings", len(loader)) as advance:
        features = _features(task, head, trainer, loader, advance).features
    weight = classes.linear_weight(features)
    task.start_from_probe(Affine(weight, torch.zeros(len(weight))), features)
    _share(head, trainer)
    return {"class_embeddings": classes.source, "scale": classes.scale, "images": {"train": len(loader.sampler)}}


def _share(head: nn.Module, trainer: Trainer) -> None:
    """Give all processes the head of the first one."""
    if trainer.world_size > 1:
        for parameter in head.parameters():
            parameter.copy_(trainer.strategy.broadcast(parameter.data))


def _loader(trainer: Trainer, name: str) -> Any:
    """Return a loader of a split, prepared as for an evaluation, with as many batches as the trainer is limited to.

    Of the training images they are those of the first epoch; where the trainer overfits, those of every epoch.
    """
    data = cast(Any, trainer).datamodule
    loader = data.plain_dataloader(name)
    limit = trainer.limit_train_batches if name == "train" else trainer.limit_val_batches
    if limit is None or (isinstance(limit, float) and limit >= 1):
        return loader
    if isinstance(limit, float):
        batches = max(1, int(limit * len(loader)))
    else:
        batches = limit * trainer.world_size  # it counts for each process, and each computes the features of all
    if batches >= len(loader):
        return loader
    first: list[Any] = list(range(len(loader.dataset)))
    if name == "train" and not trainer.overfit_batches:
        first = [index[1] if isinstance(index, tuple) else index for index in data.train_dataloader().sampler]
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        sampler=first[: batches * loader.batch_size],
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,  # else the loader would draw from the global one
    )


def _features(task: Any, head: nn.Module, trainer: Trainer, loader: Any, advance: Advance) -> Kept:
    """Compute what the head sees of the images of a loader."""
    rows: list[tuple[Tensor, Tensor]] = []
    seen: list[Tensor] = []
    most = max(1, ROWS // len(loader.sampler))
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().cpu()))
    try:
        # Hooks that come after a graph was made are not part of it.
        with evaluating(task), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            for batch in loader:
                images, targets = trainer.strategy.batch_to_device(batch)[:2]
                task(images)
                rows.append(task.probe_rows(seen.pop(), images, targets.cpu(), most))
                advance()
    finally:
        hook.remove()
    features, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
    broken = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if broken:
        raise TrainingError(
            f"head_start is set, and {counted(len(broken), 'row')} of {len(features)} rows of features are not "
            f"finite, the first one is row {broken[0]}. Look at the images (vispeft doctor), or leave head_start "
            "out."
        )
    return Kept(features, targets)


def _path(task: Any, kept: Kept, bias: bool, advance: Advance) -> list[tuple[float, Affine]]:
    """Fit the linear models of all strengths."""
    targets, weights = task.for_probe(kept.targets)
    found = []
    for pair in fit_path(task.probe_kind, kept.features, targets, task.num_classes, weights=weights, bias=bias):
        found.append(pair)
        advance()
    return found


def _judge_by_folds(task: Any, kept: Kept, bias: bool, advance: Advance) -> list[tuple[float, float]]:
    """Measure the models of all strengths on training images that they were not fitted to."""
    count = min(FOLDS, len(kept.targets))
    scores = torch.zeros(len(STRENGTHS), len(kept.targets), task.num_classes)
    for fold in range(count):
        rest, held = cross_validation(kept.targets, count, fold, 0)
        path = _path(task, Kept(kept.features[rest], kept.targets[rest]), bias, advance)
        for index, (_, model) in enumerate(path):
            scores[index, held] = model(kept.features[held])
    return [_judge(task, found, kept.targets) for found in scores]


def _judge(task: Any, scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """Measure outputs as the task does: more is better in both figures, of which the first counts."""
    figures = task.judge_probe(scores.to(task.device), targets.to(task.device))
    loss, figure = (float(figures.get(name, math.nan)) for name in ("validation/loss", task.monitor))
    more = figure if task.monitor_mode == "max" else -figure
    return tuple(value if math.isfinite(value) else -math.inf for value in (more, -loss))  # type: ignore[return-value]


@contextmanager
def _shown(trainer: Trainer, what: str, total: int) -> Iterator[Advance]:
    """Show steps in the trainer's own bar, where it has one of rich: two displays at once are not possible."""
    bar: Any = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar) or bar.is_disabled or bar.progress is None:
        yield lambda: None
        return
    progress, number = bar.progress, bar._add_task(total, what)

    def advance() -> None:
        progress.update(number, advance=1)
        bar.refresh()

    try:
        yield advance
    finally:
        progress.update(number, visible=False)
        bar.refresh()
