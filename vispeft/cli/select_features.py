"""``vispeft select-features``: keep the features of a VQT adapter that matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vispeft.adapters.attach import attach
from vispeft.adapters.bank import AdapterBank
from vispeft.building.config_files import read_config
from vispeft.cli.common import console, make_parser
from vispeft.cli.config_keys import check_config
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.core.method import method_from_dict
from vispeft.errors import ConfigError
from vispeft.methods.vqt import VQT, select_features
from vispeft.storage.files import JSON_FILE, read_adapter
from vispeft.storage.places import check_folder

__all__ = ["main", "select"]

EXAMPLE = """example (the four steps; halve the learning rate from the second on, as the public code does):
  vispeft train CONFIG --method vqt                                                       # runs/NAME/1
  vispeft train CONFIG --method vqt --init runs/NAME/1 --model.method.head_sparsity 1e-4  # runs/NAME/2
  vispeft select-features runs/NAME/1 runs/NAME/2 --keep 0.7 --out selected
  vispeft train CONFIG --method vqt --model.method.keep 0.7 --init selected"""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("select-features", "Keep the features of a VQT adapter that matter.", EXAMPLE)
    parser.add_argument("run", metavar="RUN", help="run that gives the queries")
    parser.add_argument("scored", metavar="SCORED", help="run that went on from it with head_sparsity")
    parser.add_argument("--keep", type=float, default=0.7, help="share of the features; default: %(default)s")
    parser.add_argument("--out", metavar="DIR", required=True, help="directory for the new adapter")
    given = parser.parse_args(list(argv))
    bank = select(Run.open(given.run), Run.open(given.scored), given.keep, Path(given.out))
    method = bank.plan().method
    assert isinstance(method, VQT)
    kept, of = method.head_width(bank.view), method.all_features(bank.view)
    console.print(f"{given.out} holds the queries and the {kept:,} of {of:,} features that matter most.")


def select(run: Run, scored: Run, keep: float, out: Path) -> AdapterBank:
    """Write an adapter with a run's queries and the features another run's classifier uses most.

    Args:
        run: The run with the queries.
        scored: The run whose classifier was trained with ``head_sparsity``.
        keep: Fraction of the features, above 0 and below 1.
        out: Directory for the adapter.

    Returns:
        The bank of the model that has the new adapter.

    Raises:
        ConfigError: If the fraction is out of range, a run is not of VQT with all features, the runs differ, or the
            directory contains an adapter.
    """
    if not 0 < keep < 1:
        raise ConfigError(f"--keep {keep}: a share above 0 and below 1 is needed.")
    if (out / JSON_FILE).exists():
        raise ConfigError(f"{out} holds an adapter already and is not overwritten. Choose another --out.")
    check_folder(out, "The adapter's directory")
    for one in (run, scored):
        check_config(read_config(one.config), [], str(one.config))
    (own, _, _), (header, _, head) = read_adapter(run.adapter), read_adapter(scored.adapter)
    method = method_from_dict(own["method"])
    if not isinstance(method, VQT) or method.keep < 1:
        raise ConfigError(f"{run.path} is no run of VQT with all features, so there is nothing to select.")
    if header["method"]["name"] != method.name or not method.is_like(method_from_dict(header["method"])):
        raise ConfigError(f"{scored.path} is a run of another method or other fields than {run.path}.")
    task, _ = load_task(run)
    chosen = dataclasses.replace(method, keep=keep)
    units = task.bank.state_dict()
    for name in task.bank.names:
        task.bank.detach(name)
    bank = attach(task.model, chosen)
    (place,) = (key for key in bank.state_dict() if key.endswith(".selected"))
    queries = {key: tensor for key, tensor in units.items() if not key.startswith("head/")}
    bank.load_state_dict({**queries, place: select_features(head["head/weight"], keep)})
    bank.save(out)
    return bank
