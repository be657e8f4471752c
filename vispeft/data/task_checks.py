"""Checks of the labels of several dense tasks, and figures of each task for the data doctor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from vispeft.data.facts import ImageFacts
from vispeft.data.label_files import LabelFacts
from vispeft.data.listed_tasks import TaskListing, mask_listings, task_splits
from vispeft.data.listing import Finding, gather
from vispeft.data.mask_checks import check_masks
from vispeft.data.masks import IGNORE, MaskFacts
from vispeft.data.pixel_checks import problem_findings, shared_findings
from vispeft.errors import counted

__all__ = ["TaskFigures", "check_tasks", "named", "task_figures"]

PROBLEMS = {
    "missing": ("missing-label", "{n} without a label; add it, or leave the image out"),
    "empty": ("empty-label", "{n} with a label of 0 bytes; replace or remove it"),
    "broken": ("broken-label", "{n} with a label that cannot be opened; replace or remove it"),
    "unsupported": ("unsupported-label", "{n} with a label of another type than its task has"),
    "too-large": ("too-large-label", "{n} with a label of more pixels than max_pixels allows"),
}
"""Code and text of each problem of a label; masks of classes have their own in `mask_checks`."""
UNLABELLED = ("mask-unlabelled", "label-unlabelled")
"""Codes of findings about images without a labelled pixel."""
FARTHEST = 1000
"""Depth in metres beyond which labels may be millimetres; that of streets ends at 80 m, of rooms at 10 m."""


def check_tasks(listing: TaskListing, facts: Mapping[str, list[ImageFacts]], full: bool) -> list[Finding]:
    """Check the labels of all tasks.

    Args:
        listing: The data.
        facts: Facts about the images, by split.
        full: Whether to read the labels, instead of looking for their files alone.
    """
    for split in task_splits(listing).values():
        for task in split.labels:
            split.label_facts(task, full)
    found: list[Finding] = []
    masks = dict(mask_listings(listing))
    for task in listing.targets:
        if (without := _without_files(listing, task)) is not None:
            found.append(without)
            continue
        checked = check_masks(masks[task], facts, full) if task in masks else _check_labels(listing, task, facts, full)
        usual = UNLABELLED if task in listing.blank else ()
        found += [
            named(task, replace(finding, level="fact") if finding.code in usual else finding)
            for finding in checked
            if finding.code != "mask-headers-only"
        ]
    return found if full else [*found, Finding("fact", "label-headers-only", "Labels were not read (check: fast)")]


def named(task: str, finding: Finding) -> Finding:
    """Put the name of a task in front of a finding.

    Args:
        task: The task.
        finding: The finding.
    """
    return replace(finding, text=f"{task}: {finding.text[0].lower()}{finding.text[1:]}")


def _all(listing: TaskListing, task: str) -> Iterator[tuple[str, int, str, ImageFacts]]:
    """Yield split, position, name for messages, and facts of every label of a task."""
    for name, split in task_splits(listing).items():
        for index, known in enumerate(split.label_facts(task, full=False)):
            yield name, index, split.labels[task].name(index), known


def _without_files(listing: TaskListing, task: str) -> Finding | None:
    """Find a task none of whose labels is there."""
    named = [(name, known.problem) for _, _, name, known in _all(listing, task)]
    if not named or any(problem != "missing" for _, problem in named):
        return None
    text = f"{task}: not one of {counted(len(named), 'label file')} is there; leave {task} out of tasks, or add them"
    return Finding("error", "task-without-labels", text, tuple(name for name, _ in named))


def _check_labels(listing: TaskListing, task: str, facts: Mapping[str, list[ImageFacts]], full: bool) -> list[Finding]:
    """Check the labels of a task of another kind than classes."""
    errors = problem_findings(((name, known) for _, _, name, known in _all(listing, task)), PROBLEMS)
    splits = task_splits(listing).values()
    pairs = ((split.labels[task].name(at), split.source.name(at)) for split in splits for at in range(len(split)))
    errors += shared_findings(pairs, "label")
    sizes: list[str] = []
    for split, index, name, known in _all(listing, task):
        image = facts[split][index]
        if known.width and image.width and not known.problem and (known.width, known.height) != image.upright:
            sizes.append("{} ({} x {} for an image of {} x {})".format(name, known.width, known.height, *image.upright))
    text = f"{counted(len(sizes), 'image')} with a label of another size; every pixel needs its label"
    errors += gather("error", {("label-size", text): sizes})
    return [*errors, *(_unlabelled(listing, task) if full else [])]


def _unlabelled(listing: TaskListing, task: str) -> list[Finding]:
    """Find labels without a labelled pixel, saliency and edges that are never 1, and depths of another unit."""
    found: list[Finding] = []
    for name, split in task_splits(listing).items():
        known = [facts for facts in split.label_facts(task, full=False) if not facts.problem]
        blank = [
            split.labels[task].name(index)
            for index, facts in enumerate(split.label_facts(task, full=False))
            if not facts.problem and isinstance(facts, LabelFacts) and not facts.pixels
        ]
        if blank and len(blank) == len(known):
            found.append(Finding("error", "split-unlabelled", f"No label of {name} has a labelled pixel"))
        elif blank:
            text = f"{counted(len(blank), 'label')} in {name} without a labelled pixel"
            found.append(Finding("warning", "label-unlabelled", text, tuple(blank)))
        far = max((facts.most for facts in known if isinstance(facts, LabelFacts)), default=0.0)
        if listing.targets[task].kind == "depth" and far > FARTHEST:
            text = f"Depths in {name} go up to {far:,.0f} metres; if they are millimetres, divide them by 1000"
            found.append(Finding("warning", "far-depth", text))
        binary = listing.targets[task].kind in ("saliency", "edge")
        if binary and known and not any(isinstance(facts, LabelFacts) and facts.total for facts in known):
            found.append(Finding("error", "never-one", f"No pixel of {name} is 1, so there is nothing to find"))
    return found


# ------------------------------------------------------------------ figures


@dataclass(frozen=True)
class TaskFigures:
    """Figures of the labels of a task in a split."""

    share: float
    """Fraction of the pixels that have a label."""
    unlabelled: int
    """Number of images without a labelled pixel."""
    values: str
    """The values that occur, for people."""


def task_figures(listing: TaskListing, task: str, split: str) -> TaskFigures | None:
    """Sum up the labels of a task in a split.

    Args:
        listing: The data.
        task: The task.
        split: The split.

    Returns:
        The figures; None where labels were not read, or nothing is labelled.
    """
    known = [one for one in task_splits(listing)[split].label_facts(task, full=False) if one.width and not one.problem]
    pixels = [_pixels(one) for one in known]
    everything = sum(one.width * one.height for one in known)
    if not sum(pixels):
        return None
    return TaskFigures(sum(pixels) / everything, pixels.count(0), _values(listing, task, known, sum(pixels)))


def _pixels(facts: ImageFacts) -> int:
    if isinstance(facts, MaskFacts):
        return sum(count for index, count in facts.classes.items() if index != IGNORE)
    return facts.pixels if isinstance(facts, LabelFacts) else 0


def _values(listing: TaskListing, task: str, known: list[ImageFacts], pixels: int) -> str:
    target = listing.targets[task]
    if target.kind == "classes":
        seen = {index for one in known if isinstance(one, MaskFacts) for index in one.classes} - {IGNORE}
        return f"{len(seen)} of {len(target.class_names)} classes"
    labels = [one for one in known if isinstance(one, LabelFacts) and one.pixels]
    if not labels:
        return "none"
    if target.kind in ("saliency", "edge"):
        return f"0 and 1, {sum(one.total for one in labels) / pixels:.2%} are 1"
    span = f"{min(one.least for one in labels):.3g} to {max(one.most for one in labels):.3g}"
    return span if target.kind == "normals" else f"{span}, mean {sum(one.total for one in labels) / pixels:.3g}"
