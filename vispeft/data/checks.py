"""Checks of data before training, with all findings in one report."""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vispeft.data.facts import ImageFacts
from vispeft.data.listed_tasks import TaskListing, mask_listings
from vispeft.data.listing import PER_PIXEL, Finding, ListedSplit, Listing, gather
from vispeft.data.mask_checks import check_masks, image_counts
from vispeft.data.masks import ListedMasks
from vispeft.data.metric_checks import check_retrieval
from vispeft.data.metric_listing import RetrievalListing
from vispeft.data.pixel_checks import check_pixels
from vispeft.data.task_checks import check_tasks, named
from vispeft.errors import DataError, counted

__all__ = ["Report", "examine"]

EXTREME_ASPECT = 4.0
"""Ratio of longer to shorter side from which stretching an image to a square gives a warning."""
IMBALANCE = 10.0
"""Ratio of largest to smallest class from which a warning is given."""


@dataclass(frozen=True)
class Report:
    """All findings about data."""

    listing: Listing
    """The data."""
    facts: dict[str, list[ImageFacts]]
    """Facts about each image, by split."""
    findings: tuple[Finding, ...]
    """Errors first, then warnings, then facts."""

    def of(self, level: str) -> list[Finding]:
        """Return the findings of one level.

        Args:
            level: error, warning or fact.
        """
        return [finding for finding in self.findings if finding.level == level]

    def raise_errors(self) -> None:
        """Refuse unusable data.

        Raises:
            DataError: If there is an error; the message lists all errors and warnings.
        """
        errors, warnings = self.of("error"), self.of("warning")
        if not errors:
            return
        lines = [f"The data in {self.listing.place} cannot be used as they are; {counted(len(errors), 'error')}:"]
        lines += [f"  {finding.line()}" for finding in errors]
        if warnings:
            lines += [f"and {counted(len(warnings), 'warning')}:", *(f"  {finding.line()}" for finding in warnings)]
        raise DataError("\n".join([*lines, "`vispeft doctor` shows everything that is known about them."]))


def examine(listing: Listing, full: bool = True) -> Report:
    """Check data.

    Args:
        listing: The data.
        full: Decode every image and compare contents; otherwise read headers and compare names.

    Returns:
        The report.
    """
    facts = {name: split.source.facts(full) for name, split in listing.splits.items()}
    # Targets first, as the comparison of equal images uses masks and labels too.
    targets = _check_targets(listing, facts, full)
    findings = [
        *listing.findings,
        *check_pixels(listing, facts),
        *_shapes(listing, facts),
        *_contents(listing, facts, full),
        *_empty(listing),
        *_names(listing),
        *targets,
        *_published(listing),
    ]
    order = {"error": 0, "warning": 1, "fact": 2}
    return Report(listing, facts, tuple(sorted(findings, key=lambda finding: order[finding.level])))


def _check_targets(listing: Listing, facts: Mapping[str, list[ImageFacts]], full: bool) -> list[Finding]:
    """Check the targets of all images."""
    if isinstance(listing, TaskListing):
        absent = [named(task, found) for task, masks in mask_listings(listing) for found in _absent(masks)]
        return [*check_tasks(listing, facts, full), *absent]
    if isinstance(listing, RetrievalListing):
        return check_retrieval(listing)
    return [*(check_masks(listing, facts, full) if listing.target == "mask" else _targets(listing)), *_absent(listing)]


def _all(listing: Listing, facts: Mapping[str, list[ImageFacts]]) -> Iterable[tuple[str, int, str, ImageFacts]]:
    """Yield split, position, name for messages, and facts of every image."""
    for name, split in listing.splits.items():
        for index, known in enumerate(facts[name]):
            yield name, index, split.source.name(index), known


# ------------------------------------------------------------------ shapes


def _shapes(listing: Listing, facts: Mapping[str, list[ImageFacts]]) -> list[Finding]:
    """Find extreme aspect ratios, and report the range of sizes."""
    sizes: Counter[tuple[int, int]] = Counter()
    extreme: list[str] = []
    for _, _, name, known in _all(listing, facts):
        if known.width and known.height:
            sizes[known.width, known.height] += 1
            if max(known.width, known.height) > EXTREME_ASPECT * min(known.width, known.height):
                extreme.append(f"{name} ({known.width} x {known.height})")
    images = counted(len(extreme), "image")
    text = f"{images} longer than {EXTREME_ASPECT:g} times their other side, which resizing distorts"
    found = gather("warning", {("extreme-shape", text): extreme})
    if len(sizes) > 1:
        least, most = min(sizes, key=_area), max(sizes, key=_area)
        text = f"Sizes differ, from {least[0]} x {least[1]} to {most[0]} x {most[1]} pixels; all are resized"
        found.append(Finding("fact", "sizes-differ", text))
    return found


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


# ------------------------------------------------------------------ equal images


def _contents(listing: Listing, facts: Mapping[str, list[ImageFacts]], full: bool) -> list[Finding]:
    """Find duplicate images."""
    by_name = _groups(listing, ((s, i, n, n) for s, i, n, _ in _all(listing, facts)))
    by_pixels = _groups(listing, ((s, i, n, known.digest) for s, i, n, known in _all(listing, facts) if known.digest))
    same_file = "{n} listed in two splits, so evaluation would include training images; leave them in one"
    same_pixels = "{n} with equal pixels in two splits, so evaluation would include training images; keep one of each"
    twice = "{n} listed twice in a split; leave one of each"
    copies = "{n} with equal pixels in a split; keep one of each unless that is meant"
    # Published lists are used unchanged, and some published data sets have equal images in train and test.
    level = listing.blame
    known = {place for places in by_name.values() for place in places}
    found = _counted("error", "same-file-in-two-splits", same_file, by_name["across"])
    found += _counted(level, "splits-overlap", same_pixels, [p for p in by_pixels["across"] if p not in known])
    found += _counted("warning", "listed-twice", twice, by_name["inside"])
    found += _counted("warning", "duplicates", copies, [p for p in by_pixels["inside"] if p not in known])
    text = "{n} that occur with different labels; one of the labels is wrong"
    disagreeing = dict.fromkeys([*by_name["disagreeing"], *by_pixels["disagreeing"]])
    # A value may have been measured twice; two classes of one image cannot both be right.
    measured = listing.target == "regression"
    found += _counted("warning" if measured else level, "labels-disagree", text, list(disagreeing))
    if not full and len(listing.splits) > 1:
        text = "Only headers were read (check: fast), so damaged pixels and equal images in two splits go unnoticed"
        found.append(Finding("fact", "headers-only", text))
    return found


def _counted(level: str, code: str, text: str, places: list[str]) -> list[Finding]:
    return gather(level, {(code, text.replace("{n}", counted(len(places), "image"))): places})  # type: ignore[arg-type]


def _groups(listing: Listing, images: Iterable[tuple[str, int, str, str]]) -> dict[str, list[str]]:
    """Find keys that occur in two splits, twice in one split, or with different targets."""
    seen: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for split, index, name, key in images:
        seen[key].append((split, index, name))
    found: dict[str, list[str]] = {"across": [], "inside": [], "disagreeing": []}
    for members in seen.values():
        if len(members) < 2:
            continue
        splits = {split for split, _, _ in members}
        apart = splits - listing.repeats
        text = _together(members)
        if len(apart) > 1:
            found["across"].append(text)
        if len(splits) < len(members):
            found["inside"].append(text)
        if len({listing.splits[split].label(index) for split, index, _ in members}) > 1:
            found["disagreeing"].append(text)
    return found


def _together(members: list[tuple[str, int, str]]) -> str:
    named = list(dict.fromkeys(f"{split} {name}" for split, _, name in members))
    return " = ".join(named[:3]) + (" = ..." if len(named) > 3 else "")


# ------------------------------------------------------------------ targets


def _targets(listing: Listing) -> list[Finding]:
    """Check that the targets can be learned."""
    if listing.target == "regression":
        return _numbers(listing)
    counts = {name: class_counts(listing, split) for name, split in listing.splits.items()}
    found: list[Finding] = []
    train = counts.get("train", [])
    names = listing.class_names
    everywhere = [sum(column) for column in zip(*counts.values(), strict=True)]
    present = [name for name, count in zip(names, everywhere, strict=True) if count]
    if listing.target == "class" and len(present) < 2:
        text = f"There are images of {'one class only' if present else 'no class'}; two are needed"
        found.append(Finding("error", "one-class", text, tuple(present)))
    elif not present:
        found.append(Finding("error", "no-labels", "No image has a label, so there is nothing to learn"))
    for name, numbers in counts.items():
        if name != "train":
            alone = [names[i] for i, count in enumerate(numbers) if count and not train[i]]
            text = f"{name} has classes that train lacks and that cannot be learned; add images of them to train"
            level = listing.blame if listing.target == "class" else "warning"
            found += gather(level, {(f"unseen-in-{name}", text): alone})
    absent = [names[i] for i, count in enumerate(everywhere) if not count]
    text = "No image at all of some classes (do the labels start at 0?)"
    found += gather("warning", {("class-without-images", text): absent})
    return [*found, *(_imbalance(names, train) if listing.target == "class" else [])]


def _names(listing: Listing) -> list[Finding]:
    """Check that the names of the classes can be written, and told apart."""
    wrong = [name or "''" for name in listing.unwritable]
    alike: dict[str, list[str]] = defaultdict(list)
    for name in listing.class_names:
        alike[unicodedata.normalize("NFKC", name).strip().casefold()].append(name)
    text = "Names of classes that are empty or no text in UTF-8, so that nothing can be saved with them; rename them"
    found = gather("error", {("class-name", text): wrong})
    text = "Classes whose names differ in case, spaces or Unicode form alone; are they the same"
    places = [" = ".join(names) for names in alike.values() if len(names) > 1]
    return [*found, *gather("warning", {("names-alike", text): places})]


def _absent(listing: Listing) -> list[Finding]:
    """Find classes that can be learned and do not occur in another split: a warning where that was drawn at random."""
    if listing.target == "regression" or "train" not in listing.splits:
        return []
    train = class_counts(listing, listing.splits["train"])
    found: list[Finding] = []
    for name, split in listing.splits.items():
        numbers = class_counts(listing, split)
        missing = [listing.class_names[i] for i, count in enumerate(train) if count and not numbers[i]]
        if name != "train" and len(listing.splits[name]):
            text = f"Classes that do not occur in {name}, about which its figures say nothing"
            hint = "; give that split, or try another split_seed" if name in listing.drawn else ""
            level = "warning" if name in listing.drawn else "fact"
            found += gather(level, {(f"absent-in-{name}", text + hint): missing})  # type: ignore[arg-type]
    return found


def _empty(listing: Listing) -> list[Finding]:
    empty = [name for name, split in listing.splits.items() if not len(split)]
    return gather("error", {("empty-split", "No image in some splits; give more images, or larger shares"): empty})


def _imbalance(names: tuple[str, ...], train: list[int]) -> list[Finding]:
    counts = [count for count in train if count]
    if not counts or max(counts) <= IMBALANCE * min(counts):
        return []
    few, many = names[train.index(min(counts))], names[train.index(max(counts))]
    text = (
        f"Classes in train are unequal, from {counted(min(counts), 'image')} ({few}) to {max(counts)} ({many}); "
        "look at the accuracy per class, or weight the classes"
    )
    return [Finding("warning", "imbalance", text)]


def class_counts(listing: Listing, split: ListedSplit) -> list[int]:
    """Count the images of each class.

    Args:
        listing: Source of the classes.
        split: Source of the images. With masks, an image counts for each class it shows.
    """
    if isinstance(split, ListedMasks):
        return image_counts(listing, split)
    if listing.target in ("class", "embedding"):
        return split.targets.bincount(minlength=len(listing.class_names)).tolist()
    return split.targets.sum(0).long().tolist()


def _numbers(listing: Listing) -> list[Finding]:
    found: list[Finding] = []
    for name, split in listing.splits.items():
        for column, title in enumerate(listing.class_names):
            values = split.targets[:, column]
            if len(values) == 1 and column == 0:
                text = f"{name} has one image only, and how much is explained (R²) needs two"
                found.append(Finding("error", "one-image", text))
            if len(values) > 1 and bool((values == values[0]).all()):
                text = f"Every {title} in {name} is {values[0]:g}, so there is nothing to predict"
                found.append(Finding("error" if name == "train" else "warning", "constant-target", text))
    return found


def _classes_with_images(listing: Listing) -> int:
    counts = [class_counts(listing, split) for split in listing.splits.values()]
    return sum(1 for column in zip(*counts, strict=True) if any(column))


def _published(listing: Listing) -> list[Finding]:
    """Compare the counts with the published ones."""
    if listing.published is None:
        return []
    known, found = listing.published, []
    classes = len(listing.class_names) if listing.target in PER_PIXEL else _classes_with_images(listing)
    if classes != known.classes:
        text = f"{known.title} has {known.classes} classes as published, and here are images of {classes}"
        found.append(Finding("error", "published-classes", text))
    for name, count in known.images.items():
        if name in listing.splits and len(listing.splits[name]) != count:
            text = f"{known.title} has {count:,} {name} images as published, and here are {len(listing.splits[name]):,}"
            found.append(Finding("warning", "published-images", text))
    return found
