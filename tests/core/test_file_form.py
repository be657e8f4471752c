"""The form of an adapter's description, and limits: what does not fit is refused before anything is made of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vispeft
from tests.conformance.cells import Cell
from tests.core.edits import edit, edit_tensors, put, same, state_of
from tests.tiny import TINY
from vispeft.adapters.fitting import check_planned
from vispeft.cli.start import check_source, start_from
from vispeft.errors import ConfigError, FileError, VispeftError
from vispeft.storage import files
from vispeft.tasks import Classification

LORA = Cell("lora", "vit")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of five classes with all notes."""
    folder = tmp_path_factory.mktemp("form") / "adapter"
    bank = LORA.attach(LORA.model())
    bank.annotate(
        class_names=["a", "b", "c", "d", "e"],
        preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32], "interpolation": "bicubic"},
        metrics={"test/loss": float("nan")},
        output={"target": "class", "temperature": 1.5},
    )
    bank.save(folder)
    return folder


@pytest.fixture(scope="module")
def target() -> nn.Module:
    """A model with an adapter, which refused files leave as it is."""
    model = LORA.model()
    vispeft.attach(model, vispeft.SSF(), name="first")
    return model


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def refused(target: nn.Module, folder: Path) -> str:
    """Load a directory that is refused at once; the model stays as it is."""
    before, began = state_of(target), time.process_time()
    with pytest.raises(VispeftError) as caught:
        vispeft.load(target, folder, name="other")
    assert time.process_time() - began < 2
    assert same(before, state_of(target))
    message = str(caught.value)
    assert len(message) < 1200
    assert not any(character in message for character in "\x1b\x07\r\n\ud800")
    return message


DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("method", None, "method is None; a mapping is needed"),
        ("method", ["lora"], "method is"),
        ("method/name", 3, "method.name is 3; a text"),
        ("method/fields", ..., "method.fields is missing"),
        ("method/fields/rank", "4", "a whole number is needed"),
        ("method/fields/rank", 2.5, "a whole number is needed"),
        ("method/fields/rank", True, "a whole number is needed"),
        ("method/fields/rank", 10**30, "a whole number is needed"),
        ("method/fields/rank", 10**7, "has shape"),
        ("method/fields/rank", 10**6, "has shape"),
        ("method/fields/alpha", float("inf"), "a finite number"),
        ("method/fields/roles", "attn.qkv", "is needed"),
        ("method/fields/roles", [["attn.qkv"]], "is needed"),
        ("method/fields/blocks", [0.5], "is needed"),
        ("method/fields/dropout", {}, "a finite number up to 1e+09 is needed"),
        ("method/fields/alpha", 4.8e190, "a finite number up to 1e+09 is needed"),
        ("method/fields/alpha", DEEP, "nested deeper"),
        ("backbone", [], "backbone is"),
        ("backbone/fingerprint", ..., "backbone.fingerprint is missing"),
        ("backbone/fingerprint/class", ["VisionTransformer"], "a text is needed"),
        ("backbone/fingerprint/class", "\x1b[2JVit", "control characters"),
        ("backbone/fingerprint/dtype", "float33", "a dtype"),
        ("backbone/fingerprint/parts", {}, "another architecture"),
        ("backbone/fingerprint/parts/cls_token", "6521", "a mapping is needed"),
        ("backbone/fingerprint/parts/cls_token/float16", ..., "is missing"),
        ("backbone/fingerprint/function/heads", "3", "a list"),
        ("backbone/fingerprint/function/pool", None, "a text"),
        ("backbone/fingerprint/bound/pos_embed/shape", [1, -5, 24], "a whole number from 0"),
        ("tasks", [3], "a text"),
        ("tasks", [], "a list of"),
        ("tasks", ["a", "a"], "a list of different names"),
        ("seed", -1, "a whole number from 0"),
        ("seed", None, "a whole number from 0"),
        ("head", [5, 24], "a mapping"),
        ("head/weight", [5, 25], "describes it"),
        ("head/weight", [6, 24], "has 5 names"),
        ("head/extra", [5], "lacks the tensor 'head/extra'"),
        ("preprocessing", None, "a mapping"),
        ("preprocessing/std", [0, 0, 0], "a finite number from 1e-06 to 1e+06"),
        ("preprocessing/std", [0.5, 1e-320, 0.5], "a finite number from 1e-06"),
        ("preprocessing/mean", [0.5, 1e308, 0.5], "a finite number from -1e+06 to 1e+06"),
        ("preprocessing/input_size", [3, 2**20, 2**20], "a height and a width of at most 67,108,864 pixels"),
        ("preprocessing/crop_pct", 7, "a finite number from 0.001 to 1"),
        ("preprocessing/std", [0.5, 0.5], "one number for each of the 3 means"),
        ("preprocessing/mean", [0.5, float("nan"), 0.5], "a finite number"),
        ("preprocessing/mean", 0.5, "a list"),
        ("preprocessing/input_size", [3, 0, 32], "a whole number from 1"),
        ("class_names", ["a", "b", "c", "d"], "has 4 names, and the classifier has 5"),
        ("class_names", ["a", "b", "c", "d", "e", "f"], "has 6 names"),
        ("class_names", ["a", "b", "c", "d", ["e"]], "a text is needed"),
        ("class_names", ["a", "b", "c", "d", "\x1b[31m"], "control characters"),
        ("class_names", ["a", "b", "c", "d", ""], "a text of 1 to"),
        ("class_names", {"a": 0}, "a list"),
        ("metrics", [0.5], "a mapping"),
        ("output", "class", "a mapping"),
        ("output/temperature", -1, "a finite number from 0.001 to 1000"),
        ("output/temperature", None, "a finite number from 0.001"),
        ("output/temperature", 5e-324, "a finite number from 0.001"),
        ("output/decoder", {"name": 3}, "a text"),
        ("output/reading", 7, "a mapping"),
        ("output/reading", {"transparency": 5}, "a list of 3"),
        ("output/reading", {"max_pixels": 10**15}, "a whole number from 1 to 1099511627776"),
        ("output/short_side", 10**9, "a whole number from 1 to 65536"),
        ("output/palette", [[0, 0, 256]], "a whole number from 0 to 255"),
        ("output/evaluation", 1, "a text"),
        ("tensors", [], "a mapping"),
        ("tensors", {}, "tensors are missing"),
        ("tensors/blocks.0.attn.qkv:q/lora.A", ..., "1 of"),
        ("tensors/blocks.0.attn.qkv:q/lora.A/shape", "3", "a list"),
        ("merge_error", "small", "a finite number"),
        ("files", None, "a mapping"),
        ("files/adapter.safetensors", "00", "a sha256"),
        ("files/adapter.safetensors", ..., "names no adapter.safetensors"),
        ("files/../secret", "0" * 64, "no adapter has"),
        ("per_task", 1, "true or false"),
        ("schema", [1], "Upgrade"),
    ],
)
def test_a_description_of_another_form_is_refused(
    target: nn.Module, folder: Path, place: str, value: Any, says: str
) -> None:
    """At a0bd47e such files ended in raw errors of 44 places, or were loaded."""
    if "/lora.A" in place:
        head, _, rest = place.partition("/")
        key, _, last = rest.partition("lora.A")
        key += "lora.A"
        change = (lambda h: h[head].pop(key)) if value is ... else (lambda h: h[head][key].update({last[1:]: value}))
        edit(folder, change)
    elif place.startswith("files/.."):
        edit(folder, lambda header: header["files"].update({"../secret": value}))
    else:
        edit(folder, put(place, value))
    assert says in refused(target, folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[]", "no schema"),
        (b'{"schema": 1, "digest": "", "class_names": ["\\ud800"]}', "text or nesting that no adapter has"),
        (b'{"schema": 1, "digest": 3, "seed": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b" " * (files.LARGEST_JSON + 1), "at most 8,388,608 are read"),
    ],
)
def test_a_description_that_cannot_be_read_is_refused(
    target: nn.Module, folder: Path, content: bytes, says: str
) -> None:
    (folder / "adapter.json").write_bytes(content)
    assert says in refused(target, folder)


def test_many_names_are_refused_at_once(target: nn.Module, folder: Path) -> None:
    edit(folder, put("class_names", [str(number) for number in range(500_000)]))
    assert "class_names is a list of 500,000; a list of 0 to 100000" in refused(target, folder)


def test_tensors_that_are_not_those_described_are_refused(target: nn.Module, written: Path, tmp_path: Path) -> None:
    unit, head = "adapter.safetensors", "head.safetensors"
    key = "blocks.0.attn.qkv:q/lora.B"
    changes: list[tuple[str, Any, str]] = [
        (unit, lambda t: t.update(extra=torch.ones(3)), "has the tensor 'extra'"),
        (unit, lambda t: t.pop(key), "lacks the tensor"),
        (unit, lambda t: t.update({key: t[key].half()}), "is a float16 tensor"),
        (unit, lambda t: t.update({key: t[key][:2].clone()}), "describes it"),
        (unit, lambda t: t[key].fill_(float("inf")), "is not finite"),
        (head, lambda t: t.update({"elsewhere/x": torch.ones(3)}), "has the tensor 'elsewhere/x'"),
        (head, lambda t: t.pop("head/bias"), "lacks the tensor 'head/bias'"),
        (head, lambda t: t.update({"head/bias": torch.tensor([1, 2, 3, 4, 5j])}), "head/bias is of dtype complex64"),
        (head, lambda t: t.update({"head/bias": torch.full((5,), 1e300, dtype=torch.float64)}), "cannot be held"),
        (head, lambda t: t.update({"head/bias": torch.full((5,), 2**24 + 1)}), "cannot be held as float32"),
    ]
    for number, (name, change, says) in enumerate(changes):
        folder = Path(shutil.copytree(written, tmp_path / str(number)))
        edit_tensors(folder, name, change)
        assert says in refused(target, folder)


def test_shapes_that_a_file_claims_are_compared_before_they_are_made(
    target: nn.Module, folder: Path, tmp_path: Path
) -> None:
    """A sparse tensor of a terabyte is a few bytes in a file."""
    key = "blocks.0.attn.qkv:q/lora.B"
    edit(folder, lambda header: header["tensors"][key].update(codec="sparse", shape=[10**6, 10**6]))
    assert f"{key} has shape (1000000, 1000000)" in refused(target, folder)
    cell = Cell("vqt", "vit")
    cell.attach(cell.model()).save(tmp_path / "vqt")
    edit(tmp_path / "vqt", put("method/fields/num_queries", 10**6))
    assert "has shape" in refused(target, tmp_path / "vqt")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "head.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "earlier"])
def test_only_regular_files_are_read(target: nn.Module, folder: Path, name: str, kind: str) -> None:
    """A pipe without a writer hangs for ever, and a device may have no end."""
    path = folder / name
    path.unlink()
    if kind == "earlier":
        path.write_bytes(b"\x08" + bytes(7) + b"{}      ")
        path = path.with_name(f".{name}.earlier")
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert name in refused(target, folder)


def test_a_file_longer_than_it_says_is_not_read(target: nn.Module, folder: Path) -> None:
    """A hole of a terabyte takes no room on the disk."""
    with open(folder / "adapter.safetensors", "r+b") as file:
        file.truncate(2**40)
    assert "truncated or was altered" in refused(target, folder)


def test_a_file_that_is_refused_leaves_a_plain_model_plain(folder: Path) -> None:
    model = LORA.model(num_classes=7)
    before = state_of(model)
    edit_tensors(folder, "head.safetensors", lambda tensors: tensors["head/bias"].fill_(float("nan")))
    with pytest.raises(FileError, match="head/bias is not finite"):
        vispeft.load(model, folder)
    assert same(before, state_of(model))


def test_the_description_is_that_of_the_model_that_was_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It named the size and the channels of the published weights."""
    own = LORA.model().patch_embed.img_size
    LORA.attach(LORA.model(in_chans=4)).save(tmp_path)
    found = json.loads((tmp_path / "adapter.json").read_text())["preprocessing"]
    assert found["input_size"] == [4, *own]
    assert "mean" not in found
    vispeft.load(LORA.model(), tmp_path)
    assert "images of 4 channels, and this model takes 3" in caplog.text
    full = Cell("full", "vit")
    full.attach(full.model()).save(tmp_path / "full")
    with pytest.raises(FileError, match=r"on a model for other images \(pos_embed \(1, .*patch_embed"):
        vispeft.load(full.model(in_chans=1, img_size=64), tmp_path / "full")


def test_notes_that_no_file_may_hold_are_refused_when_they_are_set() -> None:
    bank = LORA.attach(LORA.model())
    for notes, says in (
        ({"class_names": ["a", "b"]}, "2 class names, and its classifier has 5"),
        ({"class_names": ["a", "b", "c", "d", "\ud800"]}, "control characters"),
        ({"class_names": ["a", "b", "c", "d", "e\x07"]}, "control characters"),
        ({"output": {"temperature": 0.0}}, "from 0.001 to 1000"),
        ({"preprocessing": {"mean": [0.5] * 3, "std": [0.5, 0.5, 0.0]}}, "from 1e-06"),
    ):
        with pytest.raises(ConfigError, match=says):
            bank.annotate(**notes)  # type: ignore[arg-type]
        assert bank.notes() == {}


def test_class_names_and_a_later_classifier_are_held_against_each_other(tmp_path: Path) -> None:
    model = LORA.model()
    bank = LORA.attach(model)
    bank.annotate(class_names=["a", "b", "c", "d", "e"])
    model.reset_classifier(3)  # the names are those of the former classifier
    bank.save(tmp_path / "new")
    assert json.loads((tmp_path / "new/adapter.json").read_text())["class_names"] is None


def test_equal_class_names_of_a_file_are_kept(tmp_path: Path) -> None:
    bank = LORA.attach(LORA.model())
    bank.annotate(class_names=["crane", "crane", "c", "d", "e"])  # as ImageNet-1k has them
    bank.save(tmp_path / "a")
    loaded = vispeft.load(LORA.model(), tmp_path / "a")
    loaded.save(tmp_path / "b")
    assert json.loads((tmp_path / "b/adapter.json").read_text())["class_names"][:2] == ["crane", "crane"]


def as_sparse(folder: Path, file: str, key: str, shape: list[int]) -> None:
    """Describe a tensor as a sparse one of any size, of 9 bytes."""
    edit_tensors(folder, file, lambda tensors: tensors.update({key: torch.tensor([0] * 8 + [1], dtype=torch.uint8)}))
    described = {"codec": "sparse", "dtype": "float32", "shape": shape}
    edit(folder, lambda header: header["tensors"].update({key: described}))


@pytest.mark.parametrize("shape", [[2**33], [2**40] * 8], ids=str)
def test_a_few_bytes_that_describe_gigabytes_are_decoded_by_no_reader(folder: Path, shape: list[int]) -> None:
    """``--init`` and readers of decoders took as much memory as the description named."""
    as_sparse(folder, "adapter.safetensors", "blocks.0.attn.qkv:q/lora.A", shape)
    assert files.read_decoder(folder) == {}
    check_source(str(folder), vispeft.LoRA)
    task = Classification(backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=5, method=vispeft.LoRA())
    with pytest.raises(VispeftError):
        start_from(task, str(folder), [])
    bank = LORA.attach(LORA.model())
    with pytest.raises(FileError, match="has shape"):
        files.read_adapter(folder, lambda header: check_planned(bank, header))


def test_a_classifier_of_a_few_bytes_is_refused(folder: Path, target: nn.Module) -> None:
    as_sparse(folder, "head.safetensors", "head/weight", [5, 2**31])
    assert "which no code of a classifier makes of them" in refused(target, folder)


def test_a_long_header_of_tensors_is_not_read(folder: Path, target: nn.Module) -> None:
    text = b'{"a":[' + b"[]," * (3 * 2**20) + b"[]]}"
    content = len(text).to_bytes(8, "little") + text
    (folder / "adapter.safetensors").write_bytes(content)
    edit(folder, put("files/adapter.safetensors", hashlib.sha256(content).hexdigest()))
    assert "is truncated or was altered" in refused(target, folder)
