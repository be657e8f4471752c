"""Adapter files: damage, interrupted saves, notes, base weights, and packed codes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.errors import (
    ConfigError,
    FileError,
    UnknownNameError,
)
from vispeft.storage.codecs import pack_bits, unpack_bits
from vispeft.storage.files import read_adapter

VIT = Cell("ssf", "vit")


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors", "head.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_damaged_files_are_refused(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        content[middle] ^= 1
        path.write_bytes({"cut": content[:middle], "flip": content, "empty": b""}[damage])
    model = VIT.model()
    with pytest.raises(FileError, match=name):
        vispeft.load(model, saved)
    assert type(model) is VisionTransformer


def test_files_of_a_later_schema_or_an_unknown_method_are_refused(saved: Path) -> None:
    from vispeft.storage.files import _digest

    for key, value, says in (("schema", 99, "Upgrade"), ("method", {"name": "ssg", "fields": {}}, "'ssf'")):
        copy = saved.parent / key
        shutil.copytree(saved, copy)
        header = json.loads((copy / "adapter.json").read_text())
        header[key], header["digest"] = value, ""
        header["digest"] = _digest(header)
        (copy / "adapter.json").write_text(json.dumps(header))
        with pytest.raises(vispeft.VispeftError, match=says):
            vispeft.load(VIT.model(), copy)


def test_a_header_with_a_key_twice_is_refused(saved: Path) -> None:
    """The library takes the last one, so the file could hold tensors that nobody reads."""
    from vispeft.storage.files import _digest

    path = saved / "adapter.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode().rstrip()
    name, entry = list(json.loads(text).items())[1]
    text = f"{text[:-1]},{json.dumps(name)}:{json.dumps(entry)}}}"
    content = len(text).to_bytes(8, "little") + text.encode() + content[8 + length :]
    path.write_bytes(content)
    header = json.loads((saved / "adapter.json").read_text())
    header["files"][path.name], header["digest"] = hashlib.sha256(content).hexdigest(), ""
    header["digest"] = _digest(header)
    (saved / "adapter.json").write_text(json.dumps(header))
    with pytest.raises(FileError, match="twice in its header"):
        vispeft.load(VIT.model(), saved)


def test_saving_over_an_adapter_keeps_it_when_it_fails(
    saved: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FileError, match="No space left"):
        VIT.attach(model).save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_save_that_fails_half_way_is_rolled_back(
    saved: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = VIT.attach(model)
    move(bank, "default", seed=12)
    before, calls, replace = {p.name: p.read_bytes() for p in saved.iterdir()}, [], os.replace

    def third_fails(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr("os.replace", third_fails)
    with pytest.raises(FileError, match="Input/output"):
        bank.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_save_that_is_cut_off_leaves_the_earlier_adapter(saved: Path, tmp_path: Path) -> None:
    wanted = vispeft.load(VIT.model(), saved).state_dict()
    other = VIT.model()
    bank = VIT.attach(other)
    move(bank, "default", seed=12)
    bank.save(tmp_path / "new")
    (saved / "adapter.safetensors").rename(saved / ".adapter.safetensors.earlier")
    shutil.copy(tmp_path / "new/adapter.safetensors", saved / "adapter.safetensors")
    assert all(torch.equal(t, wanted[k]) for k, t in vispeft.load(VIT.model(), saved).state_dict().items())


def test_a_save_that_is_killed_anywhere_is_finished_or_undone(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice, it left neither the old nor the new adapter readable; files beside them stayed for ever."""
    bank = VIT.attach(model)
    values = []
    for seed in range(3):
        move(bank, "default", seed=seed)
        values.append({key: tensor.clone() for key, tensor in bank.state_dict().items()})
    folder, steps = tmp_path / "adapter", ("open", "replace", "link", "unlink")

    def save(number: int, until: int) -> bool:
        """Save the values of a number; with one of the steps behind `until`, the process is gone."""
        bank.load_state_dict(values[number])
        done = 0

        def counted(name: str) -> Any:
            real = getattr(os, name)

            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal done
                done += 1
                if done > until:
                    raise OSError("killed")
                return real(*args, **kwargs)

            return step

        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(os, name, counted(name))
            with suppress(FileError):
                bank.save(folder)
        return done > until

    def read() -> int:
        """Read the adapter and find which one it is."""
        _, units, head = read_adapter(folder)
        found = {**units, **head}
        (number,) = (n for n, own in enumerate(values) if all(torch.equal(own[key], found[key]) for key in found))
        return number

    first = 0
    while True:
        save(0, 1000)
        cut = save(1, first)
        assert read() in (0, 1)
        for second in (3, 5, 8):  # the next one is killed as well
            save(2, second)
            assert read() in (0, 1, 2)
        assert not save(2, 1000)
        assert read() == 2
        assert {path.name for path in folder.iterdir()} == {"adapter.json", "adapter.safetensors", "head.safetensors"}
        if not cut:
            break
        first += 1
    assert first > 9


def test_a_save_removes_own_leftovers_alone(saved: Path, model: nn.Module) -> None:
    others = [saved / ".adapter.json.swp", saved / ".notes.txt.part", saved / "adapter.json.part"]
    for path in others:
        path.write_text("of the user")
    (saved / ".adapter.json.part").write_bytes(b"of a save that was killed, and longer than the new file " * 500)
    (saved / ".head.safetensors.earlier").write_bytes(b"of another one")
    bank = VIT.attach(model)
    bank.put_head("default", None)
    bank.save(saved)
    assert {path.name for path in saved.iterdir()} == {"adapter.json", "adapter.safetensors", *(p.name for p in others)}
    vispeft.load(VIT.model(), saved)


def test_reading_beside_saving_gives_one_of_the_adapters(saved: Path, model: nn.Module) -> None:
    """The description of one save met the tensors of the next one."""
    bank, stop, found = VIT.attach(model), threading.Event(), []
    first = {key: tensor.clone() for key, tensor in bank.state_dict().items()}

    def save() -> None:
        while not stop.is_set():
            bank.load_state_dict({key: tensor + 1 for key, tensor in bank.state_dict().items()})
            bank.save(saved)

    thread = threading.Thread(target=save)
    thread.start()
    try:
        for _ in range(60):
            _, units, head = read_adapter(saved)
            found.append({round(float((tensor - first[key]).mean())) for key, tensor in {**units, **head}.items()})
    finally:
        stop.set()
        thread.join(60)
    assert all(len(steps) == 1 for steps in found)
    assert len(set.union(*found)) > 1


def test_a_forked_process_saves(model: nn.Module, tmp_path: Path) -> None:
    """Two fresh threads met PyTorch's pool while it was made anew."""
    bank = VIT.attach(model)
    bank.save(tmp_path)
    wanted = bank.fingerprint()
    for _ in range(5):
        child = os.fork()
        if not child:
            ended = 1
            with suppress(BaseException):
                ended = int(bank.fingerprint() != wanted)
            os._exit(ended)
        assert os.waitpid(child, 0)[1] == 0


def test_several_adapters_and_notes_in_files(saved: Path, tmp_path: Path) -> None:
    model = VIT.model()
    bank = vispeft.load(model, saved)
    bank.annotate(class_names=["a", "b", "c", "d", "e"], metrics={"accuracy": 0.5})
    bank.save(tmp_path / "birds")
    vispeft.load(model, tmp_path / "birds")
    assert bank.names == ["default", "birds"]
    assert bank.notes("birds")["class_names"] == ["a", "b", "c", "d", "e"]
    bank.set_active("default")
    assert bank.notes()["metrics"] == {"accuracy": 0.5}


def test_notes_of_any_plain_kind_are_written_and_others_refused(model: nn.Module, tmp_path: Path) -> None:
    bank = VIT.attach(model)
    bank.annotate(metrics={"accuracy": torch.tensor(0.5), "per_class": dict.fromkeys(range(11), 0.1)})
    bank.save(tmp_path)
    assert vispeft.load(VIT.model(), tmp_path).notes()["metrics"]["per_class"]["10"] == 0.1
    with pytest.raises(ConfigError, match="metrics"):
        bank.annotate(metrics={"what": object()})


def test_no_classifier_is_remembered(tmp_path: Path) -> None:
    model = VIT.model(num_classes=0)
    VIT.attach(model).save(tmp_path)
    other = VIT.model(num_classes=7)
    vispeft.load(other, tmp_path)
    assert torch.equal(other(VIT.images()), model(VIT.images()))


def test_load_base_takes_a_plain_state_dict(model: nn.Module) -> None:
    plain = VIT.model(num_classes=5)
    for parameter in plain.parameters():
        parameter.data.mul_(1.1)
    bank = VIT.attach(model)
    bank.load_base(plain.state_dict())
    with bank.disabled():
        assert torch.equal(model(VIT.images()), plain(VIT.images()))
    with pytest.raises(FileError, match="missing"):
        bank.load_base({"cls_token": plain.cls_token})
    with pytest.raises(UnknownNameError, match="pos_embed"):
        bank.load_base({**plain.state_dict(), "pos_embd": plain.pos_embed})


def test_weights_that_do_not_fit_are_refused(model: nn.Module) -> None:
    bank = VIT.attach(model)
    state = bank.state_dict()
    key = "norm/ssf.scale"
    with pytest.raises(FileError, match="shape"):
        bank.load_state_dict({**state, key: torch.ones(3)})
    with pytest.raises(FileError, match="finite"):
        bank.load_state_dict({**state, key: state[key] * float("nan")})


def test_stored_bytes_are_those_of_units_and_classifier(model: nn.Module) -> None:
    report = VIT.attach(model).report()
    assert report.stored_bytes_head == 4 * report.trainable_head
    assert report.stored_bytes == 4 * report.trainable + report.stored_bytes_head


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_codes_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 7), generator=torch.Generator().manual_seed(0))
    packed = pack_bits(codes, bits)
    assert packed.numel() == -(-35 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits, (5, 7)), codes)
    with pytest.raises(FileError, match="bytes"):
        unpack_bits(packed[:-1], bits, (5, 7))
    with pytest.raises(ConfigError, match="fit"):
        pack_bits(codes + 2**bits, bits)


def test_packing_starts_with_the_lowest_bit() -> None:
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1]), 1).tolist() == [1, 1]
    assert pack_bits(torch.tensor([3, 1]), 2).tolist() == [7]


def test_a_bias_that_does_not_fit_its_weight_is_refused() -> None:
    bank = VIT.attach(VIT.model())
    tensors = bank.state_dict()
    tensors["head/weight"] = torch.zeros(7, tensors["head/weight"].shape[1])
    with pytest.raises(FileError, match=r"head/bias has shape \(5,\); \(7,\) is needed"):
        bank.load_state_dict(tensors)
