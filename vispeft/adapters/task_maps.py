"""Maps of several tasks for dense predictions: in one pass where a method branches by task, else one pass per task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from vispeft.core.families import describe, is_feature_getter, unwrap
from vispeft.core.fields import check_task_names
from vispeft.core.tracing import in_graph
from vispeft.errors import BackboneError, ConfigError, UnknownNameError
from vispeft.hosts.model import BANK

__all__ = ["TaskMaps", "forward_tasks", "map_shapes"]


def forward_tasks(
    model: nn.Module,
    images: Tensor,
    tasks: Sequence[str] | None = None,
    taps: Sequence[int] | None = None,
    *,
    batched: bool = False,
    norm: bool = True,
) -> dict[str, list[Tensor]]:
    """Compute the maps that the decoders of several tasks read.

    A method that branches by task (MTLoRA) runs the shared stream once. On a Swin its maps are those of the public
    code: behind the patch merging that follows each stage, without a norm, with strides 8, 16, 32 and 32 for patches of
    4 pixels; with ``MTLoRA(merged_maps=False)`` those in front of it, with strides 4, 8, 16 and 32. On a plain ViT they
    are those at the ends of the quarters, behind the last norm; at other blocks every task gets the shared map.

    Any other adapter with tasks runs once per task. Its maps are those of ``forward_intermediates``, the last norm
    included: strides 4, 8, 16 and 32 on a Swin. Without tasks in any adapter, all tasks get the same maps, of one pass.
    With `batched`, one pass of a batch that holds the images once per task replaces one pass per task; outputs differ
    by rounding. That pays off for few small images: with four tasks of Polyhistor on Swin-T and one image, a CPU took
    0.54 of the time at 64 pixels, and 0.89 at 224 (``benchmarks/multitask_cost.py``).

    Args:
        model: A timm model, adapted or not.
        images: (B, 3, H, W) in the model's type.
        tasks: The tasks; None takes all that the acting adapters have.
        taps: Stages of a Swin or blocks of a ViT, in rising order; None takes all stages, or the ends of the quarters.
        batched: Run all tasks in one pass, where the method runs once per task; see `AdapterBank.together`.
        norm: Apply the backbone's last norm to the maps that have it: the last one of a Swin, all of a plain ViT.
            Decoders with norms of their own in front (Polyhistor) read maps without it.

    Returns:
        Maps (B, C, h, w) by task, fine to coarse.

    Raises:
        UnknownNameError: If an acting adapter has tasks, and not this one.
        ConfigError: If no tasks are given and no adapter has any, a tap does not exist, or acting adapters differ in
            `merged_maps`; with `batched`, if units of a task act on whole batches.
        BackboneError: If the model hands out maps itself (``features_only``).
        MergeError: If the adapters were merged for one task.

    Example:
        >>> vispeft.attach(model, vispeft.MTLoRA(tasks=("seg", "depth")))
        >>> maps = vispeft.forward_tasks(model, images)
        >>> loss = seg_loss(seg_decoder(maps["seg"]), labels) + depth_loss(depth_decoder(maps["depth"]), depth)
    """
    inner: Any = unwrap(model)
    if is_feature_getter(model) or not hasattr(inner, "forward_intermediates"):
        raise BackboneError("A features_only model already returns maps. Pass the whole model (num_classes=0).")
    gate = None if in_graph() else getattr(inner, "gate", None)
    with nullcontext() if gate is None else gate.beside():  # so that all passes are of one state of the model
        return _maps(inner, images, tasks, taps, batched, norm)


def _maps(
    inner: Any, images: Tensor, tasks: Sequence[str] | None, taps: Sequence[int] | None, batched: bool, norm: bool
) -> dict[str, list[Tensor]]:
    bank = inner.__dict__.get(BANK)
    wanted = _tasks_of(bank, tasks)
    taps = (describe(inner) if bank is None else bank.view).map_taps(taps)
    if _in_one_pass(bank):
        with nullcontext() if bank.task is None else bank.using(*bank.active):
            maps: dict[str, list[Tensor]] = inner.task_maps(images, wanted, taps, _behind_merging(bank), norm)
            return maps
    if not _known(bank):
        return dict.fromkeys(wanted, _intermediates(inner, images, taps, norm))
    if batched:
        with bank.together(wanted):
            levels = _intermediates(inner, images.repeat(len(wanted), 1, 1, 1), taps, norm)
        parts = [level.chunk(len(wanted)) for level in levels]
        return {task: [part[index] for part in parts] for index, task in enumerate(wanted)}
    found, acting = {}, bank.active  # another thread may choose others between two passes
    for task in wanted:
        with bank.using(*acting, task=task):
            found[task] = _intermediates(inner, images, taps, norm)
    return found


def map_shapes(model: nn.Module, taps: Sequence[int] | None = None) -> tuple[list[int], list[int]]:
    """Return the channels and the strides in pixels of the maps that `forward_tasks` hands out.

    Args:
        model: A timm model, adapted or not.
        taps: Its taps.

    Returns:
        Channels and strides, fine to coarse.
    """
    bank = unwrap(model).__dict__.get(BANK)
    view = describe(unwrap(model)) if bank is None else bank.view
    stages, patch = view.map_taps(taps), view.patch_size[0]
    if not view.has_stages:
        return [view.widths[0]] * len(stages), [patch] * len(stages)
    if _in_one_pass(bank) and _behind_merging(bank):  # which the last stage lacks
        stages = [min(stage + 1, len(view.stages) - 1) for stage in stages]
    return [view.widths[view.stages[stage][0]] for stage in stages], [patch * 2**stage for stage in stages]


class TaskMaps(nn.Module):
    """A backbone as a module that computes the maps of several tasks, such as for `AdapterBank.verify`."""

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[str] | None = None,
        taps: Sequence[int] | None = None,
        norm: bool = True,
    ) -> None:
        """Choose tasks, taps and the last norm; see `forward_tasks`."""
        super().__init__()
        self.model, self.tasks, self.taps, self.norm = model, tasks, taps, norm

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps, task by task.

        Args:
            images: (B, 3, H, W).
        """
        maps = forward_tasks(self.model, images, self.tasks, self.taps, norm=self.norm)
        return [level for levels in maps.values() for level in levels]


def _tasks_of(bank: Any, tasks: Sequence[str] | None) -> list[str]:
    """Return the tasks to compute, or refuse them."""
    known = _known(bank)
    if tasks is None:
        if not known:
            raise ConfigError(
                "forward_tasks was given no tasks, and no adapter that acts has any. Name them: tasks=['seg', 'depth']."
            )
        return known
    check_task_names(tasks, f"forward_tasks(..., tasks={tasks!r})")
    for task in tasks:
        if known and task not in known:
            raise UnknownNameError("task", task, known)
    return list(tasks)


def _known(bank: Any) -> list[str]:
    """List the tasks of the acting adapters."""
    return [] if bank is None else list(dict.fromkeys(task for name in bank.active for task in bank.tasks(name)))


def _methods(bank: Any) -> dict[str, Any]:
    """Return the methods of the acting adapters with tasks."""
    return {} if bank is None else {name: bank.plan(name).method for name in bank.active if bank.tasks(name)}


def _in_one_pass(bank: Any) -> bool:
    """Return whether every acting adapter with tasks branches by task."""
    choosing = _methods(bank).values()
    return bool(choosing) and all(method.one_pass for method in choosing)


def _behind_merging(bank: Any) -> bool:
    """Return whether tasks read the maps of a Swin behind patch merging, on which acting adapters have to agree."""
    found = {name: method.reads_merged() for name, method in _methods(bank).items()}
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"The acting adapters hand out maps at different places: merged_maps is {found}. Activate adapters that "
            "agree, or make them alike."
        )
    return all(found.values())


def _intermediates(model: Any, images: Tensor, taps: Sequence[int], norm: bool) -> list[Tensor]:
    found = model.forward_intermediates(
        images, indices=list(taps), norm=norm, stop_early=True, output_fmt="NCHW", intermediates_only=True
    )
    return list(found)
