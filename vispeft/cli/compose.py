"""``vispeft compose``: make one adapter of several."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.table import Table

from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.composing import Composed, How
from vispeft.cli.common import console, make_parser
from vispeft.cli.config_keys import take_overrides
from vispeft.cli.made_runs import Source, check_data_keys, measured_run, new_folder, open_sources, write_run
from vispeft.compose.arithmetic import Sign
from vispeft.errors import BaseMismatchError, ConfigError, UnknownNameError

__all__ = ["main"]

NAME = "composed"
EXAMPLE = """example:
  vispeft compose runs/mean runs/digits_lora/1 runs/digits_lora/2 runs/digits_lora/3
  vispeft compose runs/both runs/digits_lora/1 zoo:digits_lora --how sum --weights 1 -0.5 --head zoo:digits_lora
  vispeft compose runs/small runs/digits_lora/1 runs/digits_lora/2 --how svd --rank 4
  vispeft compose runs/ties runs/digits_lora/1 runs/digits_lora/2 --how ties --density 0.2

Sums are of the changes W' - W, never of factors. average: weights 1/n by default; sum: 1; concat: a sum of low-rank
terms that stays one; svd: a sum, approximated at --rank (by default the largest of the adapters); ties: the largest
entries, those of the elected sign averaged; dare: entries dropped at random, the others divided by --density.
Classifiers are averaged where the classes are the same; else --head names the adapter whose classifier is kept.

OUT is a folder that load, predict, evaluate, merge, export and zoo add take. Its adapter.json says what it was made of.
Where the adapters are those of runs, OUT is measured on the data of the run whose classifier it has; keys under data
can be overridden, such as --data.root DIR."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    own, overrides = take_overrides(argv)
    given = _parse(own)
    out = Path(given.out)
    sources = open_sources(given.adapters)
    check_data_keys(sources, overrides)
    head = None if given.head is None else _named(given.head, sources)
    _check_decoders(sources, head)
    with new_folder(out) as place:
        bank = _loaded(sources)
        made = bank.compose(
            NAME,
            [source.label for source in sources],
            how=given.how,
            weights=given.weights,
            rank=given.rank,
            head=None if head is None else head.label,
            density=given.density,
            sign=given.sign,
            seed=given.seed,
        )
        _tell_files(bank, sources)
        owner = head or next((source for source in sources if source.label == made.head), sources[0])
        write_run(place, bank, NAME, owner, {"command": shlex.join(["vispeft", "compose", *argv])})
        console.print(_table(made, sources))
        console.print(_sentence(made, out, sources), soft_wrap=True)
        if owner.run is not None and given.measure:
            measured_run(place, out, owner, overrides)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = make_parser("compose", "Make one adapter of several.", EXAMPLE)
    parser.add_argument("out", metavar="OUT", help="the folder of the new adapter")
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="directory of an adapter or a run, or zoo:NAME")
    parser.add_argument("--how", choices=get_args(How), default="average", help="default average")
    parser.add_argument("--weights", metavar="W", type=float, nargs="+", help="a multiplier for each adapter")
    parser.add_argument("--rank", type=int, help="rank of the result; default that of the exact sum")
    parser.add_argument("--head", metavar="ADAPTER", help="keep the classifier of this adapter")
    parser.add_argument("--density", type=float, default=0.5, help="share of entries that ties and dare keep")
    parser.add_argument("--sign", choices=get_args(Sign), help="how ties and dare elect signs; ties: default total")
    parser.add_argument("--seed", type=int, default=0, help="seed of the entries that dare drops; default 0")
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="leave the figures out")
    return parser.parse_args(_with_negative_weights(argv))


def _with_negative_weights(argv: Sequence[str]) -> list[str]:
    """Let -1 after --weights be a number: argparse takes -1e-3 for an option."""
    return [f" {text}" if text.startswith("-") and _is_number(text) else text for text in argv]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _named(name: str, sources: Sequence[Source]) -> Source:
    """Find the adapter that --head names."""
    for source in sources:
        if name == source.given:
            return source
    known = [source.given for source in sources]
    raise UnknownNameError("adapter for --head", name, known, "Name it as among the adapters.")


def _check_decoders(sources: Sequence[Source], head: Source | None) -> None:
    """Refuse to average decoders."""
    decoders = [source for source in sources if source.decoder]
    if decoders and head is None and len(sources) > 1:
        raise ConfigError(
            f"{decoders[0].given} has a decoder, and decoders are not averaged. Name the one to keep: --head "
            f"{decoders[0].given}"
        )


def _loaded(sources: Sequence[Source]) -> AdapterBank:
    """Load all adapters on one backbone: that of the first run, or the one that the first file names."""
    first = next((source for source in sources if source.run is not None), sources[0])
    model, _ = first.model()
    with AdapterBank.opened(model) as bank:
        for source in sources:
            try:
                bank.load(source.folder, source.label)
            except BaseMismatchError as error:
                raise BaseMismatchError(
                    f"{source.given} belongs to another backbone than {first.given}. {error}"
                ) from error
    return bank


def _tell_files(bank: AdapterBank, sources: Sequence[Source]) -> None:
    """Add the files to what the adapter was made of: where they were, their digests, and who wrote them."""
    parts = bank._entries[NAME].notes["made_of"]["parts"]
    for part, source in zip(parts, sources, strict=True):
        part["source"] = source.given[:500]
        part |= {"file_digest": source.header["digest"], "vispeft": source.header["vispeft"]}


def _table(made: Composed, sources: Sequence[Source]) -> Table:
    table = Table()
    for heading in ("adapter", "method", "change", "weight"):
        table.add_column(heading, justify="right" if heading == "weight" else "left", overflow="fold")
    for part, source in zip(made.parts, sources, strict=True):
        kind = "a term" if part.kind == "additive" else "W' - W"
        table.add_row(source.given, part.method, kind, f"{part.weight:g}")
    return table


def _sentence(made: Composed, out: Path, sources: Sequence[Source]) -> str:
    rank = "" if made.rank is None else f" of rank {made.rank}"
    kept = "" if made.kept_energy is None else f", which keeps {100 * made.kept_energy:.2f} % of the energy"
    settings = ", ".join(f"{key} {value}" for key, value in made.settings.items() if value is not None)
    given = {source.label: f"the classifier of {source.given}" for source in sources}
    head = {"average": "the average of the classifiers", None: "no classifier", **given}[made.head]
    return f"{out}: {made.how}{f' ({settings})' if settings else ''}, held as {made.method}{rank}{kept}, with {head}."
