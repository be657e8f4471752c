"""Shared fields of methods: one check of choices, one of each kind of number."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import pytest

import vispeft
from vispeft.core.fields import DropPath, FewBits
from vispeft.core.method import Method, registered_methods
from vispeft.errors import ConfigError, SiteError

if TYPE_CHECKING:
    from fractions import Fraction


@dataclass(frozen=True, kw_only=True)
class Toy(FewBits, DropPath, Method):
    """A method from outside the package."""

    name: ClassVar[str] = "toy_fields"
    mode: Literal["mean", "median"] | None = None
    width: Literal["auto"] | int = "auto"
    exact: Fraction | None = None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mode": "meen"}, r"Toy\(mode='meen'\): choose 'mean' or 'median'\. Did you mean 'mean'\?"),
        ({"mode": 3}, r"Toy\(mode=3\): choose 'mean' or 'median'\.$"),
        ({"width": "8"}, r"Toy\(width='8'\): choose 'auto'\."),
        ({"bits": 3}, r"Toy\(bits=3\): choose 1, 2, 4, 8, or 32\."),
        ({"head_bits": True}, r"Toy\(head_bits=True\): choose"),
        ({"drop_path": 1.0}, r"Toy\(drop_path=1\.0\): a rate"),
    ],
)
def test_choices_are_checked_by_their_annotation(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Toy(**fields)


def test_values_among_the_choices_are_taken() -> None:
    toy = Toy(mode=None, width=3, bits=1, head_bits=2, drop_path=0.5)
    assert (toy.low_bit_head(), toy.stochastic_depth()) == (2, 0.5)
    assert Toy(mode="median").mode == "median"


def test_every_choice_of_every_method_is_refused_when_it_is_none() -> None:
    refused = 0
    for name in vispeft.list_methods():
        for field in dataclasses.fields(type(vispeft.method(name))):
            if "Literal" in str(field.type) or "Bits" in str(field.type):
                with pytest.raises(ConfigError, match=rf"\({field.name}='none of them'\): choose"):
                    vispeft.method(name, **{field.name: "none of them"})
                refused += 1
    assert refused > 25


@pytest.mark.parametrize("field", ["bottleneck", "phm_dim", "rank", "reduction"])
@pytest.mark.parametrize("value", [0, 1.5, True, "2"])
def test_whole_numbers(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"Compacter\({field}=.*whole number of at least 1"):
        vispeft.Compacter(**{field: value})


def test_roles_out_of_reach_are_refused_with_those_in_reach() -> None:
    with pytest.raises(SiteError, match=r"AdaptFormer acts at mlp; 'attn' was asked for\. See Adapter for others\."):
        vispeft.AdaptFormer(roles=("attn",))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: vispeft.LoRA(r=4), r"field of LoRA 'r'.*for peft's r is rank\."),
        (lambda: vispeft.LoRA(lora_alpha=8), "for peft's lora_alpha is alpha"),
        (lambda: vispeft.LoRA(target_modules=["qkv"]), "for peft's target_modules is roles, names of places"),
        (lambda: vispeft.VPT(num_virtual_tokens=4), "is num_tokens"),
        (lambda: vispeft.Prefix(num_virtual_tokens=4), "is length"),
        (lambda: vispeft.SSF(r=4), r"field of SSF 'r'\. Known: [^.]*\.$"),
        (lambda: vispeft.method("lora", r=4), "is rank"),
        (lambda: vispeft.LoRA(modules_to_save=["head"]), "classifier is trained and saved with every adapter"),
        (lambda: vispeft.LoRA(rnak=4), "Did you mean 'rank'"),
        (lambda: vispeft.LoRA(4), r"LoRA\(4\): a field is given by its name.*rank"),
    ],
)
def test_fields_of_peft_and_values_without_a_name(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_every_method_refuses_unknown_fields_in_our_words() -> None:
    for cls in registered_methods():
        if cls.__module__.startswith("vispeft."):
            with pytest.raises(ConfigError, match="Unknown field"):
                cls(no_such_field=1)
    assert inspect.signature(vispeft.LoRA).parameters["rank"].default == 8
