"""Checks of data for metric learning: classes of their own in every split, and images that can be found."""

from __future__ import annotations

from vispeft.data.listing import Finding, ListedSplit, gather
from vispeft.data.metric_listing import BOTH, GALLERY, QUERY, RetrievalListing, roles_of
from vispeft.errors import counted

__all__ = ["check_batches", "check_retrieval"]


def check_retrieval(listing: RetrievalListing) -> list[Finding]:
    """Check classes and roles of all splits.

    Args:
        listing: The data.

    Returns:
        Errors and warnings, and the number of queries that no image can answer.
    """
    evaluated = {name: split for name, split in listing.splits.items() if name != "train"}
    found = [*_shared(listing), *_training(listing)]
    for name, split in evaluated.items():
        if name not in listing.repeats:
            found += _answers(listing, name, split)
    return found


def _shared(listing: RetrievalListing) -> list[Finding]:
    """Find classes that occur in two splits."""
    found: list[Finding] = []
    before: dict[str, set[int]] = {}
    for name, split in listing.splits.items():
        if name in listing.repeats:
            continue
        classes = set(split.targets.unique().tolist())
        for other, known in before.items():
            text = (
                f"Classes in both {other} and {name}, so the figures would not be those of unseen classes; move each "
                "class to one of them, or leave one of them out and have it drawn by classes"
            )
            places = [listing.class_names[label] for label in sorted(classes & known)]
            found += gather("error", {("shared-classes", text): places})
        before[name] = classes
    return found


def _training(listing: RetrievalListing) -> list[Finding]:
    """Find classes that cannot fill their share of a batch, and a training split with nothing to tell apart."""
    split, needed = listing.splits["train"], listing.images_per_class
    labels, counts = split.targets.unique(return_counts=True)
    found: list[Finding] = []
    if len(labels) == 1:
        text = "There are training images of one class only; two are needed, to be told apart"
        found.append(Finding("error", "one-class", text, (listing.class_names[int(labels[0])],)))
    text = (
        f"Training classes with fewer than images_per_class={needed} images, which would occur twice in a batch; lower "
        "images_per_class, or leave the classes out"
    )
    few = zip(labels[counts < needed].tolist(), counts[counts < needed].tolist(), strict=True)
    places = [f"{listing.class_names[label]} ({count})" for label, count in few]
    return [*found, *gather(listing.blame, {("few-images", text): places})]


def _answers(listing: RetrievalListing, name: str, split: ListedSplit) -> list[Finding]:
    """Find queries without an image of their class among those that are searched."""
    roles, classes = roles_of(split), len(listing.class_names)
    asked, searched = split.targets[roles != GALLERY], split.targets[roles != QUERY]
    if not len(asked) or not len(searched):
        missing = "queries" if not len(asked) else "gallery"
        text = f"{name} has no {missing}; give both, or images that are query and gallery at once"
        return [Finding("error", f"no-{missing}", text)] if len(split) else []
    # An image that is searched does not answer its own query.
    answers = searched.bincount(minlength=classes)[split.targets] - (roles == BOTH).long()
    alone = split.targets[(roles != GALLERY) & (answers == 0)]
    if len(alone) == len(asked):
        text = f"No image of {name} has another one of its class, so none can be found; give more images per class"
        return [Finding("error", "no-pairs", text)]
    found = _chance(listing, name, split)
    places = [listing.class_names[label] for label in alone.unique().tolist()]
    if bool((roles == QUERY).any()):
        queries = counted(len(alone), "query", "queries")
        text = f"{queries} of {name} whose class is not in the gallery; add images of it, or leave them out"
        return [*found, *gather(listing.blame, {("query-without-gallery", text): places})]
    text = f"{counted(len(alone), 'image')} of {name} alone in their class, which count as misses of recall"
    return [*found, *gather("fact", {("lone-images", text): places})]


def _chance(listing: RetrievalListing, name: str, split: ListedSplit) -> list[Finding]:
    """Find a split of one class, in which every neighbour is right whatever the embeddings are."""
    classes = split.targets.unique().tolist()
    if len(classes) > 1:
        return []
    text = f"{name} has one class only, so each neighbour is right and every figure is 1"
    if name == "validation":
        text += ", and no epoch is better than another; set validation to a larger share of the classes, or to null"
    return [Finding("warning", f"one-class-in-{name}", text, tuple(listing.class_names[label] for label in classes))]


def check_batches(listing: RetrievalListing, batch_size: int) -> str:
    """Tell why batches of different classes cannot be drawn; empty if they can.

    Args:
        listing: The data.
        batch_size: Images per batch.
    """
    per_class, classes = listing.images_per_class, listing.train_classes
    images = len(listing.splits["train"])
    asked = f"batch_size={batch_size} with images_per_class={per_class}"
    most = min(classes, images // per_class) * per_class
    advice = f"make batch_size {most} or less" if most >= 2 * per_class else "give more training images"
    if batch_size > per_class * classes:
        return f"{asked} takes {batch_size // per_class} classes, and there are {classes} training classes; {advice}"
    if images < batch_size:
        return f"{asked}: there are {counted(images, 'training image')}, fewer than a batch; {advice}"
    return ""
