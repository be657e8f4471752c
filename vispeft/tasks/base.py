"""The base of all tasks: the adapted backbone, the optimiser, small checkpoints, and the guard against NaN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from vispeft.adapters.attach import attach, load
from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.report import Report
from vispeft.backbones.create import create_model
from vispeft.core.arguments import ChecksArguments
from vispeft.core.families import unwrap
from vispeft.core.method import Method
from vispeft.data.by_name import names_of
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError, DataError, FileError, check_object, counted
from vispeft.tasks.averaged import averaged_weights, check_schedule_free, ends_of
from vispeft.tasks.callbacks import FiniteGuard, MethodHooks
from vispeft.tasks.checkpoint_form import check_output, check_shapes, take_shapes
from vispeft.tasks.checkpoints import read_checkpoint
from vispeft.tasks.ema import EMA, check_average
from vispeft.tasks.finite import OutputCount
from vispeft.tasks.head_start import HeadStart, check_head_start
from vispeft.tasks.layer_decay import decay_by_layer
from vispeft.tasks.migration import rename_heads
from vispeft.tasks.optimizers import ClipsGradients, check_optimizer, make_optimizer, optimizer_node
from vispeft.tasks.predictions import Predictor
from vispeft.tasks.processes import LogsTogether
from vispeft.tasks.schedules import check_decay, warmup_decay
from vispeft.tasks.setting_checks import check_numbers
from vispeft.tasks.trainer_checks import check_averaging, check_precision, steps_per_epoch

__all__ = ["AdapterTask"]


class AdapterTask(ChecksArguments, LogsTogether, ClipsGradients):
    """Base of every task: a frozen backbone with an adapter, an optimiser, a warm-up and a decay.

    Checkpoints hold the tensors that training changes and nothing of the frozen backbone.
    """

    monitor: str
    """Name of the validation metric that selects the best epoch."""
    monitor_mode: str = "max"
    """Whether more or less of it is better: ``max`` or ``min``."""
    least_outputs: ClassVar[int] = 2
    """Smallest number of outputs the task supports."""
    kept_outputs: ClassVar[tuple[str, ...]] = ()
    """Results of an evaluation step that are collected over all images, for `details` and `draw_results`."""
    classifies: ClassVar[bool] = True
    """Whether the outputs are those of the backbone's classifier; otherwise the task has a decoder."""
    head_name: ClassVar[str] = "classifier"
    """Noun for what turns features into outputs, for messages; its last word is in the names of files."""
    by_class: ClassVar[bool] = True
    """Whether the outputs belong to the classes of the data; otherwise data of any classes can be measured."""
    ordered: ClassVar[bool] = True
    """Whether the order of the outputs' names has a meaning; otherwise outputs are matched by name."""
    part_forms: ClassVar[Mapping[str, Callable[[Any], Any]]] = {"optimizer": optimizer_node}
    """Arguments that name a class on a closed list of their own, and the function that checks and expands one."""

    def __init__(
        self,
        *,
        backbone: str,
        method: Method,
        num_classes: int,
        backbone_args: dict[str, Any] | None = None,
        weights: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
        layer_decay: float = 1.0,
        ema: float = 0.0,
        base_dtype: Literal["float32", "bfloat16"] = "float32",
        schedule: Literal["cosine", "poly"] = "cosine",
        schedule_epochs: int | None = None,
        lr_ends: tuple[float, float] = (0.0, 0.0),
        final_lr: float | None = None,
        decay_tables: bool = False,
        decay_vectors: bool = False,
        optimizer: str | dict[str, Any] = "AdamW",
        head_start: str | None = None,
    ) -> None:
        """Create the backbone, attach the adapter and verify it.

        Args:
            backbone: Name of a timm model, or ``zoo:NAME``.
            method: The adapter.
            num_classes: Number of classes; configs take it from the data.
            backbone_args: Further arguments for ``timm.create_model``, such as ``pretrained`` or ``img_size``.
            weights: File with the backbone's weights, instead of pretrained ones.
            lr: Highest learning rate.
            weight_decay: Weight decay of matrices; vectors have none, unless `decay_vectors` is set.
            warmup: Fraction of all steps in which the learning rate rises.
            layer_decay: Learning rate of a layer relative to the next one, for methods that train the backbone.
            ema: Decay of the exponential moving average of the trained tensors, which is then validated and saved; 0
                for none.
            base_dtype: Type of the frozen backbone; adapter and head are float32 in any case.
            schedule: How the learning rate falls after the warm-up: half a cosine, or a polynomial of power 0.9.
            schedule_epochs: Epochs from the start of the training to the end of the decay, at least as many as are
                trained; a longer decay is cut off by the end of the training. None for the length of the training.
            lr_ends: Learning rates at the start of the warm-up and at the end of the decay, relative to `lr`.
            final_lr: Learning rate of all parameters at the end of the decay, instead of a share of each one's own in
                `lr_ends`.
            decay_tables: Let position embeddings and tables of relative positions decay too, which timm exempts.
            decay_vectors: Let biases, gains of norms and other vectors decay too.
            optimizer: A name of ``torch.optim``, ``timm.optim.NAME`` or ``schedulefree.NAME``; or ``class_path`` (the
                name) with ``init_args``, such as ``momentum``. Learning rate and decay are `lr` and `weight_decay`.
            head_start: ``probe`` starts a linear head from a regularised linear model of the features that it sees
                before the first step, and a file of class embeddings (``.safetensors``) from the text tower of a CLIP;
                see `vispeft.tasks.HeadStart`. None leaves it at random.

        Raises:
            ConfigError: If a number is out of range, or the backbone is unknown.
            BackboneError: If the backbone is not supported.
            SiteError: If the method finds no site.
            VerificationError: If a trainable tensor receives no gradient.
        """
        super().__init__()
        check_object(type(self).__name__, "method", method, Method)
        self.lr, self.weight_decay, self.warmup, self.num_classes = lr, weight_decay, warmup, num_classes
        self.schedule, self.schedule_epochs, self.final_lr = schedule, schedule_epochs, final_lr
        self.lr_ends, self.decay_tables, self.decay_vectors = tuple(lr_ends), decay_tables, decay_vectors
        check_numbers(type(self), {**vars(self), "layer_decay": layer_decay, "ema": ema, "base_dtype": base_dtype})
        check_decay(type(self).__name__, schedule)
        self.optimizer = check_schedule_free(check_optimizer(optimizer, weight_decay), ema, final_lr)
        check_head_start(self, method, head_start)
        self.head_start = None if head_start is None else HeadStart(head_start)
        taken = sorted({"num_classes", "weights"} & set(backbone_args or {}))
        if taken:
            raise ConfigError(f"backbone_args has {', '.join(taken)}, which {type(self).__name__} takes by that name.")
        self.strict_loading = False  # checkpoints have no frozen tensors; on_load_checkpoint checks the others
        self.backbone, self.backbone_args, self.weights = backbone, dict(backbone_args or {}), weights
        outputs = num_classes if self.classifies else 0
        self.model: nn.Module = create_model(backbone, num_classes=outputs, weights=weights, **self.backbone_args)
        self.preprocessing = Preprocessing.of(self.model)
        self.base_dtype: torch.dtype = getattr(torch, base_dtype)
        self.model.to(self.base_dtype)
        # A task without a classifier verifies through the layers that it puts behind the backbone.
        self.bank: AdapterBank = attach(self.model, method, tasks=self.adapter_tasks(), verify=self.classifies)
        if layer_decay != 1 and not method.trains_base:
            raise ConfigError(
                f"{type(self).__name__}(layer_decay={layer_decay}): {method.name} does not train the backbone's "
                "layers. Leave layer_decay out, or use the method full."
            )
        self.layer_decay = layer_decay
        self.ema = EMA(ema) if ema else None
        self.outputs_seen = OutputCount()
        """Images of the split that was measured last, and those whose outputs are not finite."""
        self.started = False
        """Whether the adapter has left its initial values, by training or by loading a file."""

    def adapter_tasks(self) -> Sequence[str] | None:
        """Return the tasks of the adapter, for `attach`; None for an adapter without tasks."""
        return None

    @classmethod
    def sized_by(cls, data: Any) -> dict[str, Any]:
        """Return the arguments of this class that the data decide.

        Args:
            data: A data module.

        Raises:
            ConfigError: If the data do not say.
        """
        if not hasattr(data, "num_classes"):
            raise ConfigError(f"{type(data).__name__} has no num_classes, by which a task knows how wide its head is.")
        return {"num_classes": int(data.num_classes)}

    @classmethod
    def sized_by_file(cls, header: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same arguments for a saved adapter.

        Args:
            header: The content of its ``adapter.json``.

        Raises:
            FileError: If it does not say.
        """
        return {"num_classes": len(header["class_names"])}

    def output_names(self, data: Any) -> tuple[str, ...]:
        """Return names of the outputs, from the data or as numbers.

        Args:
            data: A data module.
        """
        return names_of(data, self.num_classes)

    @property
    def curves(self) -> tuple[str, ...]:
        """Names of the metrics that learning curves show, without the split's."""
        return ("loss", self.monitor.partition("/")[2])

    def shown(self, metrics: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
        """Arrange metrics for a printed table.

        Args:
            metrics: Metrics by the row's name, such as that of the split.

        Returns:
            Figures by row and column.
        """
        return metrics

    def recall(self, run: str, metrics: Mapping[str, Any]) -> None:
        """Take from a finished run, which is measured again, what its figures are compared with; by default nothing.

        Args:
            run: Name of the run, for messages.
            metrics: Content of its ``metrics.json``.
        """

    def report(self) -> Report:
        """Count the parameters of the adapter, and of a decoder that trains with it."""
        return self.bank.report()

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter, together with the tensors of the task.

        Args:
            path: Its directory.

        Raises:
            FileError: If it cannot be written.
        """
        self.bank.save(path)

    def load_adapter(self, path: str | Path) -> None:
        """Replace the adapter by a saved one.

        Args:
            path: Its directory.

        Raises:
            FileError: If a file is missing, truncated or altered, or the adapter was trained for another task.
            BaseMismatchError: If it was trained on another backbone.
        """
        for name in self.bank.names:
            self.bank.detach(name)
        self.bank = load(self.model, path)
        self._check_output(path, self.bank.notes().get("output") or {})
        self.started = True

    def _check_output(self, path: str | Path, saved: Mapping[str, Any]) -> None:
        """Refuse an adapter whose outputs are read in another way than this task's.

        Args:
            path: Its directory, for the message.
            saved: Its note on outputs; one of earlier versions may be empty.

        Raises:
            FileError: If target, or the decoder, are others.
        """
        check_output(self.output(), saved, path)

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors of the task's head, by their names in files."""
        return {key: tensor for key, tensor in self.bank.state_dict().items() if key.startswith("head/")}

    def take(self, units: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a saved adapter.

        Args:
            units: Those of its units.
            head: Those of its head, all of them or none.

        Raises:
            FileError: If one is missing, unknown, of another shape, or not finite.
        """
        self.bank.load_state_dict({**units, **head})
        self.started = True

    def restore(self, checkpoint: str | Path) -> int:
        """Load the weights of a checkpoint of this task, those of the EMA if there is one.

        Args:
            checkpoint: Its file.

        Returns:
            The epoch after which it was written, counted from zero.

        Raises:
            FileError: If it cannot be read, or belongs to another method or backbone.
        """
        content = read_checkpoint(checkpoint)
        self.on_load_checkpoint(content)
        averaged = content["average"]["tensors"] if self.ema is not None else {}
        check_shapes(averaged, self.state_dict(), checkpoint)
        self.load_state_dict({**content["state_dict"], **averaged}, strict=False)
        return int(content.get("epoch", 0))

    def verify(self) -> None:
        """Check that every trainable tensor of the adapter receives a gradient.

        Raises:
            VerificationError: If one gets none.
        """
        self.bank.verify()

    def forward(self, images: Tensor | Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Run the adapted model.

        Args:
            images: Normalised images (B, 3, H, W), or the frozen backbone's outputs for them (see `Method.cacheable`).

        Returns:
            Class scores (B, classes); outputs by name in a task with several.
        """
        if isinstance(images, Mapping):
            return self.bank.plan().method.from_outputs(self.model, images)
        return cast(Tensor, self.model(images.to(self.base_dtype)))

    def deployed(self) -> nn.Module:
        """Module to export: normalised images (B, 3, H, W) in, scores out."""
        return self.model

    def choose(self, output: str) -> None:
        """Choose the only output to deploy, for good, in a task that has several.

        Args:
            output: Its name.

        Raises:
            ConfigError: If there is one alone.
        """
        raise ConfigError(f"The task {output!r} was asked for, and {type(self).__name__} has one output. Leave it out.")

    def plain_head(self) -> nn.Linear | None:
        """Return the task's own head where it can be timm's classifier in a merged model; None where it cannot."""
        return None

    def mergeable(self) -> str | None:
        """Return why the backbone cannot be merged for all outputs at once; None if it may be tried."""
        return None

    def predictor(self) -> Predictor:
        """Create the predictor of images: rows of a table, and pictures.

        Raises:
            ConfigError: If the task does not say how it predicts.
        """
        raise ConfigError(f"{type(self).__name__} does not say how images are predicted; give it a `predictor` method.")

    def size_step(self) -> tuple[int, int]:
        """Divisors of the height and width of images: the patch size in pixels."""
        height, width = cast(Any, unwrap(self.model)).patch_embed.patch_size
        return int(height), int(width)

    def class_names(self) -> list[str]:
        """Names of the outputs: those noted for the adapter's file, or numbers."""
        return list(self.bank.notes().get("class_names") or map(str, range(self.num_classes)))

    def check_data(self, data: Any) -> None:
        """Check that data fit the model, as far as they are described.

        Args:
            data: A data module.

        Raises:
            DataError: If the outputs or the image size do not fit.
        """
        self.check_outputs(data)
        wanted, made_for = getattr(data, "preprocessing", self.preprocessing).size, self.preprocessing.size
        patches = getattr(unwrap(self.model), "patch_embed", None)
        if getattr(patches, "strict_img_size", False) and tuple(wanted) != tuple(made_for):
            raise DataError(
                f"The images have {wanted[0]} x {wanted[1]} pixels, and {self.backbone} was made for "
                f"{made_for[0]} x {made_for[1]}. Leave data.image_size out, or give the backbone img_size "
                "(model.backbone_args.img_size), or flexible_size."
            )

    def check_outputs(self, data: Any) -> None:
        """Check that data have the outputs the model was made for.

        Args:
            data: A data module.

        Raises:
            DataError: If the number of classes differs.
        """
        classes = getattr(data, "num_classes", self.num_classes)
        if classes != self.num_classes:
            raise DataError(
                f"The data have {counted(classes, 'class', 'classes')}, and the model was made for {self.num_classes}. "
                f"Make it with num_classes={classes}."
            )

    def setup(self, stage: str) -> None:
        """Check the adapters and the trainer's data before the first step.

        Raises:
            ConfigError: If more or fewer than one adapter acts, or the trainer's precision or a callback cannot train
                this task.
            DataError: If class count or image size do not fit.
        """
        check_precision(self.trainer.precision)
        if stage == "fit":
            check_averaging(self.trainer)
        acting = self.bank.active
        if len(acting) != 1:
            raise ConfigError(
                f"A task trains, measures and saves one adapter, and {len(acting)} act here "
                f"({', '.join(acting) or 'none'}). Choose one: task.bank.set_active(NAME). A loop of your own can run "
                "several."
            )
        self.check_data(getattr(self.trainer, "datamodule", None))

    # ------------------------------------------------------------------ training

    def trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """List the tensors that train: those the bank declares, and the task's own, by state-dict name.

        The list does not depend on ``requires_grad``, which a schedule may switch off for a step.
        """
        declared = {id(p) for _, p in self.bank.trainable_parameters()} | {id(p) for p in self.own_parameters()}
        return [(name, p) for name, p in self.named_parameters() if id(p) in declared]

    def own_parameters(self) -> list[nn.Parameter]:
        """List the tensors that train besides the adapter and its classifier: by default all outside the backbone.

        A task that holds a frozen module of its own overrides this and leaves that module out.
        """
        return [p for name, p in self.named_parameters() if not name.startswith("model.")]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Create the optimiser over the groups of adapter and task, and its schedule."""
        groups = self.bank.parameter_groups(self.lr, self.weight_decay, self.decay_tables, self.decay_vectors)
        if self.layer_decay != 1:
            groups = decay_by_layer(unwrap(self.model), groups, self.layer_decay)
        optimizer = make_optimizer(self.optimizer, [*groups, *self.further_groups()], self.scaled)
        steps: Any = self.trainer.estimated_stepping_batches
        length = None if self.schedule_epochs is None else self.schedule_epochs * steps_per_epoch(self.trainer)
        schedule = warmup_decay(
            optimizer, steps, self.warmup, self.schedule, ends_of(self), length=length, final_lr=self.final_lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def further_groups(self) -> list[dict[str, Any]]:
        """Return optimiser groups of the task's own tensors; each has a ``name``."""
        return []

    def answered(self, images: Tensor | Mapping[str, Tensor]) -> tuple[Any, Any]:
        """Run the model in a training step.

        Args:
            images: As for `forward`.

        Returns:
            The output, and the run result where the loss of a method reads it; else None.

        Raises:
            ConfigError: If a method reads the run result, and features of a frozen backbone are trained on.
        """
        if not self.bank.reads_result():
            return self(images), None
        if isinstance(images, Mapping):
            raise ConfigError(
                "The loss of a method reads a run of the backbone, and this training runs on kept features. Leave "
                "cache_features out."
            )
        result = cast(Any, self.model).run(images.to(self.base_dtype))
        return self.output_of(images, result), result

    def output_of(self, images: Tensor | Mapping[str, Tensor], result: Any) -> Any:
        """Compute the output of `forward` from a run of the backbone.

        Args:
            images: The images.
            result: Their run.
        """
        model: Any = self.model
        return model.forward_head(model.features(result))

    def with_method_loss(self, loss: Tensor, batch: Any, output: Any, result: Any = None) -> Tensor:
        """Add the losses of the methods to the loss of a training step, and log their sum.

        Args:
            loss: Loss of the task, a scalar.
            batch: The batch of the step; its last entry is as long as the batch, or has targets by name that are.
            output: The model's output for it.
            result: The run result of the forward pass, where a method reads it.
        """
        term = self.bank.loss_terms(batch, output, result)
        if term is None:
            return loss
        targets = batch[-1]
        size = len(next(iter(targets.values())) if isinstance(targets, Mapping) else targets)
        self.log("train/method_loss", term.detach(), on_step=False, on_epoch=True, batch_size=size)
        return loss + term

    def on_train_start(self) -> None:
        """Measure the start from a probe, when all callbacks have begun."""
        if self.head_start is not None:
            self.head_start.measure(self, self.trainer)

    def on_train_epoch_start(self) -> None:
        """Log the learning rate at the start of the epoch."""
        self.log("lr", cast(Any, self.lr_schedulers()).get_last_lr()[0], on_epoch=True)

    def output(self) -> dict[str, Any]:
        """Describe how outputs are read, for the adapter's file."""
        return {}

    def details(self, split: str, outputs: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
        """Compute further metrics for ``metrics.json``, after a split was measured.

        Args:
            split: validation or test.
            outputs: The results named by `kept_outputs`, of all images.
            names: Names of the outputs.
        """
        return {}

    def draw_epoch(self, folder: Path, epoch: int) -> None:
        """Draw plots after an epoch was measured on the validation split, if the task has any.

        Args:
            folder: Folder for the plots.
            epoch: Counted from zero.
        """

    def draw_results(self, outputs: Mapping[str, Tensor], names: Sequence[str], folder: Path) -> None:
        """Draw the results on the test split.

        Args:
            outputs: The results named by `kept_outputs`, of all images.
            names: Names of the outputs.
            folder: Folder for the plots.
        """

    def configure_callbacks(self) -> list[Callback]:
        """Add the hooks and schedules of the methods, the guard against values that are not finite, and the EMA."""
        # Hooks come first: the guard checks the gradients after them, and the EMA starts at the values they set.
        own = [part for part in (self.head_start, self.ema, averaged_weights(self)) if part is not None]
        return [MethodHooks(), *self.bank.callbacks(), FiniteGuard(), *own]

    # ------------------------------------------------------------------ checkpoints

    def _changed(self) -> set[str]:
        """Names of the tensors that training can change: trained ones, and buffers except the frozen backbone's.

        Tensors of frozen adapters belong to them, since a schedule may freeze one that was trained before.
        """
        tensors = [t for name in self.bank.names for t in self.bank.named_tensors(name).values()]
        kept = {id(t) for t in [*tensors, *self.own_parameters()]}
        trained = {name for name, p in self.named_parameters() if id(p) in kept}
        owners = {name.rpartition(".")[0] for name in trained}
        whole = any(self.bank.plan(name).method.trains_base for name in self.bank.names)
        return trained | {
            name
            for name, _ in self.named_buffers()
            if whole or not name.startswith("model.") or ".adapters." in name or name.rpartition(".")[0] in owners
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the frozen tensors from a checkpoint, and add the EMA."""
        changed = self._changed()
        state = {**checkpoint["state_dict"], **({} if self.ema is None else self.ema.trained())}
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in changed}
        if self.ema is not None:
            checkpoint["average"] = self.ema.state(self)
        if self.head_start is not None:
            checkpoint["head_start"] = self.head_start.record

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint has exactly the tensors that training changes, and load its EMA.

        Raises:
            FileError: If it belongs to another method or backbone.
        """
        needed = self._changed() & set(self.state_dict())
        checkpoint["state_dict"] = self._renamed(checkpoint["state_dict"], needed)
        if (found := set(checkpoint["state_dict"])) != needed:
            listing = ", ".join(sorted(found ^ needed)[:3])
            raise FileError(
                f"The checkpoint has {len(found)} trained tensors and this task has {len(needed)}; they differ in "
                f"{len(found ^ needed)}, first {listing}. Use the method and the backbone it was written with."
            )
        take_shapes(checkpoint["state_dict"], self, "The checkpoint")
        check_average(self.ema, checkpoint)
        if self.ema is not None:
            checkpoint["average"]["tensors"] = self._renamed(checkpoint["average"]["tensors"], needed)
            self.ema.load_state(checkpoint["average"])
        if self.head_start is not None:
            self.head_start.recall(checkpoint.get("head_start"))
        self.started = True

    def _renamed(self, tensors: Mapping[str, Tensor], needed: set[str]) -> dict[str, Tensor]:
        active = self.bank.active
        return rename_heads(tensors, self.bank.view.head_path, active[-1], needed) if active else dict(tensors)
