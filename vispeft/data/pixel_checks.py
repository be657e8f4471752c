"""Checks of the pixels of images: those that cannot be read, are converted, or are dropped on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from vispeft.data.facts import ImageFacts
from vispeft.data.listing import Finding, Listing, gather
from vispeft.errors import counted

__all__ = ["check_pixels", "problem_findings", "shared_findings"]

PROBLEMS = {
    "missing": ("missing-file", "{n} listed and not there; check paths and root"),
    "empty": ("empty-file", "{n} with 0 bytes; replace or remove them"),
    "truncated": ("truncated-image", "{n} cut short or damaged; replace or remove them"),
    "broken": ("broken-image", "{n} that cannot be opened; replace or remove them"),
    "unsupported": ("unsupported-image", "{n} whole and of a kind that is not read"),
    "too-large": ("too-large-image", "{n} with more pixels than max_pixels allows"),
}

MODES = {
    "1": ("black-and-white", "in black and white; repeated over three channels"),
    "L": ("grayscale", "in grayscale; repeated over three channels"),
    "LA": ("grayscale", "in grayscale; repeated over three channels"),
    "La": ("grayscale", "in grayscale; repeated over three channels"),
    "P": ("palette", "with a palette; looked up as RGB"),
    "PA": ("palette", "with a palette; looked up as RGB"),
    "CMYK": ("cmyk", "in CMYK; converted to RGB without a colour profile"),
    "YCbCr": ("ycbcr", "in YCbCr; converted to RGB"),
    "LAB": ("lab", "in Lab; converted to RGB"),
}
"""Pixel modes other than RGB by Pillow's name, and their treatment."""

Named = list[tuple[str, ImageFacts]]
"""Names of images for messages, and facts about them."""


def check_pixels(listing: Listing, facts: Mapping[str, list[ImageFacts]]) -> list[Finding]:
    """Check the pixels of all images.

    Args:
        listing: The data.
        facts: Facts about each image, by split.
    """
    named = [
        (split.source.name(index), known)
        for name, split in listing.splits.items()
        for index, known in enumerate(facts[name])
    ]
    usable = [(name, known) for name, known in named if not known.problem]
    frames = [f"{name} ({known.frames})" for name, known in named if known.frames > 1]
    text = f"{counted(len(frames), 'file')} with several images, of which the first is taken"
    return [
        *_unreadable(named),
        *_modes(usable, len(named)),
        *_transparency(usable, listing),
        *_bands(usable),
        *_range(usable, listing),
        *gather("warning", {("several-frames", text): frames}),
    ]


def _unreadable(named: Named) -> list[Finding]:
    """Find images that cannot be read."""
    return problem_findings(named, PROBLEMS)


def problem_findings(named: Iterable[tuple[str, ImageFacts]], kinds: Mapping[str, tuple[str, str]]) -> list[Finding]:
    """Gather files that cannot be used by their problem.

    Args:
        named: Names for messages, and facts.
        kinds: Code and text of the finding by problem; ``{n}`` in the text is the number of images.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for name, known in named:
        if known.problem:
            places[known.problem].append(f"{name} ({known.reason})" if known.reason else name)
    found = {
        (code, text.replace("{n}", counted(len(places[problem]), "image"))): places[problem]
        for problem, (code, text) in kinds.items()
    }
    return gather("error", found)


def shared_findings(pairs: Iterable[tuple[str, str]], what: str) -> list[Finding]:
    """Find files that are the label of two images, such as a.jpg and a.png, of which one may be drawn for the test.

    Args:
        pairs: Names of label and image, of all splits.
        what: Word for the labels, such as mask.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for label, image in pairs:
        owners[label].add(image)
    shared = [f"{label} ({', '.join(sorted(names))})" for label, names in owners.items() if len(names) > 1]
    text = f"{counted(len(shared), what)} for more than one image; leave one of the images"
    return gather("error", {(f"shared-{what}", text): shared})


def _modes(usable: Named, total: int) -> list[Finding]:
    """Find images that are not RGB; a warning if only some are, which often means a mistake."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, known in usable:
        if known.deep:
            places["16-bit", "with more than 8 bits; scaled to 8"].append(name)
        elif known.mode in MODES:
            places[MODES[known.mode]].append(name)
    return [
        Finding("fact", code, f"All {counted(len(names), 'image')} {text}")
        if len(names) == total
        else Finding("warning", code, f"{counted(len(names), 'image')} {text}", tuple(names))
        for (code, text), names in places.items()
    ]


def _transparency(usable: Named, listing: Listing) -> list[Finding]:
    """Find transparent images, and recommend a colour to lay them on."""
    names = tuple(name for name, known in usable if known.transparent)
    if not names:
        return []
    colour = listing.reading.transparency
    if colour is not None:
        return [
            Finding("fact", "transparency", f"{counted(len(names), 'image')} with transparency, laid on {list(colour)}")
        ]
    text = (
        f"{counted(len(names), 'image')} with transparency, which is dropped: hidden colours become visible. Set "
        "transparency to the colour behind them, such as [255, 255, 255] for white"
    )
    return [Finding("warning", "transparency", text, names)]


def _bands(usable: Named) -> list[Finding]:
    """Find images with more bands than are read."""
    places = [f"{name} ({known.dropped} dropped)" for name, known in usable if known.dropped]
    text = f"{counted(len(places), 'image')} with more bands than grey or red, green and blue; the others are dropped"
    return gather("warning", {("more-bands", text): places})


def _range(usable: Named, listing: Listing) -> list[Finding]:
    """Find images of more than 8 bits that use a small part of the values which become 0 to 255."""
    deep = [(name, known) for name, known in usable if known.deep and known.digest]
    if not deep:
        return []
    lowest, highest = min(known.lowest for _, known in deep), max(known.highest for _, known in deep)
    low, high = listing.reading.value_range or (0, max(known.white for _, known in deep))
    said = f"{counted(len(deep), 'image')} with more than 8 bits have values from {lowest:g} to {highest:g}, and"
    names = tuple(name for name, _ in deep)
    if lowest < low or highest > high:
        text = f"{said} value_range is [{low:g}, {high:g}], so values outside of it are cut"
        return [Finding("warning", "value-range", text, names)]
    if 2 * (highest - lowest) >= high - low:
        return []
    levels = round(255 * (highest - low) / (high - low)) - round(255 * (lowest - low) / (high - low)) + 1
    better = [0, 2 ** int(highest).bit_length() - 1] if lowest >= 0 and highest <= high / 2 else [lowest, highest]
    text = (
        f"{said} {low:g} to {high:g} become 0 to 255, so {levels} of 256 levels are left; set value_range, such as "
        f"[{better[0]:g}, {better[1]:g}]"
    )
    return [Finding("warning", "value-range", text, names)]
