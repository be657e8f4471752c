"""The folders that come with the package: found in a checkout and in an installed package, missed with an error."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vispeft.errors import FileError, UnknownNameError
from vispeft.resources import config_names, find_config, resource_folder
from vispeft.zoo import zoo_folder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder such as site-packages, whose package has no data; its neighbour is another package's."""
    package = tmp_path / "site-packages" / "vispeft"
    package.mkdir(parents=True)
    (package.parent / "configs").mkdir()
    monkeypatch.setattr("vispeft.resources.files", lambda name: package)
    monkeypatch.delenv("VISPEFT_ZOO", raising=False)
    return package


def test_a_checkout_has_them_at_its_root() -> None:
    assert resource_folder("configs") == ROOT / "configs"
    assert resource_folder("model_zoo") == ROOT / "model_zoo"


def test_an_installed_package_has_them_inside(installed: Path) -> None:
    (installed / "configs" / "classification").mkdir(parents=True)
    (installed / "configs" / "classification" / "mine.yaml").touch()
    assert resource_folder("configs") == installed / "configs"
    assert config_names() == ["classification/mine"]


def test_a_package_without_its_data_says_so(installed: Path) -> None:
    with pytest.raises(FileError, match=r"'configs'.*without it.*complete checkout"):
        find_config("classification/digits_ssf")
    with pytest.raises(FileError, match=r"'model_zoo'.*without it"):
        zoo_folder()


def test_a_package_in_an_archive_says_so(tmp_path: Path) -> None:
    """zipimport can run vispeft's Python files, but no reader of configs or weights takes a file inside an archive."""
    (tmp_path / "vispeft").mkdir()
    for name in ("errors.py", "resources.py"):
        shutil.copy(ROOT / "vispeft" / name, tmp_path / "vispeft" / name)
    (tmp_path / "vispeft" / "__init__.py").touch()
    archive = shutil.make_archive(str(tmp_path / "package"), "zip", tmp_path, "vispeft")
    code = "from vispeft.resources import resource_folder; resource_folder('configs')"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {archive!r}); {code}"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert "FileError: The folder 'configs' of vispeft was asked for" in done.stderr
    assert "Install vispeft with pip" in done.stderr


def test_names_of_packaged_configs() -> None:
    names = config_names()
    assert {"classification/digits_ssf", "segmentation/earth_lora", "mmseg/earth_swin_fcn"} <= set(names)
    assert not [name for name in names if name.startswith("method/") or "_base_" in name]
    assert [find_config(name).is_file() for name in names] == [True] * len(names)
    assert find_config("mmseg/earth_swin_fcn") == ROOT / "configs/mmseg/earth_swin_fcn.py"


def test_a_path_stays_a_path(tmp_path: Path) -> None:
    assert find_config("none/mine.yaml") == Path("none/mine.yaml")
    (tmp_path / "mine").touch()
    assert find_config(tmp_path / "mine") == tmp_path / "mine"


def test_unknown_config() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'classification/digits_ssf'.*vispeft train --list"):
        find_config("clasification/digits_sff")
