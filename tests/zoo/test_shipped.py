"""The adapters that ship: whole, small enough, and with the cards and the table that are generated from them."""

import json
from math import prod
from pathlib import Path

from vispeft.cli.zoo import COLUMNS
from vispeft.cli.zoo_card import card
from vispeft.cli.zoo_facts import gain
from vispeft.storage.files import ADAPTER_FILE, HEAD_FILE, JSON_FILE, read_adapter
from vispeft.zoo.index import FILES, check_files, read_index

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "model_zoo"
KB, MB = 1000, 1_000_000


def entries():
    return read_index(ZOO)


def test_folders_and_index_say_the_same():
    folders = {path.name for path in ZOO.iterdir() if path.is_dir()}
    assert folders == set(entries()) | {"backbones"}
    for name, entry in entries().items():
        check_files(ZOO, entry)
        assert {path.name for path in (ZOO / name).iterdir()} == set(entry.files) <= set(FILES)
        assert (ZOO / name / "CARD.md").read_text(encoding="utf-8") == card(ZOO / name)
        assert str(ROOT) not in (ZOO / name / "config.yaml").read_text(encoding="utf-8")


def test_sizes():
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) <= 34 * MB
    assert sum(entry.size for entry in entries().values()) <= 18 * MB
    for name, entry in entries().items():
        several = entry.task == "multi-task"
        assert entry.files[ADAPTER_FILE]["bytes"] <= (MB if several else 300 * KB), name
        assert entry.files.get(HEAD_FILE, {"bytes": 0})["bytes"] <= (4 if several else 2) * MB, name


def test_an_adapter_of_one_bit_takes_a_28th():
    for name in entries():
        header = json.loads((ZOO / name / JSON_FILE).read_text(encoding="utf-8"))
        if header["method"]["fields"].get("bits") != 1:
            continue
        _, units, _ = read_adapter(ZOO / name)
        content = (ZOO / name / ADAPTER_FILE).read_bytes()
        stored = len(content) - 8 - int.from_bytes(content[:8], "little")
        assert stored * 28 <= 4 * sum(prod(tensor.shape) for tensor in units.values()), name


def test_those_that_are_no_better_than_the_probe_say_why():
    for name, entry in entries().items():
        assert entry.baseline is not None, name
        text = (ZOO / name / "CARD.md").read_text(encoding="utf-8")
        assert gain(entry.figures, entry.baseline) > 0 or "Why it is here" in text, name


def test_the_table_of_the_docs_is_made_from_the_index(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_zoo

    text = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    shown = text.split("<!-- zoo: begin -->")[1].split("<!-- zoo: end -->")[0].strip().splitlines()
    assert shown == train_zoo.table()
    assert all(column in shown[0] for column in COLUMNS)
    assert {row.config for row in train_zoo.ROWS.values()} == {path.stem for path in (ROOT / "configs/zoo").iterdir()}
    adapters = [name for name, row in train_zoo.ROWS.items() if row.probe is not None]
    assert len(adapters) >= 20
    assert set(entries()) <= set(adapters)
    assert all(train_zoo.ROWS[train_zoo.ROWS[name].probe].probe is None for name in adapters)
