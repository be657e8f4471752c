"""Metric learning: embeddings by which images of one class, also of classes never trained on, are near each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from vispeft.adapters.report import Report
from vispeft.core.method import Method
from vispeft.core.modes import evaluating
from vispeft.data.base import ImageData
from vispeft.errors import ConfigError, DataError, check_object, counted
from vispeft.heads.embedding import EmbeddingHead, Init, Norm
from vispeft.metrics import RetrievalScores, make_similarity
from vispeft.metrics.retrieval import GALLERY, QUERY, check_figures, clustering_scores
from vispeft.tasks.gathering import gather
from vispeft.tasks.metric_criterion import MetricCriterion, check_memory
from vispeft.tasks.metric_losses import loss_node, metric_loss, metric_miner, miner_node
from vispeft.tasks.metric_outputs import EmbeddingNetwork, ExtraState, embedding_of
from vispeft.tasks.metric_pictures import Retrieved, draw_classes, neighbour_rows
from vispeft.tasks.parts import PartsTask
from vispeft.tasks.predictions import ScorePredictor
from vispeft.tasks.processes import served
from vispeft.tasks.supervised import check_target
from vispeft.viz import draw_neighbours

__all__ = ["MetricLearning"]

logger = logging.getLogger(__name__)

PROXY_ANCHOR = "ProxyAnchorLoss"
"""The loss, if none is named."""
SPLITS = ("validation", "test")
COUNTS = ("queries", "lone_queries")
"""Figures that are numbers of images."""

Batch = tuple[Tensor, ...]
"""Images (B, 3, H, W) and labels int64 (B,), in evaluation also roles int64 (B,)."""


class MetricLearning(PartsTask):
    """Embeddings of images, trained by a loss on classes and measured by retrieval among other classes.

    A head turns the backbone's features into embeddings, which are compared by their cosine unless the loss names
    another similarity. Loss and miner are classes of pytorch-metric-learning or of `vispeft.losses`; a method may bring
    a criterion of its own (`Method.criterion`). Validation and test embed a whole split: R@K, MAP@R, R-precision and
    MRR (`vispeft.metrics.retrieval_scores`).
    """

    target: ClassVar[str] = "embedding"
    monitor = "validation/map@r"
    head_name: ClassVar[str] = "embedding head"
    by_class: ClassVar[bool] = False
    kept_outputs: ClassVar[tuple[str, ...]] = ("embeddings", "labels", "roles")
    part_forms = {**PartsTask.part_forms, "loss": loss_node, "miner": miner_node}

    def __init__(
        self,
        *,
        method: Method,
        loss: str | dict[str, Any] | None = None,
        miner: str | dict[str, Any] | None = None,
        memory: int = 0,
        dim: int | None = None,
        head_norm: Norm = "none",
        head_init: Init = "orthogonal",
        head_lr: float | None = None,
        proxy_lr: float | None = None,
        proxy_weight_decay: float | None = None,
        warm_epochs: int = 0,
        ks: tuple[int, ...] = (1, 2, 4, 8),
        lone: Literal["count_as_miss", "drop"] = "count_as_miss",
        clusters: bool = False,
        **settings: Any,
    ) -> None:
        """Create the backbone, attach the adapter, make head and criterion, and check that all of it trains.

        Args:
            method: The adapter.
            loss: A class of ``pytorch_metric_learning.losses`` or `vispeft.losses`: its name, or ``name`` with
                ``init_args``. Number of classes and width of the embeddings are filled in. None takes Proxy-Anchor, or
                the criterion of a method that brings one, which is used in place of any loss.
            miner: A class of ``pytorch_metric_learning.miners``, in the same form; None for all pairs.
            memory: Number of embeddings of earlier batches that a batch is compared with (cross-batch memory, arXiv
                1912.06798); 0 for none.
            dim: Width of the embeddings; None for that of the features.
            head_norm: Layer norm of the head; see `vispeft.heads.embedding.EmbeddingHead`.
            head_init: Start of the head.
            head_lr: Highest learning rate of the head; None takes `lr`.
            proxy_lr: Highest learning rate of the proxies and other parameters of the loss; None takes `lr`.
                Proxy-Anchor takes 100 times that of the backbone.
            proxy_weight_decay: Weight decay of the loss's matrices; None takes `weight_decay`.
            warm_epochs: First epochs, in which head and loss train alone.
            ks: The K of the R@K.
            lone: How queries without a relevant neighbour count: as a miss (``count_as_miss``), or not at all
                (``drop``).
            clusters: Whether the test also compares the clusters of k-means with the classes (NMI, AMI), which takes
                long for many classes.
            settings: Settings of `AdapterTask`; ``num_classes`` is the number of training classes.

        Raises:
            ConfigError: If a setting is out of range, or loss, miner and memory do not fit together.
            UnknownNameError: If there is no such loss or miner, or it has no such argument.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        check_object(type(self).__name__, "method", method, Method)
        for name, value in (("head_lr", head_lr), ("proxy_lr", proxy_lr)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"MetricLearning({name}={value}): a finite number above 0 is needed.")
        if proxy_weight_decay is not None and not 0 <= proxy_weight_decay < float("inf"):
            raise ConfigError(
                f"MetricLearning(proxy_weight_decay={proxy_weight_decay}): a finite number from 0 on is needed."
            )
        for name, value in (("warm_epochs", warm_epochs), ("memory", memory)):
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"MetricLearning({name}={value}): a whole number from 0 on is needed.")
        EmbeddingHead.check(1, 1 if dim is None else dim, head_norm, head_init)
        check_figures(ks, lone)
        super().__init__(method=method, **settings)
        self.memory, self.warm_epochs, self.clusters = memory, warm_epochs, clusters
        self.parts_lr, self.proxy_lr, self.proxy_weight_decay = head_lr, proxy_lr, proxy_weight_decay
        width = self._width()
        dim = width if dim is None else dim
        self.head, fresh = (EmbeddingHead(width, dim, norm=head_norm, init=head_init) for _ in range(2))
        own = method.criterion(self.model, fresh, self.num_classes, self.head.dim)
        if own is not None and (miner is not None or memory):
            raise ConfigError(f"{method.name} brings its own criterion, without a miner and a memory. Leave them out.")
        if own is not None and loss is not None:  # a config for all methods may name one
            name = loss_node(loss)["name"].rpartition(".")[2]
            logger.warning("%s brings its own criterion, and the loss %s is not used.", method.name, name)
        self.criterion = self._criterion(PROXY_ANCHOR if loss is None else loss, miner) if own is None else own
        if self.ema is not None and getattr(self.criterion, "steps_each_batch", False):
            raise ConfigError(
                "MetricLearning(ema=...) averages each trained tensor over the steps, and class prompts in host memory "
                "have other rows in every step. Leave ema out, or keep them on the device (bank=False)."
            )
        self.similarity = make_similarity(getattr(self.criterion, "similarity", "cosine"))
        scores = {name: RetrievalScores(tuple(ks), self.similarity, lone) for name in SPLITS}
        self.scores = nn.ModuleDict(scores)
        self.counts: dict[str, dict[str, int]] = {}
        """Numbers of queries by split, and of those without a relevant neighbour."""
        self.verify()

    def _width(self) -> int:
        """Count the features of the adapted backbone, which some methods make more of."""
        image = torch.zeros(1, 3, *self.preprocessing.size, dtype=self.base_dtype)
        with evaluating(self.model), torch.no_grad():
            return int(self.model(image).shape[1])

    def _criterion(self, loss: str | dict[str, Any], miner: str | dict[str, Any] | None) -> MetricCriterion:
        dim = self.head.dim
        chooser = None if miner is None else metric_miner(miner)
        criterion = MetricCriterion(metric_loss(loss, self.num_classes, dim), chooser, self.memory, dim)
        criterion.check(self.num_classes, dim)
        return criterion

    # ------------------------------------------------------------------ parts

    def parts(self) -> dict[str, nn.Module]:
        """The head."""
        return {"head": self.head}

    @property
    def normalised(self) -> bool:
        """Whether embeddings have length one; otherwise the similarity prepares them."""
        return self.similarity.name == "cosine"

    def verify(self) -> None:
        """Check that every trainable tensor of the adapter receives a gradient through the head."""
        self.bank.verify(EmbeddingNetwork(self.model, self.head, False))

    def deployed(self) -> nn.Module:
        """Module to export: normalised images in, embeddings out."""
        return EmbeddingNetwork(self.model, self.head, self.normalised)

    def plain_head(self) -> nn.Linear | None:
        """The linear layer of a head without a norm, which can be timm's classifier."""
        return self.head.proj if self.head.norm_kind == "none" else None

    # ------------------------------------------------------------------ data

    def check_data(self, data: Any) -> None:
        """Check that data fit the task and the model, as far as they are described.

        Args:
            data: A data module.

        Raises:
            DataError: If the kind of target, the image size or the batch size do not fit.
        """
        check_target(type(self), data)
        super().check_data(data)
        least, found = getattr(self.criterion, "least_per_class", 1), getattr(data, "images_per_class", None)
        if found is not None and found < least:
            raise DataError(
                f"A training batch has {counted(found, 'image')} of each class, and the loss compares {least}. Set "
                f"data.images_per_class to {least} or more."
            )
        size = data.batch_together if isinstance(data, ImageData) else getattr(data, "batch_size", 1)
        check_memory(self.memory, size)

    # ------------------------------------------------------------------ steps

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Compute embeddings (B, d) in float32: of length one, or as the similarity prepares them.

        Args:
            images: Normalised images (B, 3, H, W), or the frozen backbone's outputs for them.
        """
        return embedding_of(self._head_of(super().forward(images)), self.normalised)

    def _head_of(self, features: Any) -> Tensor:
        """Compute outputs of the head (B, d) in float32, also under autocast: small differences decide about ranks."""
        with torch.autocast(self.device.type, enabled=False):
            return self.head(features.float())

    @property
    def warming(self) -> bool:
        """Whether head and criterion train alone in this epoch."""
        return self.current_epoch < self.warm_epochs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of a batch."""
        images, labels = batch[0], batch[1]
        reads = self.bank.reads_result() and not self.warming
        with torch.set_grad_enabled(not self.warming):
            features, result = self.answered(images) if reads else (super().forward(images), None)
        outputs = self._head_of(features)
        loss: Tensor = self.criterion(
            outputs, labels, images if isinstance(images, Mapping) else images.to(self.base_dtype)
        )
        if not self.warming:
            loss = self.with_method_loss(loss, (images, labels), outputs, result)
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def on_after_backward(self) -> None:
        """Drop gradients that reach the adapter in a warm-up, such as through a second pass of the criterion."""
        if self.warming:
            for _, parameter in self.bank.trainable_parameters():
                parameter.grad = None

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Embed a batch of the validation split."""
        return self._embed("validation", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Embed a batch of the test split."""
        return self._embed("test", batch)

    def _embed(self, split: str, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch[0], batch[1]
        roles = batch[2] if len(batch) > 2 else torch.zeros_like(labels)
        embeddings = self(images)
        places = served(self._trainer, split, self.outputs_seen.images, len(labels)).to(labels.device)
        known = self.outputs_seen.known(embeddings)
        self._scores(split).update(embeddings[known], labels[known], roles[known], places[known])
        return {"embeddings": embeddings, "labels": labels, "roles": roles}

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Compute embeddings (B, d)."""
        return self(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def predictor(self) -> ScorePredictor:
        """Create the predictor of images: the entries of the embedding of each."""
        return ScorePredictor(
            lambda images: self.predict_step(images.to(self.device, non_blocking=True), 0),
            lambda values: [f"{value:.7g}" for value in values.tolist()],
            [f"e{number}" for number in range(self.head.dim)],
            self.bank.notes(),
        )

    # ------------------------------------------------------------------ figures

    def _scores(self, split: str) -> RetrievalScores:
        return cast(RetrievalScores, self.scores[split])

    def on_validation_epoch_start(self) -> None:
        """Forget the embeddings of an earlier split."""
        self._scores("validation").reset()

    def on_test_epoch_start(self) -> None:
        """Forget the embeddings of an earlier split."""
        self._scores("test").reset()

    def on_validation_epoch_end(self) -> None:
        """Log the figures of the validation split."""
        self._log_figures("validation")

    def on_test_epoch_end(self) -> None:
        """Log the figures of the test split."""
        self._log_figures("test")

    def _log_figures(self, split: str) -> None:
        scores = self._scores(split)
        # Of all processes: they compute together or not at all, and one may have queries alone.
        roles = gather(torch.cat([torch.zeros(0, dtype=torch.long, device=self.device), *scores.roles]))
        found: dict[str, Tensor] = {name: torch.tensor(torch.nan) for name in self.figure_names(split)}
        if (roles != GALLERY).any() and (roles != QUERY).any():  # some batches of a split may have queries alone
            found = scores.compute()
        self.counts[split] = {name: int(found[name]) for name in COUNTS if name in found}
        self.log_dict({f"{split}/{name}": value for name, value in found.items() if name not in COUNTS})
        scores.reset()  # or every checkpoint would hold the embeddings of the split

    def figure_names(self, split: str) -> list[str]:
        """List the names of the figures of a split.

        Args:
            split: validation or test.
        """
        return [*(f"recall@{k}" for k in self._scores(split).ks), "map@r", "r_precision", "mrr"]

    @property
    def curves(self) -> tuple[str, ...]:
        """Names of the metrics that learning curves show."""
        return (*super().curves, f"recall@{min(self._scores('validation').ks)}")

    def details(self, split: str, outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Tell the numbers of queries, and how clusters fit the classes where asked for."""
        found: dict[str, Any] = {f"{split}_{name}": count for name, count in self.counts.get(split, {}).items()}
        if split == "test":
            found["similarity"] = self.similarity.to_dict()
            known = outputs["embeddings"].isfinite().all(1)
            if self.clusters and known.any():
                scores = clustering_scores(outputs["embeddings"][known], outputs["labels"][known], self.similarity)
                found |= {f"test_{name}": value for name, value in scores.items()}
        return found

    def report(self) -> Report:
        """Count the parameters of the adapter, of the head, and of the criterion."""
        own = getattr(self.criterion, "trainable", None)  # where some are not parameters of PyTorch
        count = sum(p.numel() for p in self.criterion.parameters()) if own is None else int(own)
        return replace(super().report(), criterion=count)

    # ------------------------------------------------------------------ pictures

    def draw_epoch(self, folder: Path, epoch: int) -> None:
        """Draw the neighbours of some validation images."""
        if self._scores("validation").labels and not self.outputs_seen.broken:
            found = self._scores("validation").collected()
            self._draw(*found, "validation", folder / f"neighbours_epoch_{epoch + 1:03d}.png")

    def draw_results(self, outputs: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> None:
        """Draw the neighbours of some test images, and the embeddings of some classes."""
        found = [outputs[name] for name in self.kept_outputs]
        if not found[0].isfinite().all():
            return
        self._draw(*found, "test", folder / "neighbours_test.png")
        prepared = self.similarity.prepare(found[0].float())
        draw_classes(
            prepared, found[1], getattr(self.shown_data(), "label_names", None), folder / "embeddings_test.png"
        )

    def _draw(self, embeddings: Tensor, labels: Tensor, roles: Tensor, split: str, path: Path) -> None:
        data = self.shown_data()
        if not isinstance(data, ImageData):
            return
        retrieved = Retrieved(embeddings, labels, roles, self.similarity)
        images: Any = data.split(split)
        names = getattr(data, "label_names", None)
        rows = neighbour_rows(retrieved, lambda index: self.as_picture(images[index][0]), names)
        if rows:
            draw_neighbours(rows, path)

    # ------------------------------------------------------------------ training

    def further_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups of the head, of the proxies, and of other parameters of the criterion."""
        criterion, named = self.criterion, getattr(self.criterion, "proxy_tensors", None)
        proxies, others = [], []
        for name, parameter in criterion.named_parameters():
            (proxies if named is None or name in named else others).append(parameter)
        rate = self.lr if self.proxy_lr is None else self.proxy_lr
        decay = self.weight_decay if self.proxy_weight_decay is None else self.proxy_weight_decay
        return [
            *super().further_groups(),
            *self.groups_of("proxies", proxies, rate, decay),
            *self.groups_of("criterion", others, self.lr, self.weight_decay),
        ]

    def configure_optimizers(self) -> Any:
        """Create the optimiser, and let the criterion know it if it wants to.

        Raises:
            ConfigError: If gradients of several batches are summed, and the criterion needs a step after each.
        """
        found = super().configure_optimizers()
        summed = self.trainer.accumulate_grad_batches
        if summed > 1 and getattr(self.criterion, "steps_each_batch", False):
            raise ConfigError(
                f"trainer.accumulate_grad_batches is {summed}, and class prompts in host memory change after each "
                "batch. Leave it at 1, or keep them on the device (bank=False)."
            )
        if hasattr(self.criterion, "watch"):
            self.criterion.watch(cast(Any, found)["optimizer"])
        return found

    # ------------------------------------------------------------------ checkpoints and files

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the frozen tensors from a checkpoint, and add what the criterion keeps besides tensors."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["criterion"] = ExtraState.of(self.criterion)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what the criterion keeps besides tensors, which may change their shapes, and check the tensors."""
        ExtraState.put(self.criterion, checkpoint.get("criterion") or {})
        super().on_load_checkpoint(checkpoint)

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        head = {"dim": self.head.dim, "norm": self.head.norm_kind}
        return {
            "target": self.target,
            "head": head,
            "similarity": self.similarity.to_dict(),
            "normalised": self.normalised,
        }
