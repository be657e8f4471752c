"""Importing the package: cheap, complete, and in any order with timm. What depends on order runs in a fresh process."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest

import vispeft
from tests.fresh import ROOT, run

# A torchvision that works has its operators by the time it is imported. Where it does not work by itself, the same
# declarations from elsewhere make it one that does.
WORKING = """
import torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def test_vispeft_first() -> None:
    """Alone it imports nothing heavy; then timm imports, also where torchvision's library does not load.

    Everything a star import names is there, and so are the subpackages, whichever is used first.
    """
    lines = run("""
import vispeft
print([m for m in ("torch", "timm", "lightning", "numpy", "rich") if m in sys.modules])
import timm
timm.create_model("vit_tiny_patch16_224")
from vispeft import *
attach, load, create_model, LoRA, VispeftError, plan, register
print(vispeft.method("peft").name, "peft" in vispeft.list_methods())

import vispeft.tasks
vispeft.tasks.Classification, vispeft.interop.load_official, vispeft.viz.bars
from vispeft import data, heads, metrics
data.DigitsData, heads.decoder, metrics.BoundaryF
""")
    assert lines == ["[]", "peft False"]


@pytest.fixture(scope="module")
def timm_first(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run cases in processes that have imported timm, and vispeft not yet."""
    folder = tmp_path_factory.mktemp("adapter")
    vispeft.attach(vispeft.create_model("zoo:vit_tiny"), vispeft.SSF(), verify=False).save(folder)
    return run(
        WORKING
        + f"""
import timm
folder = {str(folder)!r}
"""
        + """
def reads_a_file():
    from vispeft.adapters.attach import load
    import vispeft, vispeft.core.method
    model = timm.create_model("vit_tiny_patch16_224")
    print(vispeft.core.method._METHODS, vispeft._compat._declared)
    try:
        load(model, folder)
    except vispeft.VispeftError as error:
        print(type(error).__name__)

def threads():
    import threading, vispeft
    errors = []
    def use(name):
        try:
            getattr(vispeft, name)
        except BaseException as error:
            errors.append(f"{name}: {error!r}")
    names = ["LoRA", "attach", "tasks", "SSF", "create_model", "load", "heads", "AdapterBank"] * 3
    threads = [threading.Thread(target=use, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(errors)

def taken_names():
    import dataclasses
    from vispeft.core.families import Family, family_of, register_family
    from torch import nn
    mine = Family(name="vit", classes=(nn.Identity,), describe=None, host=None, examples="mine")
    register_family(mine)
    print(family_of(nn.Identity()) is mine)

    from importlib.machinery import PathFinder
    from vispeft.core.method import Method, list_methods, register
    from vispeft.errors import ConfigError
    try:
        @register
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Mine(Method):
            name = "lora"
    except ConfigError as error:
        print(error)
    print("vqt" in list_methods())

    known = PathFinder.find_spec
    def find_spec(cls, name, *rest):
        return None if name in ("mmseg", "mmengine", "mmcv") else known(name, *rest)
    PathFinder.find_spec = classmethod(find_spec)
    import vispeft
    print("mmseg" in dir(vispeft), "tasks" in dir(vispeft))
    try:
        vispeft.mmseg
    except ConfigError as error:
        print(error)

case(reads_a_file)
case(threads)
case(taken_names)
"""
    )


def test_timm_before_vispeft(timm_first: list[str]) -> None:
    """Nothing is declared then. Reading a file finds its method and its model's family, which nobody imported yet."""
    assert timm_first[:2] == ["{} []", "BaseMismatchError"]  # the file's own method was found, and a view made


def test_threads_that_use_names_first_at_once(timm_first: list[str]) -> None:
    """Python breaks a deadlock of two imports that need each other by handing out a half-made module."""
    assert timm_first[2] == "[]"


def test_names_of_the_packages_own_methods_are_taken(timm_first: list[str]) -> None:
    """Whoever registers first; a family may be replaced. Without mmsegmentation the plug-in says what it lacks."""
    lines = timm_first[3:]
    assert lines[0] == "True"
    assert lines[1].startswith("Two methods want the name 'lora'")
    assert lines[2:4] == ["True", "False True"]
    assert 'pip install "vispeft[mmseg]"' in lines[4]


def test_everything_public_is_listed_and_there() -> None:
    listed = set(dir(vispeft))
    assert {"attach", "load", "create_model", "plan", "list_methods", "LoRA", "VispeftError"} <= listed
    assert {"interop", "tasks", "data", "heads", "metrics", "viz", "methods", "cli"} <= listed
    assert set(vispeft.__all__) <= listed
    assert "__version__" in listed
    assert vispeft.__version__ == version("vispeft")
    assert len(vispeft.__all__) == len(set(vispeft.__all__))
    assert [name for name in listed if not hasattr(vispeft, name)] == []
    assert set(vispeft.methods.CONFIGURATIONS) <= set(vispeft.__all__)


@pytest.mark.parametrize("path", ["vispeft/__init__.py", "vispeft/methods/__init__.py"])
def test_names_shown_to_type_checkers_exist(path: str) -> None:
    """They need not be complete: a method that is not among them is `Any` to a type checker."""
    shown = re.findall(r"^    from (vispeft[\w.]*) import (\w+) as (\w+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert shown
    for module, name, public in shown:
        scope: dict[str, object] = {}
        exec(f"from {module} import {name}", scope)
        assert name == public
        assert scope[name] is getattr(vispeft, public)


def test_an_unknown_name_is_an_attribute_error_with_near_names() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'attach'"):
        vispeft.atach  # noqa: B018
    with pytest.raises(AttributeError, match="'LoRA'"):
        vispeft.Lora  # noqa: B018
    with pytest.raises(ImportError):
        from vispeft import nothing_of_the_kind  # noqa: F401
    assert not hasattr(vispeft, "__wrapped__")


def test_parts_of_interop_are_found_when_they_are_named() -> None:
    listed = dir(vispeft.interop)
    assert {"export", "PeftMethod", "from_peft", "load_official"} <= set(listed)
    assert "importlib" not in listed
    assert vispeft.interop.export.export_program.__module__ == "vispeft.interop.export"
