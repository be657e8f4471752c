"""The torchvision compatibility module, each case in a fresh interpreter."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "vispeft" / "_compat.py"

# The module is loaded by its path, so that nothing else of the package has a part in what happens.
PRELUDE = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("compat", {str(MODULE)!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
def declared():
    import torch
    return [n for n in ("nms", "qnms") if hasattr(torch.ops.torchvision, n)]
"""


def run(code: str, *path: Path) -> str:
    """Run code after the prelude in a fresh interpreter, with folders put first on its path."""
    paths = "".join(f"import sys; sys.path.insert(0, {str(p)!r})\n" for p in path)
    done = subprocess.run([sys.executable, "-c", paths + PRELUDE + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake_torchvision(folder: Path, library: Path | bytes | None) -> Path:
    """Make a package named torchvision whose compiled library is a given file."""
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torch\nnms_at_import = hasattr(torch.ops.torchvision, 'nms')\n")
    target = package / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    if isinstance(library, Path):
        shutil.copy(library, target)
    elif library is not None:
        target.write_bytes(library)
    return folder


def working_library() -> Path:
    """Any extension module of this Python: a compiled library that loads."""
    spec = importlib.util.find_spec("_heapq") or importlib.util.find_spec("_bisect")
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        pytest.skip("this Python has no extension module in a file of its own to stand for a library that loads")
    return Path(spec.origin)


def test_the_hook_alone_imports_and_declares_nothing() -> None:
    """Not even asking where torchvision is counts as its import."""
    out = run("""
compat.install_hook(); compat.install_hook()
importlib.util.find_spec("torchvision")
print("torch" in sys.modules, "torchvision" in sys.modules, len(sys.meta_path), declared())
print(sum(type(finder).__module__ == "compat" for finder in sys.meta_path))
""")
    assert out.startswith("False False ")
    assert out.endswith("[]\n1\n")


def test_torchvision_and_timm_import_afterwards() -> None:
    """Whatever build of torchvision is installed: it imports, transforms images, and carries timm."""
    out = run("""
compat.install_hook()
import torchvision
import gc; gc.collect()
import torch
from torchvision.transforms import v2
import timm
print(v2.Resize(8)(torch.zeros(3, 16, 16)).shape[-1], declared(), len(timm.list_models("vit_tiny*")) > 0)
""")
    assert out.split()[0] == "8"
    assert "['nms', 'qnms']" in out
    assert "True" in out


def test_the_module_looks_as_without_the_hook() -> None:
    """Whoever asks torchvision for its loader or its source gets the ordinary answers."""
    out = run("""
compat.install_hook()
import torchvision, inspect, pkgutil
print(type(torchvision.__loader__).__name__, type(torchvision.__spec__.loader).__name__)
print(len(inspect.getsource(torchvision)) > 0, len(pkgutil.get_data("torchvision", "__init__.py")) > 0)
""")
    assert out == "SourceFileLoader SourceFileLoader\nTrue True\n"


def test_missing_operator_explains_itself() -> None:
    """An operator that was only declared says so when it is called; a real one works."""
    out = run("""
compat.install_hook()
import torch, torchvision
made = bool(compat._declared)
boxes, scores = torch.tensor([[0., 0., 1., 1.]]), torch.tensor([1.])
try:
    print("works" if torchvision.ops.nms(boxes, scores, 0.5).tolist() == [0] and not made else "wrong")
except RuntimeError as error:
    print("explained" if made and "custom C++ ops" in str(error) else error)
""")
    assert out.strip() in ("works", "explained")


def test_nothing_is_declared_where_the_library_loads(tmp_path: Path) -> None:
    """A library that loads is left alone."""
    folder = fake_torchvision(tmp_path, working_library())
    out = run("compat.install_hook()\nimport torchvision; print(torchvision.nms_at_import, declared())", folder)
    assert out == "False []\n"


@pytest.mark.parametrize("library", [None, b"not a library"], ids=["absent", "broken"])
def test_declares_where_the_library_does_not_load(tmp_path: Path, library: bytes | None) -> None:
    """Without a library that loads both operators are there before torchvision's own code runs, and only once."""
    folder = fake_torchvision(tmp_path, library)
    code = """
compat.install_hook()
import torchvision
print(torchvision.nms_at_import, declared(), compat.ensure_operators(torchvision.__path__[0]), len(compat._declared))
"""
    assert run(code, folder) == "True ['nms', 'qnms'] False 1\n"


def test_an_operator_that_exists_is_not_declared_again(tmp_path: Path) -> None:
    """Another package may have declared one of the operators, or both."""
    folder = fake_torchvision(tmp_path, None)
    out = run(
        """
import torch
other = torch.library.Library("torchvision", "DEF")
other.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
compat.install_hook()
import torchvision
print(len(compat._declared), declared())
""",
        folder,
    )
    assert out == "1 ['nms', 'qnms']\n"


def test_nothing_happens_when_torchvision_is_imported_already(tmp_path: Path) -> None:
    """An imported torchvision has found its operators, whichever way."""
    folder = fake_torchvision(tmp_path, None)
    assert run("import torchvision; compat.install_hook(); import torchvision; print(declared())", folder) == "[]\n"


def test_a_missing_torchvision_is_reported_as_ever() -> None:
    """By whoever needs it."""
    out = run("""
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
compat.install_hook()
try:
    import torchvision
except ModuleNotFoundError as error:
    print(error.name, declared())
""")
    assert out == "torchvision []\n"


def test_import_of_torchvision_that_failed_before_is_repaired() -> None:
    """Someone tried torchvision first and caught the error: it imports after the repair."""
    run("""
try:
    import torchvision
except RuntimeError:
    pass
compat.install_hook()
import torchvision, timm
assert declared()
""")
