"""``vispeft port``: carry an adapter to another checkpoint of its backbone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from torch import nn

from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.ported_files import port_file
from vispeft.adapters.porting import Drift, Ported
from vispeft.cli.common import console, make_parser
from vispeft.cli.config_keys import take_overrides
from vispeft.cli.made_runs import (
    Source,
    check_data_keys,
    measured_run,
    new_folder,
    open_made,
    open_sources,
    write_run,
)
from vispeft.data.base import ImageData
from vispeft.errors import BackboneError, BaseMismatchError, ConfigError, DataError, check_count
from vispeft.tasks.refit import refit_head

__all__ = ["main"]

ROWS = 12
"""Most layers in the table: those that are furthest apart."""
EXAMPLE = """example:
  vispeft port runs/ported runs/digits_lora/1 --weights continued.safetensors
  vispeft port runs/ported runs/digits_lora/1 --weights continued.safetensors --refit 4
  vispeft port runs/ported zoo:digits_lora --backbone timm/vit_tiny_patch16_224.another

The new backbone has the architecture of the old one and other weights: a file (--weights), or another pretrained name
(--backbone). How far the two are apart is shown by layer, |W_1 - W_0| / |W_0|. Above 2 % the command warns, above 10 %
it refuses unless --allow-drift is given; both limits are provisional. Where the old backbone cannot be had, the drift
is unknown. OUT is a folder as those of compose. Where the adapter is that of a run, --refit N fits the classifier anew
on N training batches, and OUT is measured on the run's data; keys under data can be overridden, such as --data.root
DIR."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("port", "Carry an adapter to another checkpoint of its backbone.", EXAMPLE)
    parser.add_argument("out", metavar="OUT", help="the folder of the ported adapter")
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of an adapter or a run, or zoo:NAME")
    parser.add_argument("--backbone", metavar="NAME", help="name of the new backbone; default that of the old one")
    parser.add_argument("--weights", metavar="FILE", help="file of the new backbone's weights")
    parser.add_argument("--allow-drift", action="store_true", help="also port to weights more than 10 %% apart")
    parser.add_argument("--as-delta", action="store_true", help="carry W' - W_0 in place of a rule")
    parser.add_argument("--refit", metavar="N", type=int, help="fit the classifier anew on N training batches")
    parser.add_argument("--no-measure", dest="measure", action="store_false", help="leave the figures out")
    own, overrides = take_overrides(argv)
    given = parser.parse_args(own)
    if given.backbone is None and given.weights is None:
        raise ConfigError("Name the new backbone: --weights FILE, or --backbone NAME.")
    if given.refit is not None:
        check_count("--refit", given.refit)
    (source,) = open_sources([given.adapter])
    check_data_keys([source], overrides)
    if given.refit is not None and source.run is None:
        raise ConfigError(f"--refit needs training images, and {given.adapter} is no run that names its data.")
    weights = None if given.weights is None else str(Path(given.weights).absolute())
    changed = {key: value for key, value in (("backbone", given.backbone), ("weights", weights)) if value is not None}
    with new_folder(Path(given.out)) as place:
        new, _ = source.model(changed)
        ported = _ported(source, new, given.allow_drift, given.as_delta)
        command = shlex.join(["vispeft", "port", *argv])
        write_run(place, ported.bank, ported.name, source, {**changed, "command": command})
        console.print(_table(ported.drift))
        console.print(f"{given.out}: {ported.method}, the backbone's drift is {ported.drift}.", soft_wrap=True)
        for note in ported.notes:
            console.print(note, soft_wrap=True)
        if given.refit is not None:
            _refit(place, given.refit, source, overrides)
        if source.run is not None and given.measure:
            measured_run(place, Path(given.out), source, overrides)


def _ported(source: Source, new: nn.Module, allow_drift: bool, as_delta: bool) -> Ported:
    """Port from the old backbone, or from the file alone where that cannot be had."""
    try:
        old, _ = source.model()
        with AdapterBank.opened(old) as bank:
            bank.load(source.folder, source.label)
    except (BackboneError, BaseMismatchError) as error:
        if as_delta:
            raise
        console.print(f"The old backbone cannot be had here: {error}", soft_wrap=True)
        return port_file(new, source.folder, source.label)
    return bank.port(new, source.label, allow_drift=allow_drift, as_delta=as_delta)


def _refit(place: Path, count: int, source: Source, overrides: Sequence[str]) -> None:
    """Fit the classifier of a run that was written, and write it again."""
    cli = open_made(place, source, overrides)
    data = cli.datamodule
    if not isinstance(data, ImageData):
        raise DataError(f"--refit: {type(data).__name__} gives no training images without augmentation.")
    data.fit_to(cli.model.preprocessing)
    data.prepare_data()
    data.setup()
    strength = refit_head(cli.model.bank, data.plain_dataloader("train"), count=count)
    cli.model.save_adapter(place)
    console.print(f"The classifier was fitted anew on {count} batches (strength {strength:g}).")


def _table(drift: Drift) -> Table:
    table = Table(title=None)
    table.add_column("layer", overflow="fold")
    table.add_column("drift", justify="right")
    order = sorted(drift.layers, key=lambda key: -1.0 if drift.layers[key] is None else -(drift.layers[key] or 0.0))
    for key in order[:ROWS]:
        value = drift.layers[key]
        table.add_row(key, "unknown" if value is None else f"{100 * value:.2f} %")
    if len(order) > ROWS:
        table.add_row(f"{len(order) - ROWS} more", "")
    return table
