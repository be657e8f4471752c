"""``vispeft doctor``: one page with every problem of the data, before training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from rich.markup import escape
from rich.table import Table

from vispeft.building.classes import argument_names
from vispeft.building.config_files import read_config
from vispeft.cli.common import console, make_parser
from vispeft.cli.config import build_data
from vispeft.cli.config_keys import split_overrides
from vispeft.cli.runs import CHECKPOINTS, CONFIG, refuse_segmentor
from vispeft.data import (
    ADE20KData,
    CityscapesData,
    FgvcData,
    ImageFolderData,
    ImageListData,
    JsonData,
    ListedData,
    MaskFolderData,
    NyudMultiTaskData,
    PascalContextData,
    PascalMultiTaskData,
    Report,
    VOCData,
    Vtab1kData,
    WebDatasetData,
)
from vispeft.data.checks import class_counts
from vispeft.data.fgvc import FGVC
from vispeft.data.folder import SYNONYMS, find_splits
from vispeft.data.list_files import LIST_ENDINGS
from vispeft.data.listed_tasks import TaskListing
from vispeft.data.mask_checks import mask_splits, pixel_shares
from vispeft.data.task_checks import TaskFigures, task_figures
from vispeft.data.vtab import VTAB
from vispeft.errors import ConfigError, DataError, counted, printable
from vispeft.resources import config_names, find_config

__all__ = ["KINDS", "diagnose", "main", "open_data"]

EXAMPLE = """example:
  vispeft doctor my_photos
  vispeft doctor lists/train.txt --root my_photos
  vispeft doctor vtab-1k/cifar
  vispeft doctor CUB_200_2011 --kind fgvc --dataset cub
  vispeft doctor classification/folder --data.root my_photos
  vispeft doctor my_masks --class_names '[road, house]'
  vispeft doctor runs/folder/1 --speed

DATA is a folder with one folder per class, a folder with train.txt, val.txt and test.txt (or .csv, .tsv, .json), one
such list, a task of VTAB-1k, tar shards in quotation marks, folders of images and masks, VOCdevkit,
ADEChallengeData2016, the folder of Cityscapes, PASCAL_MT, NYUD_MT, or a config, whose data are checked. Further
settings of its data module follow as --name value. The exit status is 1 when there is an error. With --speed, DATA is a
config or a run: images are read as its training does, for ten seconds, and some steps are trained on one batch, to say
which of the two waits for the other."""

DENSE: dict[str, type[ListedData]] = {
    "pascal_mt": PascalMultiTaskData,
    "nyud_mt": NyudMultiTaskData,
    "voc": VOCData,
    "pascal_context": PascalContextData,
    "ade20k": ADE20KData,
    "cityscapes": CityscapesData,
}
"""Readers of published data sets with labels for each pixel."""

LAYOUTS = {
    "pascal_mt": ("JPEGImages", "ImageSets/Context"),
    "nyud_mt": ("images", "gt_sets"),
    "ade20k": ("images/training", "annotations/training"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "voc": ("JPEGImages", "ImageSets/Segmentation"),
    "pascal_context": ("JPEGImages", "ImageSets/SegmentationContext"),
    "masks": ("images", "masks"),
}
"""Folders that identify data with labels for each pixel; VOC 2012 and PASCAL-Context (2010) differ in their lists."""

KINDS = ("auto", "folder", "list", "json", "vtab1k", "fgvc", "webdataset", "masks", *DENSE)
"""Kinds of DATA besides a config."""

LISTS = {"json": (".json",), "list": LIST_ENDINGS}
"""Suffixes of the lists of each kind."""

STYLES = {"error": "bold red", "warning": "yellow", "fact": "cyan"}
PLACES = 8
"""Largest number of places named per finding."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.

    Raises:
        SystemExit: With status 1, if the data are unusable.
    """
    parser = make_parser("doctor", "Check images, labels and splits; one page.", EXAMPLE)
    parser.add_argument("data", metavar="DATA", help="a folder, a list, shards, or a config")
    parser.add_argument(
        "--kind", choices=KINDS, default="auto", help="kind of DATA; default: determined from its content"
    )
    parser.add_argument(
        "--speed", action="store_true", help="measure how fast images are read, and how fast trained on"
    )
    given, overrides = parser.parse_known_args(list(argv))
    if given.speed:
        from vispeft.cli.speed import measure_speed  # needs the tasks, which the other pages do without

        for line in measure_speed(given.data, overrides).lines():
            console.print(line, soft_wrap=True)
        return
    try:
        data = open_data(given.data, given.kind, overrides)
        report = data.report()
    except DataError as error:
        # The data could not be listed, so there is no page to show.
        console.print(f"[{STYLES['error']}]error[/]  {escape(str(error))}", soft_wrap=True, markup=True)
        raise SystemExit(1) from None
    diagnose(report)
    if report.of("error"):
        raise SystemExit(1)


def open_data(place: str, kind: str = "auto", overrides: Sequence[str] = ()) -> ListedData:
    """Create the data module for a place.

    Args:
        place: A folder, a list, shards, a YAML config, or the name of a packaged one.
        kind: Its kind, one of `KINDS`.
        overrides: Settings of the data module, such as ``["--root", "photos"]``.

    Raises:
        ConfigError: If the settings do not fit.
        DataError: If the kind of the place cannot be determined.
    """
    path = Path(place)
    if not os.path.exists(path) and place in config_names():
        path = find_config(place)
    if path.suffix in (".yaml", ".yml"):
        if kind != "auto":
            raise ConfigError(f"--kind {kind} was given for the config {place}, which determines the kind itself.")
        return _from_config(path, overrides)
    given = [(key.removeprefix("data."), value) for key, value in split_overrides(overrides)]
    if kind == "auto":
        _refuse_run(path)
        kind = _fitting(path, _guess(path), [key.split(".")[0] for key, _ in given])
    cls, settings = _readers(path)[kind]
    node = {"class_path": f"vispeft.data.{cls.__name__}", "init_args": settings()}
    return _listed(build_data(node, [(f"data.{key}", value) for key, value in given], place))


def _refuse_run(path: Path) -> None:
    """Refuse a run directory, whose folders would be taken for classes.

    Raises:
        DataError: If it is one; the message names the command for its data.
        FileError: If it is one of mmsegmentation.
    """
    inside = sorted(entry.name for entry in path.iterdir()) if os.path.isdir(path) else []
    if any(name.endswith(".pth") for name in inside):
        refuse_segmentor(path, inside)
    if CONFIG in inside and (path / CHECKPOINTS).is_dir():
        raise DataError(f"{path} is a run, and no data. To check the data it was trained on: doctor {path / CONFIG}")


def _from_config(path: Path, overrides: Sequence[str]) -> ListedData:
    tree = read_config(path)
    if "data" not in tree:
        raise ConfigError(f"{path} has no section data.")
    return _listed(build_data(tree["data"], split_overrides(overrides), str(path)))


def _listed(data: LightningDataModule) -> ListedData:
    if not isinstance(data, ListedData):
        raise ConfigError(f"{type(data).__name__} makes its own images; there are no files to check.")
    return data


# ------------------------------------------------------------------ kinds of data


def _guess(path: Path) -> str:
    """Determine the kind of a place.

    Raises:
        DataError: If it cannot be determined.
    """
    endings = {**dict.fromkeys(LIST_ENDINGS, "list"), ".json": "json", ".tar": "webdataset"}
    if path.suffix.lower() in endings and not os.path.isdir(path):
        return endings[path.suffix.lower()]
    if not os.path.isdir(path):
        found = "is none of these" if os.path.exists(path) else "is not there"
        lists = ", ".join((*LIST_ENDINGS, ".json"))
        raise DataError(f"{str(path)!r} {found}. Give a folder, a list ({lists}), shards (.tar) or a config.")
    for kind, folders in LAYOUTS.items():
        if _has(path, folders):
            return kind
    inside = {entry.name for entry in path.iterdir()}
    if "train800val200.txt" in inside:
        return "vtab1k"
    if {"train.json", "val.json", "test.json"} <= inside and _fgvc_name(path):
        return "fgvc"
    for kind, ending in (("json", ".json"), ("list", ".txt")):
        if any(f"{name}{ending}" in inside for name in SYNONYMS["train"]):
            return kind
    # Tables often lie beside class folders, and text lists hardly ever.
    tables = any(f"{name}{ending}" in inside for name in SYNONYMS["train"] for ending in LIST_ENDINGS)
    classes = any(one.is_dir() for name in SYNONYMS["train"] for one in path.glob(f"{name}/*"))
    return "list" if tables and not classes else "folder"


def _fitting(path: Path, kind: str, keys: Sequence[str]) -> str:
    """Return the kind that a place seems to be of, or the only one that takes all settings that were given."""

    def takes(cls: type) -> bool:
        return set(keys) <= {*argument_names(cls)}

    classes = _readers(path)
    others = [name for name, (cls, _) in classes.items() if takes(cls)]
    return kind if takes(classes[kind][0]) or len(others) != 1 else others[0]


def _has(path: Path, folders: Sequence[str]) -> bool:
    """Whether a place, or the folder of a published data set in it, contains given folders."""
    inside = ("ADEChallengeData2016", "PASCAL_MT", "NYUD_MT")
    places = (path, *path.glob("VOC20*"), *path.glob("VOCdevkit/VOC20*"), *(path / name for name in inside))
    return any(all((place / folder).is_dir() for folder in folders) for place in places)


def _fgvc_name(path: Path) -> str | None:
    """Find the name of an FGVC data set in a path."""
    return next((name for name in FGVC if name in path.resolve().name.lower()), None)


def _readers(path: Path) -> dict[str, tuple[type[ListedData], Callable[[], dict[str, str]]]]:
    """Return the data module of each kind, and a function that finds its settings for a place."""
    return {
        "folder": (ImageFolderData, lambda: {"root": str(path)}),
        "list": (ImageListData, lambda: _lists(path, LISTS["list"])),
        "json": (JsonData, lambda: _lists(path, LISTS["json"])),
        "vtab1k": (Vtab1kData, lambda: {"root": str(path.parent), "task": _known(path.name, VTAB)}),
        "fgvc": (FgvcData, lambda: {"root": str(path), **({"dataset": n} if (n := _fgvc_name(path)) else {})}),
        "webdataset": (WebDatasetData, lambda: {"train_shards": str(path)}),
        **{name: (reader, lambda: {"root": str(path)}) for name, reader in {**DENSE, "masks": MaskFolderData}.items()},
    }


def _known(name: str, names: Any) -> str:
    if name not in names:
        raise DataError(f"The folder of a VTAB-1k task has its name, one of {', '.join(names)}; found {name!r}.")
    return name


def _lists(path: Path, endings: Sequence[str]) -> dict[str, str]:
    """Find the lists of the splits in a folder, or use one list for all images."""
    if not os.path.isdir(path):
        return {"train_list": str(path)}
    files = {file.name: str(file) for file in sorted(path.iterdir()) if file.suffix.lower() in endings}
    found = find_splits(files, path, endings)
    if "train" not in found:
        raise DataError(f"{path} has no {' or '.join(f'train{e}' for e in endings)}; give the list itself, or --kind.")
    return {f"{split}_list": file for split, file in found.items()}


# ------------------------------------------------------------------ the page


def diagnose(report: Report) -> None:
    """Print all findings.

    Args:
        report: The result of a data module's `report`.
    """
    listing = report.listing
    console.print(f"[bold]{escape(printable(listing.place))}[/]", soft_wrap=True, markup=True)
    console.print(_splits(report))
    if isinstance(listing, TaskListing):
        console.print(_tasks(listing))
    elif listing.target != "regression":
        console.print(_classes(report))
    for level in ("error", "warning", "fact"):
        for finding in report.of(level):
            line = f"[{STYLES[level]}]{level:<7}[/] [dim]{finding.code}[/]  {escape(finding.line(PLACES))}"
            console.print(line, soft_wrap=True, markup=True)
    errors, warnings = len(report.of("error")), len(report.of("warning"))
    verdict = "cannot be used as they are" if errors else "can be used"
    style = STYLES["error"] if errors else STYLES["warning"] if warnings else "bold green"
    said = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
    console.print(f"[{style}]The data {verdict}[/]: {said}.", markup=True)


def _splits(report: Report) -> Table:
    table = Table("split", "images", "classes", "fewest", "most", "pixels", "kinds", box=None, header_style="bold")
    for name, split in report.listing.splits.items():
        facts = [known for known in report.facts[name] if known.width]
        sides = [f"{known.width}x{known.height}" for known in sorted(facts, key=lambda f: f.width * f.height)]
        sizes = sides[0] if len(set(sides)) == 1 else f"{sides[0]} to {sides[-1]}" if sides else "-"
        modes = ", ".join(f"{mode} {count:,}" for mode, count in Counter(f.mode for f in facts).most_common(4))
        counts = [] if report.listing.target in ("regression", "tasks") else class_counts(report.listing, split)
        some = [count for count in counts if count]
        figures = (len(some), min(some), max(some)) if some else ("-", "-", "-")
        table.add_row(name, f"{len(split):,}", *map(str, figures), sizes, modes or "-")
    return table


def _classes(report: Report) -> Table:
    """Tabulate images per class (with masks also pixels); of many classes, only the largest and smallest."""
    listing = report.listing
    counts = {name: class_counts(listing, split) for name, split in listing.splits.items()}
    order = sorted(range(len(listing.class_names)), key=lambda i: (-counts["train"][i], i))
    shown = order if len(order) <= 10 else [*order[:4], *order[-4:]]
    shares = [pixel_shares(listing, split) for name, split in mask_splits(listing).items() if name == "train"]
    columns = [*counts, "pixels in train"] if shares else [*counts]
    table = Table("class", *columns, box=None, header_style="bold")
    for position, index in enumerate(shown):
        if len(order) > 10 and position == 4:
            table.add_row(f"... {len(order) - 8} more", *["" for _ in columns])
        figures = [f"{column[index]:,}" for column in counts.values()] + [f"{share[index]:.2%}" for share in shares]
        table.add_row(printable(listing.class_names[index]), *figures)
    return table


def _tasks(listing: TaskListing) -> Table:
    """Tabulate the labels of each task: the share of pixels that have one, and the values that occur in train."""
    table = Table("task", "kind", *(f"labelled in {name}" for name in listing.splits), "values in train", box=None)
    table.header_style = "bold"
    for task, target in listing.targets.items():
        figures = {name: task_figures(listing, task, name) for name in listing.splits}
        shares = ["-" if known is None else _labelled(known) for known in figures.values()]
        train = figures.get("train")
        table.add_row(task, target.kind, *shares, "-" if train is None else train.values)
    return table


def _labelled(figures: TaskFigures) -> str:
    without = f", {counted(figures.unlabelled, 'image')} without" if figures.unlabelled else ""
    return f"{figures.share:.1%}{without}"
