"""``vispeft zoo``: list, show, verify, add, remove, pull and push adapters."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from vispeft.cli.common import console, make_parser
from vispeft.errors import ConfigError, check_count, counted
from vispeft.zoo.adapters import PREFIX, find_zoo_adapter, list_zoo_adapters
from vispeft.zoo.folder import own_zoo, zoo_folder
from vispeft.zoo.index import CARD, ZooEntry, read_index

__all__ = ["COLUMNS", "main", "zoo_table"]

EXAMPLE = """example:
  vispeft zoo list
  vispeft zoo show digits_ssf
  vispeft zoo verify
  vispeft zoo verify digits_ssf --metrics
  vispeft zoo add runs/digits_ssf/1 --name my_digits --license MIT
  vispeft zoo remove my_digits
  vispeft zoo pull OWNER/NAME@COMMIT
  vispeft zoo pull https://example.org/zoo --adapter shells_lora --name shells
  vispeft zoo pull /media/stick/zoo --adapter shells_lora
  vispeft zoo push my_digits OWNER/NAME
  vispeft zoo push my_digits /media/stick/zoo

An adapter of the zoo is named as zoo:NAME wherever the directory of an adapter or of a run is taken: vispeft.load,
vispeft predict zoo:digits_ssf IMAGES --out DIR, vispeft evaluate zoo:digits_ssf, vispeft train CONFIG --init zoo:NAME.
Pulling takes adapters from a folder, an address that begins with https://, or the Hugging Face Hub (HF_ENDPOINT for
another one; log in by `hf auth login`); VISPEFT_OFFLINE=1 or HF_HUB_OFFLINE=1 forbids the network.
What is added or pulled goes into vispeft's cache folder (VISPEFT_CACHE), or into the zoo that --zoo names."""

NOT_CHECKED = 1
"""Exit status of ``verify --strict`` where something could not be checked."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.

    Raises:
        SystemExit: With status 1, if ``verify --strict`` could not check everything.
    """
    given, rest = _parser().parse_known_args(list(argv))
    if rest and given.action is not _verify:
        raise ConfigError(f"{rest[0]} is no argument of vispeft zoo {argv[0]}; --help lists those.")
    given.overrides = rest
    given.action(given)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("zoo", "List, check, add and fetch adapters of the zoo.", EXAMPLE)
    commands = parser.add_subparsers(metavar="ACTION", required=True, parser_class=type(parser))

    def command(name: str, says: str, action: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=says, description=says, allow_abbrev=False)
        made.set_defaults(action=action)
        return made

    command("list", "print a table of all adapters", _list)
    show = command("show", "print the card of an adapter", _show)
    show.add_argument("name", metavar="NAME")
    verify = command("verify", "compare all files with their digests, and figures with the stated ones", _verify)
    verify.add_argument("name", metavar="NAME", nargs="?", help="default: all")
    verify.add_argument("--metrics", action="store_true", help="measure the figures again where the data are present")
    verify.add_argument("--strict", action="store_true", help="exit status 1 where something could not be checked")
    add = command("add", "add the adapter of a finished run", _add)
    add.add_argument("run", metavar="RUN")
    add.add_argument("--name", required=True, help="its name in the zoo")
    add.add_argument("--license", default="not stated", help="licence of the adapter")
    add.add_argument("--note", default="", help="why it is in the zoo, for its card")
    add.add_argument("--baseline", metavar="RUN", help="run of the linear probe on the same data")
    add.add_argument("--seeds", metavar="RUN", nargs="*", default=[], help="runs with other seeds, for its card")
    add.add_argument("--full_precision", action="store_true", help="store 32 bits also where 16 have the same figures")
    remove = command("remove", "remove an adapter that was added or pulled", _remove)
    remove.add_argument("name", metavar="NAME")
    fetch = command("pull", "fetch an adapter of others, or again one that was fetched", _pull)
    fetch.add_argument("source", metavar="SOURCE", help="NAME, OWNER/NAME[@REVISION] of the hub, address, or folder")
    fetch.add_argument("--adapter", metavar="NAME", help="the adapter, where the source has several")
    fetch.add_argument("--name", help="its name here; default: the one it has there")
    fetch.add_argument("--max_bytes", type=int, help="largest size of its files together; default 512 MiB")
    push = command("push", "send an adapter to a repository of the hub, or to a zoo in a folder", _push)
    push.add_argument("name", metavar="NAME")
    push.add_argument("target", metavar="TARGET", help="OWNER/NAME of a repository, or a folder")
    push.add_argument("--private", action="store_true", help="make the repository a private one, if it is new")
    for made in (add, remove):
        made.add_argument("--zoo", metavar="DIR", help="folder of the zoo; default: in vispeft's cache folder")
    return parser


def _place(given: argparse.Namespace) -> Path:
    return own_zoo() if given.zoo is None else Path(given.zoo)


# ------------------------------------------------------------------ looking


def zoo_table(entries: Mapping[str, ZooEntry]) -> list[list[str]]:
    """Return the rows of the table of adapters: name, task, backbone, method, figures, gain, trainable, bytes.

    Args:
        entries: The adapters by name.
    """
    from vispeft.cli.zoo_card import figure_text
    from vispeft.cli.zoo_facts import gain

    return [
        [
            name,
            entry.task,
            entry.backbone,
            entry.method,
            ", ".join(figure_text(key, value) for key, value in entry.figures.items()),
            "" if entry.baseline is None else f"{gain(entry.figures, entry.baseline):+.1f} %",
            f"{entry.trainable:,}",
            f"{entry.size:,}",
        ]
        for name, entry in entries.items()
    ]


COLUMNS = ("name", "task", "backbone", "method", "on test images", "over probe", "trainable", "bytes")
"""Columns of `zoo_table`."""


def _table_of(task: str, entries: Sequence[ZooEntry]) -> Table:
    """Make the table of the adapters of one kind of task, narrow enough for a terminal of 80 columns."""
    from vispeft.cli.zoo_card import figure_text

    names = list(dict.fromkeys(key for entry in entries for key in entry.figures))
    measured = f"test {names[0]}" if len(names) == 1 else f"{len(names)} figures each, `vispeft zoo show NAME`"
    table = Table(title=f"{task} ({measured})", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    for column in ("name", "backbone", "method", "test", "over probe", "trainable", "size"):
        left = column in ("name", "backbone", "method")
        table.add_column(column, justify="left" if left else "right", no_wrap=column in ("name", "trainable", "size"))
    for entry in entries:
        [(name, _, backbone, method, _, gained, trainable, _)] = zoo_table({entry.name: entry})
        shown = figure_text(*next(iter(entry.figures.items()))).split()[-1] if len(names) == 1 else ""
        size = decimal(entry.size)
        table.add_row(name, backbone.removeprefix(PREFIX), method, shown, gained, trainable, size)
    return table


def _list(given: argparse.Namespace) -> None:
    found = {name: adapter.entry for name, adapter in list_zoo_adapters().items()}
    if not found:
        console.print("The zoo has no adapters. `vispeft zoo add` and `vispeft zoo pull` bring some.")
        return
    for task in sorted({entry.task for entry in found.values()}):
        console.print(_table_of(task, [entry for entry in found.values() if entry.task == task]))
    console.print("`vispeft zoo show NAME` prints a card; vispeft.zoo.create('NAME') makes a model that predicts.")


def _show(given: argparse.Namespace) -> None:
    adapter = find_zoo_adapter(given.name.removeprefix(PREFIX))
    adapter.verify()
    console.print((adapter.folder / CARD).read_text(encoding="utf-8"), soft_wrap=True)
    if adapter.entry.named_there is not None:
        console.print(
            f"Here it is zoo:{adapter.entry.name}; its card is that of {adapter.entry.source}.", soft_wrap=True
        )
    console.print(f"Files: {adapter.folder}", soft_wrap=True)


# ------------------------------------------------------------------ checking


def _verify(given: argparse.Namespace) -> None:
    from vispeft.cli.zoo_verify import verify_all

    if given.overrides and (given.name is None or not given.metrics):
        raise ConfigError(f"{given.overrides[0]}: keys of the data are changed for one NAME, with --metrics.")
    if given.name is None:
        adapters = list(list_zoo_adapters().values())
    else:
        adapters = [find_zoo_adapter(given.name.removeprefix(PREFIX))]
    unknown = verify_all(adapters, metrics=given.metrics, overrides=given.overrides)
    if unknown and given.strict:
        console.print(f"{counted(unknown, 'adapter')} could not be checked in full, and --strict was given.")
        raise SystemExit(NOT_CHECKED)


# ------------------------------------------------------------------ changing


def _add(given: argparse.Namespace) -> None:
    from vispeft.cli.zoo_add import Extras, add_run

    extras = Extras(
        license=given.license,
        note=given.note,
        baseline=given.baseline,
        seeds=given.seeds,
        half=not given.full_precision,
    )
    entry = add_run(given.run, given.name, _place(given), extras)
    console.print(f"zoo:{entry.name} was added: {entry.size:,} bytes, in {_place(given) / entry.name}", soft_wrap=True)


def _remove(given: argparse.Namespace) -> None:
    from vispeft.zoo.install import remove_adapter

    name = given.name.removeprefix(PREFIX)
    if given.zoo is None and name in read_index(zoo_folder()):
        raise ConfigError(
            f"zoo:{name} ships with the package and stays. Those that were added or pulled can be removed."
        )
    remove_adapter(_place(given), name)
    console.print(f"zoo:{name} was removed.")


# ------------------------------------------------------------------ sharing


def _pull(given: argparse.Namespace) -> None:
    from vispeft.cli.zoo_trust import check_foreign
    from vispeft.zoo.pull import LARGEST_PULL, Wanted, pull

    if given.max_bytes is not None:
        check_count("--max_bytes", given.max_bytes)
    wanted = Wanted(adapter=given.adapter, name=given.name, largest=given.max_bytes or LARGEST_PULL)
    entry, fetched = pull(given.source, wanted, check_foreign)
    if not fetched:
        console.print(f"zoo:{entry.name} is here already, and whole.")
        return
    console.print(f"zoo:{entry.name} was pulled from {entry.source}: {entry.size:,} bytes.", soft_wrap=True)
    console.print(f"`vispeft zoo show {entry.name}` prints its card.")


def _push(given: argparse.Namespace) -> None:
    from vispeft.cli.zoo_push import push_adapter

    adapter = find_zoo_adapter(given.name.removeprefix(PREFIX))
    where = push_adapter(adapter, given.target, private=given.private)
    console.print(f"zoo:{adapter.entry.name} was pushed. Others get it by: vispeft zoo pull {where}", soft_wrap=True)
