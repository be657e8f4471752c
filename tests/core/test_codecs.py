"""Codecs: each returns what it was given and refuses what it cannot hold, and one can come from outside the package."""

from __future__ import annotations

import contextlib
import json
import math
import tracemalloc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.core.method import Method, PlanItem
from vispeft.core.sites import View
from vispeft.core.units import WeightUnit
from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.storage.codecs import Codec, find_codec, register_codec
from vispeft.storage.files import read_adapter
from vispeft.storage.quantize import quantize

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**31)
each = settings(max_examples=60, deadline=None)


def there_and_back(name: str, values: Tensor) -> Tensor:
    codec = find_codec(name)
    stored = codec.encode(values)
    assert stored.nbytes == codec.size(values)
    if name != "raw":
        assert (stored.dtype, stored.ndim) == (torch.uint8, 1)
    back = codec.decode(stored, tuple(values.shape), values.dtype)
    assert (back.shape, back.dtype) == (values.shape, values.dtype)
    return back


def drawn(shape: tuple[int, ...], share: float, seed: int) -> Tensor:
    """Entries of which a share is not zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < share, values, torch.zeros(()))


@each
@given(shape=SHAPES, share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=SEEDS, dtype=FLOATS)
def test_masks(shape: tuple[int, ...], share: float, seed: int, dtype: torch.dtype) -> None:
    mask = drawn(shape, share, seed) != 0
    assert torch.equal(there_and_back("mask", mask), mask)
    assert torch.equal(there_and_back("mask", mask.to(dtype)), mask.to(dtype))


def test_masks_are_packed_as_published_ones_are() -> None:
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=torch.bool)
    assert find_codec("mask").encode(mask).tolist() == [0b10000011, 0b10100000]
    assert torch.equal(find_codec("mask").encode(mask), torch.from_numpy(numpy.packbits(mask.numpy())))


@each
@given(shape=SHAPES, share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), seed=SEEDS, dtype=FLOATS)
def test_sparse_tensors(shape: tuple[int, ...], share: float, seed: int, dtype: torch.dtype) -> None:
    values = drawn(shape, share, seed).to(dtype)
    back = there_and_back("sparse", values)
    assert torch.equal(back.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8))


def test_a_sparse_tensor_keeps_signs_of_zero_and_strides_do_not_matter() -> None:
    values = torch.tensor([[0.0, -0.0, 3.0], [0.0, 0.0, -1.0]]).t()
    back = there_and_back("sparse", values)
    assert torch.equal(back, values)
    assert torch.equal(back.signbit(), values.signbit())


@each
@given(
    numbers=st.sets(st.one_of(st.integers(0, 300), st.integers(0, 70_000), st.integers(0, 2**40)), max_size=40),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_positions(numbers: set[int], dtype: torch.dtype) -> None:
    values = torch.tensor(sorted(n for n in numbers if n < torch.iinfo(dtype).max), dtype=dtype)
    assert torch.equal(there_and_back("positions", values), values)


@each
@given(shape=SHAPES, share=st.sampled_from([0.0, 0.3, 1.0]), seed=SEEDS, dtype=FLOATS, scale=st.integers(-40, 40))
def test_floats(shape: tuple[int, ...], share: float, seed: int, dtype: torch.dtype, scale: int) -> None:
    values = (drawn(shape, share, seed) * 2.0**scale).to(dtype)
    back = there_and_back("floats", values)
    assert torch.equal(back.view(-1).view(torch.uint8), values.view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_of_every_kind_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, 1.0, -2.5, limits.max, -limits.max, limits.tiny, math.inf, -math.inf], dtype=dtype
    )
    values = torch.cat([values, torch.full((20_000,), -1.5, dtype=dtype), values / 3])
    back = there_and_back("floats", values)
    assert torch.equal(back.view(torch.uint8), values.view(torch.uint8))
    stored = find_codec("floats").encode(values)
    for broken in (stored[:1], stored[:-1], stored[:5000], torch.cat([stored, stored.new_zeros(1)])):
        with pytest.raises(FileError):
            find_codec("floats").decode(broken, tuple(values.shape), dtype)


def test_normal_values_take_less_than_three_and_a_half_bytes() -> None:
    values = torch.randn(6000, generator=torch.Generator().manual_seed(1)) * 1e-3
    assert find_codec("floats").size(values) < 3.4 * len(values)


@pytest.mark.parametrize("name", ["positions", "sparse", "rice", "floats"])
@pytest.mark.parametrize("byte", [0, 1, 254, 255])
def test_no_decoder_allocates_far_more_than_the_file_and_its_content(name: str, byte: int) -> None:
    stored = torch.full((1_000_000,), byte, dtype=torch.uint8)
    stored[0] = 1
    if name == "sparse":
        stored[:9] = torch.tensor([*(1_000).to_bytes(8, "little"), 0])
    tracemalloc.start()
    with contextlib.suppress(FileError):
        find_codec(name).decode(stored, (1_000,), torch.int64 if name in ("positions", "rice") else torch.float32)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5 * len(stored)


def test_decoding_takes_memory_in_proportion_to_what_is_decoded() -> None:
    positions = torch.arange(0, 90_000_000, 300)
    values = torch.randn(300_000)
    for name, content in (("positions", positions), ("rice", positions), ("floats", values)):
        stored = find_codec(name).encode(content)
        tracemalloc.start()
        back = find_codec(name).decode(stored, (300_000,), content.dtype)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert torch.equal(back, content)
        assert most < 3 * content.nbytes + 2 * stored.nbytes + 4_000_000, name  # what a block takes


@pytest.mark.parametrize(("name", "gap"), [("positions", 2**32), ("rice", 2**34)])
def test_positions_beyond_their_dtype_are_refused(name: str, gap: int) -> None:
    """They would come back as others: 2^32 + 1 as 1."""
    stored = find_codec(name).encode(torch.tensor([gap + 1]))
    with pytest.raises(FileError, match="cannot hold"):
        find_codec(name).decode(stored, (1,), torch.int32)


@pytest.mark.parametrize("gap", [0, 253, 254, 255, 256, 509, 510, 65_533, 65_534, 65_535, 65_536, 2**32 - 2, 2**32])
def test_gaps_at_the_ends_of_their_units(gap: int) -> None:
    values = torch.tensor([3, 4 + gap, 5 + gap, 6 + 2 * gap])
    assert torch.equal(there_and_back("positions", values), values)


def test_bytes_per_position_are_as_documented() -> None:
    chosen = torch.randperm(768 * 768, generator=torch.Generator().manual_seed(0))[: 768 * 768 // 100].sort().values
    assert find_codec("positions").size(chosen) / len(chosen) < 1.12
    dense = torch.zeros(768 * 768).index_fill_(0, chosen, 1.5).view(768, 768)
    assert find_codec("sparse").size(dense) == 8 + 4 * len(chosen) + find_codec("positions").size(chosen)


@each
@given(shape=SHAPES.filter(lambda shape: math.prod(shape) > 1), bits=st.sampled_from([1, 2, 4, 8]), seed=SEEDS)
def test_few_bits(shape: tuple[int, ...], bits: int, seed: int) -> None:
    values = drawn(shape, 1.0, seed)
    found = quantize(values, bits)
    name = f"l1-normal-500/{bits}"
    assert torch.equal(there_and_back(name, values), found.values(bits))
    assert torch.equal(find_codec(name).encode(values), found.packed(bits))


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("floats", torch.tensor([1, 2]), r"torch.int64 were given"),
        ("mask", torch.tensor([0.0, 0.5]), "Threshold them first"),
        ("mask", torch.tensor([math.nan]), "Threshold them first"),
        ("positions", torch.tensor([2, 1]), "Sort them first"),
        ("positions", torch.tensor([1, 1]), "each at most once"),
        ("positions", torch.tensor([-1, 1]), "from 0"),
        ("positions", torch.tensor([0.0, 1.0]), "whole numbers"),
    ],
)
def test_values_that_do_not_fit_are_refused(name: str, values: Tensor, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_codec(name).encode(values)


@pytest.mark.parametrize(
    ("name", "stored", "shape"),
    [
        ("mask", [1, 2], (3,)),
        ("positions", [], (1,)),
        ("positions", [3, 1], (1,)),
        ("positions", [2, 1, 1, 1], (1,)),
        ("positions", [1, 255], (0,)),
        ("positions", [1, 0, 0], (3,)),
        ("floats", [], (1,)),
        ("floats", [1, 0, 127, 0, 0, 0, 0], (1,)),
        ("floats", [1, 0, 127, 0, 0, 0, 0, 128], (1,)),  # the place of the exponent is 1 in a list of one
        ("floats", [0, 0, 0, 0, 0, 0, 0], (1,)),
        ("floats", [255, 255, 0, 0, 0, 0, 0], (1,)),
        ("sparse", [0, 0], (3,)),
        ("sparse", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], (3,)),
        ("sparse", [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 3], (3,)),
        ("sparse", [255] * 20, (3,)),
        ("l1-normal-500/1", [0] * 8, (3,)),
    ],
)
def test_bytes_that_do_not_fit_are_refused(name: str, stored: list[int], shape: tuple[int, ...]) -> None:
    with pytest.raises(FileError):
        find_codec(name).decode(torch.tensor(stored, dtype=torch.uint8), shape, torch.float32)


def test_names_of_codecs() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'sparse'"):
        find_codec("sparze")
    with pytest.raises(ConfigError, match="Two codecs want the name 'mask'"):
        register_codec(type("Other", (Codec,), {"name": "mask"})())
    register_codec(type(find_codec("mask"))())  # the same class again, as when a module is reloaded


# ------------------------------------------------------------------ a kind of storage from outside the package


class Powers(Codec):
    """Signed powers of two: the exponent, from -63 to 63, and the sign in one byte; 0 stands for zero."""

    name = "test-powers"

    def encode(self, values: Tensor) -> Tensor:
        exponents = values.detach().abs().log2().round().clamp(-63, 63)
        codes = torch.where(values == 0, 0, (exponents + 64) + 128 * (values < 0))
        return codes.to(torch.uint8).cpu().reshape(-1)

    def decode(self, stored: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = 2.0 ** ((stored % 128).to(dtype) - 64)
        return torch.where(stored == 0, 0, torch.where(stored > 127, -size, size)).to(dtype).reshape(shape)


class PowerDelta(WeightUnit):
    """A weight's change, all of whose entries act as signed powers of two; gradients go straight through."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.empty(shape))

    def reset(self, generator: Generator) -> None:
        self.delta.zero_()

    def codecs(self) -> Mapping[str, str]:
        return {"delta": Powers.name}

    def fold_weight(self, weight: Tensor) -> Tensor:
        codec = Powers()
        rounded = codec.decode(codec.encode(self.delta), tuple(self.delta.shape), self.delta.dtype)
        return weight + (self.delta + (rounded - self.delta).detach()).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class PowerTuning(Method):
    """Powers of two beside the weights of the second MLP layers."""

    name: ClassVar[str] = "test_power_tuning"
    default_roles: ClassVar[tuple[str, ...]] = ("mlp.fc2",)

    def items(self, view: View, model: nn.Module) -> Iterator[PlanItem]:
        for site in self.sites(view):
            yield PlanItem(site, "power", lambda s=site: PowerDelta((s.out_features, s.in_features)))

    def parameter_count(self, view: View) -> int:
        return sum(site.out_features * site.in_features for site in self.sites(view))


@pytest.fixture
def powers(monkeypatch: pytest.MonkeyPatch) -> Codec:
    monkeypatch.setattr("vispeft.storage.codecs._CODECS", dict(vispeft.storage.codecs._CODECS))
    monkeypatch.setattr("vispeft.core.method._METHODS", dict(vispeft.core.method._METHODS))
    register_codec(Powers())
    vispeft.register(PowerTuning)
    return Powers()


@pytest.mark.parametrize("backbone", ["vit", "swin"])
@torch.no_grad()
def test_a_kind_of_storage_from_outside(backbone: str, powers: Codec, tmp_path: Path) -> None:
    cell = Cell("lora", backbone)
    model, images = cell.model(), cell.images()
    bank = vispeft.attach(model, PowerTuning())
    move(bank, "default")
    wanted = model(images)
    bank.save(tmp_path)
    entries = json.loads((tmp_path / "adapter.json").read_text())["tensors"]
    assert {(entry["codec"], entry["dtype"]) for entry in entries.values()} == {("test-powers", "float32")}
    assert bank.report().stored_bytes == bank.report().trainable + bank.report().trainable_head * 4
    assert sum(t.nbytes for t in load_file(tmp_path / "adapter.safetensors").values()) == bank.report().trainable
    again = cell.model()
    loaded = vispeft.load(again, tmp_path)
    assert torch.equal(again(images), wanted)
    loaded.save(tmp_path / "twice")
    assert (tmp_path / "twice/adapter.safetensors").read_bytes() == (tmp_path / "adapter.safetensors").read_bytes()
    assert {str(t.dtype) for t in read_adapter(tmp_path)[1].values()} == {"torch.float32"}


def test_an_unknown_codec_in_a_file_is_named(powers: Codec, tmp_path: Path) -> None:
    vispeft.attach(Cell("lora", "vit").model(), PowerTuning()).save(tmp_path)
    del vispeft.storage.codecs._CODECS[Powers.name]
    with pytest.raises(FileError, match=r"coded as test-powers.*upgrade vispeft, or import the package"):
        read_adapter(tmp_path)
    with pytest.raises(UnknownNameError, match="codec 'test-powers'"):
        vispeft.attach(Cell("lora", "vit").model(), PowerTuning())


def test_a_tensor_of_few_bits_is_decoded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vispeft.attach(Cell("lora", "vit").model(), vispeft.LoRA(bits=2, head_bits=1)).save(tmp_path)
    calls, decode = [], vispeft.storage.quantize.decode
    monkeypatch.setattr("vispeft.storage.quantize.decode", lambda *args: calls.append(1) or decode(*args))
    bank = vispeft.load(Cell("lora", "vit").model(), tmp_path)
    assert len(calls) == len(bank.named_tensors())
