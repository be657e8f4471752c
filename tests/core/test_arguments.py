"""Arguments of the wrong kind are refused by their name, wherever a script gives them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import vispeft
from tests.tiny import TINY
from vispeft.core.arguments import ChecksArguments, check_arguments
from vispeft.data import DigitsData, ImageFolderData, ImageListData, MaskFolderData, MetricFolderData, WebDatasetData
from vispeft.errors import ConfigError
from vispeft.heads.embedding import EmbeddingHead
from vispeft.tasks import Classification, MetricLearning

NAME = "vit_tiny_patch16_224"


class Base(ChecksArguments):
    def __init__(self, *, count: int = 1, share: float | None = None, place: str | Path = "", **_: Any) -> None: ...


class Below(Base):
    def __init__(
        self,
        *,
        names: Sequence[str] | None = None,
        sizes: int | tuple[int, int] = 1,
        table: dict[str, Any] | None = None,
        on: bool = True,
        kind: Literal["a", "b"] = "a",
        other: torch.Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)


GOOD: dict[str, list[Any]] = {
    "count": [0, -3, np.int64(4)],
    "share": [1, 0.5, np.float32(2), None, float("nan")],
    "place": ["", Path("a")],
    "names": [None, [], ["a"], ("a", Path("b")), np.array(["a"])],
    "sizes": [3, (1, 2), [1], torch.tensor([1, 2])],
    "table": [None, {}],
    "on": [True, 0, np.bool_(1)],
    "kind": ["a", "c"],
    "other": ["anything"],
    "unknown": [object()],
}
BAD = {
    ("count", 8.0): r"Below\(count=8\.0\): a whole number is needed\.",
    ("count", "8"): r"Below\(count='8'\): a whole number is needed\.",
    ("count", True): r"Below\(count=True\): a whole number is needed\.",
    ("count", None): r"Below\(count=None\): a whole number is needed\.",
    ("share", "0.5"): r"a number or None is needed\.",
    ("share", True): r"a number or None is needed\.",
    ("place", 5): r"a text or a path is needed\.",
    ("place", None): r"a text or a path is needed\.",
    ("names", "abcde"): r"Below\(names='abcde'\): a list of texts or None is needed\.",
    ("names", (1, 2)): r"a list of texts or None is needed\.",
    ("names", 5): r"a list of texts or None is needed\.",
    ("sizes", "12"): r"a whole number or a list of whole numbers is needed\.",
    ("sizes", (1, 2.5)): r"a whole number or a list of whole numbers is needed\.",
    ("table", "a" * 200): r"Below\(table='a{59}\.\.\.\): a dictionary or None is needed\.",
    ("kind", 5): r"Below\(kind=5\): 'a' or 'b' is needed\.",
    ("on", "yes"): r"true or false is needed\.",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, some in GOOD.items() for value in some])
def test_values_of_the_annotated_kind_pass(name, value):
    Below(**{name: value})


@pytest.mark.parametrize(("given", "told"), BAD.items(), ids=lambda value: str(value)[:30])
def test_others_are_refused_with_what_is_needed(given, told):
    with pytest.raises(ConfigError, match=f"^{told if told.startswith('Below') else 'Below.*' + told}$"):
        Below(**dict([given]))


def test_the_arguments_of_a_function():
    def call(size: int, place: "Missing") -> None: ...  # noqa: F821 - as where it is imported for types only

    check_arguments(call, {"size": 3, "place": 5, "unknown": None})
    with pytest.raises(ConfigError, match=r"^call\(size='3'\): a whole number is needed\.$"):
        check_arguments(call, {"size": "3"})


def model():
    return vispeft.create_model(NAME, num_classes=3, **TINY)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: vispeft.create_model(5), r"create_model\(name=5\): a text is needed"),
        (lambda: vispeft.create_model(NAME, weights=5), r"weights=5\): a text or a path or None is needed"),
        (lambda: vispeft.create_model(NAME, num_classes=2.5, **TINY), r"num_classes=2\.5\): a whole number or None"),
        (lambda: vispeft.create_model(NAME, num_classes=-1, **TINY), r"num_classes=-1\): at least 1"),
        (
            lambda: vispeft.create_model(NAME, **{**TINY, "img_size": -1}),
            r"timm cannot make .* with .*img_size=-1",
        ),
        (lambda: vispeft.create_model(NAME, **{**TINY, "num_heads": 5}), r"timm cannot make .* with .*num_heads=5"),
        (lambda: vispeft.method(None), r"method\(name=None\): a text is needed"),
        (lambda: vispeft.plan(model(), "lora"), "plan was given 'lora' as method"),
        (lambda: vispeft.load(None, "adapter"), "None was given as model"),
        (lambda: vispeft.load(model(), None), r"load\(path=None\): a text or a path is needed"),
        (lambda: vispeft.attach(model(), vispeft.SSF(), name=5), r"attach\(name=5\): a text is needed"),
        (lambda: vispeft.attach(model(), vispeft.SSF()).save(None), r"save\(path=None\): a text or a path is needed"),
        (lambda: vispeft.attach(model(), vispeft.SSF()).annotate(class_names="abc"), r"class_names='abc'\): a list of"),
        (lambda: EmbeddingHead(8, 2.5), r"EmbeddingHead\(dim=2\.5\): a whole number is needed"),
        (lambda: EmbeddingHead(8, 0), r"EmbeddingHead\(dim=0\): at least 1"),
        (lambda: DigitsData(batch_size=8.5), r"DigitsData\(batch_size=8\.5\): a whole number is needed"),
        (lambda: DigitsData(batch_size="8"), r"DigitsData\(batch_size='8'\): a whole number is needed"),
        (lambda: DigitsData(image_size="32"), r"image_size='32'\): a whole number or a list of whole numbers or None"),
        (lambda: ImageFolderData(root=5), r"ImageFolderData\(root=5\): a text is needed"),
        (lambda: MetricFolderData(root="a", images_per_class=2.5), r"images_per_class=2\.5\): a whole number"),
        (lambda: MaskFolderData(root="a", class_names="abcde"), r"class_names='abcde'\): a list of texts"),
        (lambda: ImageListData(train_list="a.txt", names="abc"), r"names='abc'\): a list of texts or None"),
        (lambda: WebDatasetData(train_shards=5), r"WebDatasetData\(train_shards=5\): a text is needed"),
    ],
    ids=range(23),
)
def test_calls_of_a_script(call, told):
    with pytest.raises(ConfigError, match=told):
        call()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_classes": -1}, r"MetricLearning\(num_classes=-1\): at least 2 is needed"),
        ({"num_classes": 2.5}, r"num_classes=2\.5\): a whole number is needed"),
        ({"dim": 8.5}, r"dim=8\.5\): a whole number or None is needed"),
        ({"dim": "8"}, r"dim='8'\): a whole number or None is needed"),
        ({"dim": -1}, r"dim=-1\): at least 1"),
        ({"lr": "1e-3"}, r"lr='1e-3'\): a number is needed"),
        ({"memory": True}, r"memory=True\): a whole number"),
        ({"ks": 5}, r"ks=5\): a list of whole numbers is needed"),
        ({"ks": (0,)}, r"ks=\(0,\): whole numbers from 1 on"),
        ({"lone": "x"}, "choose 'count_as_miss' or 'drop'"),
        ({"head_norm": "batch"}, "choose 'none', 'affine', 'plain'"),
        ({"backbone_args": "a"}, r"backbone_args='a'\): a dictionary or None is needed"),
        ({"class_weights": 5}, r"class_weights=5\): a list of numbers or 'balanced' or None is needed"),
        ({"base_dtype": "float16"}, r"base_dtype=float16\): float32 or bfloat16 is needed"),
    ],
    ids=range(14),
)
def test_settings_of_a_task_are_refused_before_its_backbone_is_made(settings, told, monkeypatch):
    def make(*_, **__):
        raise AssertionError("the backbone was made")

    monkeypatch.setattr("vispeft.tasks.base.create_model", make)
    task, own = (Classification, {}) if "class_weights" in settings else (MetricLearning, {"dim": 8})
    with pytest.raises(ConfigError, match=told):
        task(**{"backbone": NAME, "method": vispeft.LoRA(), "num_classes": 3, **own, **settings})
