"""The lock file: every dependency by version and hash, but for torch and torchvision, which the Makefile pins."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
PINS = dict(re.findall(r"^(TORCH|TORCHVISION) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


def locked() -> dict[str, tuple[Requirement, int]]:
    """List the locked packages: the requirement, and how many hashes it has."""
    entries = re.sub(r"^\s*#.*\n", "", LOCK, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found = [(Requirement(entry.partition("--hash")[0]), entry.count("--hash=sha256:")) for entry in entries if entry]
    return {canonicalize_name(requirement.name): (requirement, hashes) for requirement, hashes in found}


def asked() -> list[Requirement]:
    """List what pyproject.toml asks for, build system included, and extras but for trackers, which are not locked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [packages for name, packages in project["project"]["optional-dependencies"].items() if name != "trackers"]
    texts = [*project["project"]["dependencies"], *project["build-system"]["requires"], *(t for e in extras for t in e)]
    return [Requirement(text) for text in texts]


def test_every_package_has_one_version_and_hashes() -> None:
    for name, (requirement, hashes) in locked().items():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), name
        assert hashes > 0, name


def test_it_serves_x86_64_and_aarch64() -> None:
    """Packages with compiled parts have a wheel for each platform, so more than two hashes."""
    for name in ("numpy", "pillow", "scipy", "safetensors", "grpcio"):
        assert locked()[name][1] > 10, name


def test_torch_and_indexes_are_not_in_it() -> None:
    names = locked().keys()
    assert not {"torch", "torchvision", "triton"} & names
    assert not [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    assert "://" not in LOCK
    assert "--index" not in LOCK


@pytest.mark.parametrize("requirement", asked(), ids=lambda requirement: requirement.name)
def test_what_pyproject_asks_for_is_locked(requirement: Requirement) -> None:
    """If not: make lock."""
    pinned = PINS.get(requirement.name.upper())
    version = pinned or str(locked()[canonicalize_name(requirement.name)][0].specifier).removeprefix("==")
    assert requirement.specifier.contains(version)


def test_the_malicious_releases_of_lightning_are_excluded() -> None:
    (lightning,) = [requirement for requirement in asked() if requirement.name == "lightning"]
    assert not [version for version in ("2.6.0", "2.6.2", "2.6.3") if lightning.specifier.contains(version)]


def test_the_installation_page_names_the_pins() -> None:
    page = (ROOT / "docs/installation.md").read_text()
    for name, version in PINS.items():
        assert set(re.findall(rf"\b{name.lower()}==(\S+)", page)) == {version}
    assert f"after torch {PINS['TORCH']}," in LOCK
