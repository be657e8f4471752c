"""The torchvision compatibility module, with the torchvision that is installed and with stand-ins for others."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.fresh import ROOT, run

MODULE = ROOT / "vispeft" / "_compat.py"

# The module is loaded by its path, so that nothing else of the package has a part in what happens.
COMPAT = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("compat", {str(MODULE)!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
def declared():
    import torch
    return [n for n in ("nms", "qnms") if hasattr(torch.ops.torchvision, n)]
"""

# As torchvision does: the compiled library declares the operators, and the import stops where they are missing.
STAND_IN = """
import torch
from . import extension
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        raise RuntimeError(f"operator torchvision::{name} does not exist")
"""
EXTENSION = """
import torch
from pathlib import Path
try:
    torch.ops.load_library(next(iter(Path(__file__).parent.glob("_C*")), "absent.so"))
except OSError:
    loads = False
else:
    loads = True
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def working_library() -> Path:
    """Any extension module of this Python: a compiled library that loads."""
    spec = importlib.util.find_spec("_heapq") or importlib.util.find_spec("_bisect")
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        pytest.skip("this Python has no extension module in a file of its own to stand for a library that loads")
    return Path(spec.origin)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make folders with packages called torchvision, with a compiled library of some name or none."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    libraries = {"absent": None, "broken": "_C" + suffix, "older": "_C" + suffix, "newer": "_C_stable.so"}
    folders = {}
    for name, library in libraries.items():
        package = tmp_path_factory.mktemp(name) / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text(STAND_IN)
        (package / "extension.py").write_text(EXTENSION)
        if name == "broken":
            (package / str(library)).write_bytes(b"not a library")
        elif library is not None:
            shutil.copy(working_library(), package / library)
        folders[name] = str(package.parent)
    return folders


@pytest.fixture(scope="module")
def cases(stand_ins: dict[str, str]) -> dict[str, str]:
    """Run all cases with stand-ins, which share the import of torch, and collect the line that each prints."""
    lines = run(
        COMPAT
        + f"""
import torch
folders = {stand_ins!r}

def found():
    compat.install_hook()
    import torchvision
    print(torchvision.extension.loads, declared(), compat.declare_operators(), len(compat._declared))

def known():  # another package has declared one of the operators
    other = torch.library.Library("torchvision", "DEF")
    other.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    compat.install_hook()
    import torchvision
    print(declared(), len(compat._declared))

def imported():
    import torchvision
    compat.install_hook()
    import torchvision
    print(len(compat._declared))

def missing():
    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    sys.meta_path.insert(0, Hidden())
    compat.install_hook()
    try:
        import torchvision
    except ModuleNotFoundError as error:
        print(error.name, declared())

def unrelated():  # an error that declared operators do not mend
    compat.install_hook()
    torch.library.Library.kept = [torch.library.Library("torchvision", "DEF")]
    for name in ("nms", "qnms"):
        torch.library.Library.kept[0].define(name + "(Tensor dets) -> Tensor")
    torch.ops.load_library = lambda path: (_ for _ in ()).throw(RuntimeError("other"))
    try:
        import torchvision
    except RuntimeError as error:
        print(error, len(compat._declared))

def failed_before():  # someone tried the installed torchvision first and caught the error
    try:
        import torchvision
    except RuntimeError:
        pass
    compat.install_hook()
    import torchvision, timm
    print(declared())

for name in folders:
    print(name, end=": ")
    case(found, folders[name])
own = {{known: "absent", imported: "newer", unrelated: "newer", missing: None, failed_before: None}}
for body, name in own.items():
    print(body.__name__, end=": ")
    case(body, *[folders[name]] if name else [])
"""
    )
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("name", ["older", "newer"])
def test_a_library_that_loads_is_left_alone(cases: dict[str, str], name: str) -> None:
    """Whatever its file is called: where torchvision's own library declares the operators, nothing else does."""
    assert cases[name] == "True ['nms', 'qnms'] False 0"


@pytest.mark.parametrize("name", ["absent", "broken"])
def test_declares_where_the_library_does_not_load(cases: dict[str, str], name: str) -> None:
    """Without a library that loads both operators are declared, and only once."""
    assert cases[name] == "False ['nms', 'qnms'] False 1"


def test_what_is_there_already_is_not_touched(cases: dict[str, str]) -> None:
    assert cases["known"] == "['nms', 'qnms'] 1"
    assert cases["imported"] == "0"


def test_other_errors_are_reported_as_ever(cases: dict[str, str]) -> None:
    assert cases["missing"] == "torchvision []"
    assert cases["unrelated"] == "other 0"


def test_import_of_torchvision_that_failed_before_is_repaired(cases: dict[str, str]) -> None:
    assert cases["failed_before"] == "['nms', 'qnms']"


def test_the_hook_with_the_torchvision_that_is_installed() -> None:
    """Not even asking where torchvision is counts as its import; then it imports, and looks as without the hook."""
    lines = run(
        COMPAT
        + """
compat.install_hook(); compat.install_hook()
importlib.util.find_spec("torchvision")
print("torch" in sys.modules, "torchvision" in sys.modules)
print(sum(type(finder).__module__ == "compat" for finder in sys.meta_path), declared())

import torchvision
import gc; gc.collect()
import inspect, pkgutil, torch
print(type(torchvision.__loader__).__name__, type(torchvision.__spec__.loader).__name__)
print(len(inspect.getsource(torchvision)) > 0, len(pkgutil.get_data("torchvision", "__init__.py")) > 0)

from torchvision.transforms import v2
import timm
print(v2.Resize(8)(torch.zeros(3, 16, 16)).shape[-1], declared(), len(timm.list_models("vit_tiny*")) > 0)

made = bool(compat._declared)  # an operator that was only declared says so when it is called; a real one works
boxes, scores = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1.])
try:
    print("works" if torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0] and not made else "wrong")
except RuntimeError as error:
    print("explained" if made and "custom C++ ops" in str(error) else error)
"""
    )
    assert lines[:5] == [
        "False False",
        "1 []",
        "SourceFileLoader SourceFileLoader",
        "True True",
        "8 ['nms', 'qnms'] True",
    ]
    assert lines[5] in ("works", "explained")
