"""Checks of masks before training: files, sizes, values, and the classes of each split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from vispeft.data.facts import ImageFacts
from vispeft.data.listing import Finding, Listing, gather
from vispeft.data.masks import IGNORE, ListedMasks, MaskFacts, show_code
from vispeft.data.pixel_checks import problem_findings, shared_findings
from vispeft.data.pixels import QUARTER_TURNS
from vispeft.errors import counted

__all__ = ["check_masks", "image_counts", "mask_splits", "pixel_shares"]

PROBLEMS = {
    "missing": ("missing-mask", "{n} without a mask; add it, or leave the image out"),
    "empty": ("empty-mask", "{n} with a mask of 0 bytes; replace or remove it"),
    "truncated": ("truncated-mask", "{n} with a mask that is cut short or damaged; replace or remove it"),
    "broken": ("broken-mask", "{n} with a mask that cannot be opened; replace or remove it"),
    "unsupported": ("unsupported-mask", "{n} with a mask that is whole and of a kind that is not read"),
    "too-large": ("too-large-mask", "{n} with a mask of more pixels than max_pixels allows"),
}

SHOWN = 12
"""Values named in one finding."""


def mask_splits(listing: Listing) -> dict[str, ListedMasks]:
    """Return the splits of a listing whose targets are masks.

    Args:
        listing: The data.
    """
    return {name: split for name, split in listing.splits.items() if isinstance(split, ListedMasks)}


def check_masks(listing: Listing, facts: Mapping[str, list[ImageFacts]], full: bool) -> list[Finding]:
    """Check the masks of all splits.

    Args:
        listing: The data.
        facts: Facts about the images, by split.
        full: Whether to decode the masks and check their values, instead of reading only headers.
    """
    for split in mask_splits(listing).values():
        split.mask_facts(full)
    found = [*_files(listing), *_shared(listing), *_sizes(listing, facts), *_turned(listing, facts), *_stored(listing)]
    if not full:
        text = "Values of masks were not looked at (check: fast)"
        return [*found, Finding("fact", "mask-headers-only", text)]
    return [*found, *_values(listing), *_colours(listing), *_unlabelled(listing), *_classes(listing)]


def image_counts(listing: Listing, split: ListedMasks) -> list[int]:
    """Count, for each class, the images that show it; zeros where masks were not decoded.

    Args:
        listing: Source of the classes.
        split: Source of the masks.
    """
    seen = Counter(index for known in split.mask_facts(full=False) for index in known.classes)
    return [seen[index] for index in range(len(listing.class_names))]


def pixel_shares(listing: Listing, split: ListedMasks) -> list[float]:
    """Return the fraction of the labelled pixels in each class; zeros where masks were not decoded.

    Args:
        listing: Source of the classes.
        split: Source of the masks.
    """
    pixels: Counter[int] = Counter()
    for known in split.mask_facts(full=False):
        pixels.update(known.classes)
    counts = [pixels[index] for index in range(len(listing.class_names))]
    return [count / max(1, sum(counts)) for count in counts]


def _all(listing: Listing) -> Iterator[tuple[str, int, str, MaskFacts]]:
    """Yield split, position, name for messages, and facts of every mask."""
    for name, split in mask_splits(listing).items():
        for index, known in enumerate(split.mask_facts(full=False)):
            yield name, index, split.masks.name(index), known


def _files(listing: Listing) -> list[Finding]:
    """Find missing and unreadable masks."""
    return problem_findings(((name, known) for _, _, name, known in _all(listing)), PROBLEMS)


def _shared(listing: Listing) -> list[Finding]:
    """Find masks that belong to two images."""
    splits = mask_splits(listing).values()
    pairs = ((split.masks.name(index), split.source.name(index)) for split in splits for index in range(len(split)))
    return shared_findings(pairs, "mask")


def _sizes(listing: Listing, facts: Mapping[str, list[ImageFacts]]) -> list[Finding]:
    """Find masks whose size differs from their image's."""
    differing, turned = [], False
    for split, index, name, known in _all(listing):
        image = facts[split][index]
        if image.width and known.width and image.upright != known.upright:
            sizes = "{} x {} for an image of {} x {}".format(*known.upright, *image.upright)
            alike = image.orientation == known.orientation
            turned = turned or not alike
            differing.append(f"{name} ({sizes}{'' if alike else ', of which the metadata turn one'})")
    text = f"{counted(len(differing), 'image')} with a mask of another size; every pixel needs its label"
    if turned:
        text += ". Where the metadata turn only the image, turn the mask, or store the image upright"
    return gather("error", {("mask-size", text): differing})


def _turned(listing: Listing, facts: Mapping[str, list[ImageFacts]]) -> list[Finding]:
    """Find images that their metadata turn otherwise than their mask, where sizes do not tell which is right."""
    places = []
    for split, index, name, known in _all(listing):
        image = facts[split][index]
        if known.problem or image.problem or image.orientation == known.orientation or image.upright != known.upright:
            continue
        # A quarter turn changes the size of an oblong image: its mask was labelled upright if the sizes are equal.
        quarters = (image.orientation in QUARTER_TURNS) != (known.orientation in QUARTER_TURNS)
        if image.width == image.height or not quarters:
            places.append(f"{name} (orientation {known.orientation}, image {image.orientation})")
    text = (
        f"{counted(len(places), 'image')} turned by its metadata otherwise than its mask, and nothing says which way "
        "it was labelled; look at them, and store both upright without metadata"
    )
    return gather("warning", {("mask-turned", text): places})


def _stored(listing: Listing) -> list[Finding]:
    """Find masks of several images, and those whose file says that 0 is white."""
    frames, white = [], []
    for _, _, name, known in _all(listing):
        if known.frames > 1:
            frames.append(f"{name} ({known.frames})")
        if known.white_is_zero and not known.problem:
            white.append(name)
    several = f"{counted(len(frames), 'mask')} with several images, of which the first is taken"
    zero = (
        f"{counted(len(white), 'mask')} in which 0 is white; the numbers are taken as they are stored, and a program "
        "that shows them, or wrote them as brightness, has them the other way round"
    )
    return gather("warning", {("mask-frames", several): frames, ("mask-white-zero", zero): white})


def _values(listing: Listing) -> list[Finding]:
    """Find values that map to no class."""
    files: dict[int, list[str]] = defaultdict(list)
    for _, _, name, known in _all(listing):
        if not known.coloured:
            for code, _ in known.outside:
                files[code].append(name)
    if not files:
        return []
    named = ", ".join(f"{code} ({counted(len(files[code]), 'file')})" for code in sorted(files)[:SHOWN])
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    count = len(listing.class_names)
    lossy = any(name.lower().endswith((".jpg", ".jpeg")) for names in files.values() for name in names)
    hint = "JPEG changes values, so save masks as PNG" if lossy else "set ids or reduce_zero_label, or mend the masks"
    if min(files) < 0:
        hint += f" (ids may have negative values, such as {min(files)}: {IGNORE})"
    text = (
        f"Masks have values that stand for none of the {count} classes and not for a pixel without a label ({IGNORE}): "
        f"{named}{more}; {hint}. Found in"
    )
    return [Finding("error", "mask-values", text, tuple(dict.fromkeys(n for names in files.values() for n in names)))]


def _colours(listing: Listing) -> list[Finding]:
    """Find RGB masks whose colours map to no class."""
    colours: Counter[int] = Counter()
    names, more, wanted = [], 0, False
    for _, _, name, known in _all(listing):
        if known.coloured and known.outside:
            wanted = wanted or known.by_colour
            colours.update(code for code, _ in known.outside)
            names.append(name)
            more = max(more, known.more)
    if not names:
        return []
    kind = "by colour" if wanted else "in RGB instead of class indices"
    text = f"{counted(len(names), 'mask')} {kind}, with colours that stand for no class: "
    text += ", ".join(show_code(code, True) for code, _ in colours.most_common(SHOWN))
    rest = len(colours) - SHOWN + more
    text += f" and {rest} more" if rest > 0 else ""
    if not wanted and all(code >> 16 == code & 255 == code >> 8 & 255 for code in colours):
        hint = "they are grey, so save the masks with one channel"
    elif len(colours) + more > IGNORE:
        hint = "so many are no classes: is this a photo, or was it saved as JPEG?"
    elif wanted:
        hint = "add them to the palette, or mend the masks"
    else:
        hint = "give rgb_masks: true and a palette with the colour of each class, or convert them to indices"
    return [Finding("error", "rgb-masks", f"{text}; {hint}. Found in", tuple(names))]


def _unlabelled(listing: Listing) -> list[Finding]:
    """Find masks without a labelled pixel."""
    found: list[Finding] = []
    for split, masks in mask_splits(listing).items():
        known = masks.mask_facts(full=False)
        blank = [masks.masks.name(index) for index, facts in enumerate(known) if set(facts.classes) == {IGNORE}]
        if blank and len(blank) == len(known):
            found.append(Finding("error", "split-unlabelled", f"No mask of {split} has a labelled pixel"))
        elif blank:
            text = f"{counted(len(blank), 'mask')} in {split} without a labelled pixel ({IGNORE} everywhere)"
            found.append(Finding("warning", "mask-unlabelled", text, tuple(blank)))
    return found


def _classes(listing: Listing) -> list[Finding]:
    """Find classes that are missing from a split."""
    counts = {name: image_counts(listing, split) for name, split in mask_splits(listing).items()}
    everywhere = [sum(column) for column in zip(*counts.values(), strict=True)]
    names, train = listing.class_names, counts["train"]
    if sum(count > 0 for count in everywhere) < 2 <= len(names):
        return _one_class(listing, [name for name, count in zip(names, everywhere, strict=True) if count])
    text = "Classes that never occur in train and cannot be learned"
    found = gather("warning", {("never-in-train", text): [n for n, c in zip(names, train, strict=True) if not c]})
    for split, numbers in counts.items():
        if split != "train":
            unseen = [names[i] for i, count in enumerate(numbers) if count and not train[i]]
            text = f"{split} has classes that train lacks, so their scores will be 0; add images of them to train"
            found += gather("warning", {(f"unseen-in-{split}", text): unseen})
    return found


def _one_class(listing: Listing, present: list[str]) -> list[Finding]:
    """Report that there is only one class; the usual cause is masks of 0 and 255."""
    values = {code for _, _, _, known in _all(listing) for code, _ in known.codes}
    if any(known.outside for _, _, _, known in _all(listing)):
        return []  # the cause, which is already reported
    hint = f": {IGNORE} means no label; for black and white masks set ids: {{0: 0, 255: 1}}" if IGNORE in values else ""
    text = f"Masks show {'one class only' if present else 'no class'}; two are needed{hint}. Found"
    return [Finding("error", "one-class", text, tuple(present) or ("nothing",))]
