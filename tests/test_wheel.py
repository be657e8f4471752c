"""The wheel alone is enough: built, installed by itself into an empty folder, and run where no checkout is in reach."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("LICENSE", "README.md", "configs", "model_zoo", "pyproject.toml", "setup.py", "vispeft")

pytestmark = pytest.mark.slow


def pip(*arguments: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in which an earlier build left something behind."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for stale in ("vispeft/gone.py", "vispeft/configs/gone.yaml"):
        (folder / "build/lib" / stale).parent.mkdir(parents=True, exist_ok=True)
        (folder / "build/lib" / stale).touch()
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", out, cwd=sources)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the wheel alone."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", target, wheel, cwd=target)
    return target


def python(installed: Path, code: str, cwd: Path) -> str:
    """Run code with the installed wheel and the environment's packages, of which no .pth file is read.

    So an editable install of the checkout is out of reach (-S), like the working directory and PYTHONPATH (-I).
    """
    paths = [str(installed), *dict.fromkeys(sysconfig.get_path(key) for key in ("purelib", "platlib"))]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VISPEFT_")}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys\nsys.path[:0] = {paths}\n{code}"],
        capture_output=True, text=True, timeout=300, cwd=cwd, env={**kept, "VISPEFT_CACHE": str(cwd / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_small_enough(wheel: Path) -> None:
    assert wheel.stat().st_size <= 36_000_000


def test_it_holds_the_files_of_the_repository_and_no_others(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vispeft/")}
    own = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vispeft").rglob("*")
        if path.suffix in (".html", ".json", ".py", ".typed")
    }
    data = {
        f"vispeft/{path.relative_to(ROOT).as_posix()}"
        for folder in ("configs", "model_zoo")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == own | data


def test_the_console_command_trains(installed: Path, tmp_path: Path) -> None:
    script = str(installed / "bin" / "vispeft")
    steps = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    argv = [script, "train", "classification/digits_ssf", *steps]
    python(installed, f"import runpy\nsys.argv = {argv}\nrunpy.run_path({script!r}, run_name='__main__')", tmp_path)
    assert json.loads((tmp_path / "runs/digits_ssf/1/metrics.json").read_text())["steps"] == 2


def test_it_creates_inspects_and_reads_configs(installed: Path, tmp_path: Path) -> None:
    code = """
import vispeft
from vispeft.cli.main import main
from vispeft.cli.mmseg import read
from vispeft.resources import find_config
print(vispeft.__file__)
print(type(vispeft.create_model("zoo:vit_tiny")).__name__)
assert main(["inspect", "zoo:vit_tiny", "lora"]) == 0
assert main(["inspect", "zoo:vit_tiny", "classification/digits_ssf"]) == 0
assert main(["train", "--list"]) == 0
print(read(find_config("mmseg/earth_swin_fcn")).model.backbone.peft.type)
"""
    lines = python(installed, code, tmp_path).splitlines()
    assert lines[:2] == [str(installed / "vispeft" / "__init__.py"), "VisionTransformer"]
    assert [line.partition(":")[0].strip() for line in lines if " on vit: " in line] == ["LoRA on vit", "SSF on vit"]
    assert "mmseg/earth_swin_fcn" in lines
    assert lines[-1] == "AdaptFormer"


def test_without_its_data_it_says_so(installed: Path, tmp_path: Path) -> None:
    lacking = tmp_path / "lacking"
    shutil.copytree(installed / "vispeft", lacking / "vispeft", ignore=shutil.ignore_patterns("configs", "model_zoo"))
    code = """
from vispeft.cli.main import main
sys.stderr = sys.stdout
assert main(["train", "classification/digits_ssf"]) == 2
assert main(["inspect", "zoo:vit_tiny", "ssf"]) == 2
"""
    configs, method = python(lacking, code, tmp_path).splitlines()
    assert configs.startswith("error: The folder 'configs' of vispeft was asked for")
    assert method.startswith("error: The folder '")
    assert "is installed without it" in configs
    assert "is installed without it" in method


def test_an_editable_install_reads_the_folders_where_they_are(sources: Path, tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as backend; print(backend.build_editable({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, timeout=300, cwd=sources)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as archive:
        assert not [name for name in archive.namelist() if "configs" in name or "model_zoo" in name]
        archive.extractall(tmp_path / "site")
    code = f"""
import site
site.addsitedir({str(tmp_path / "site")!r})
import vispeft
from vispeft.resources import find_config, resource_folder
print(vispeft.__file__, find_config("classification/digits_ssf"), resource_folder("model_zoo"))
"""
    assert [Path(path) for path in python(tmp_path / "site", code, tmp_path).split()] == [
        sources / "vispeft/__init__.py",
        sources / "configs/classification/digits_ssf.yaml",
        sources / "model_zoo",
    ]
