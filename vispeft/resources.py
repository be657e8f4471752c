"""Where the packaged configs, presets and small backbones are, and the version of the package.

They stand at the root of the repository and are copied into the package when a wheel is built (``setup.py``). Whatever
needs one of these files asks here, so that a wheel and a checkout (an editable install, too) serve the same.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Literal

from vispeft.errors import FileError, UnknownNameError

__all__ = ["config_names", "find_config", "package_version", "resource_folder"]

_FOR_OTHERS = ("method", "_base_")
"""Folders of ``configs`` that hold parts of configs and nothing that can be run."""


def package_version() -> str:
    """Return the version of the installed package; 0 where it is read from a folder and not installed."""
    try:
        return version("vispeft")
    except PackageNotFoundError:
        return "0"


def resource_folder(name: Literal["configs", "model_zoo"]) -> Path:
    """Find one of the folders that come with the package.

    Args:
        name: The folder.

    Returns:
        Its path, in an installed package or in a checkout.

    Raises:
        FileError: If the installation lacks it.
    """
    package = files("vispeft")
    if not isinstance(package, Path):
        raise FileError(
            f"The folder {name!r} of vispeft was asked for, but the package is read from {package}, which is not a "
            "folder. Install vispeft with pip, which unpacks it."
        )
    # Beside the package only in a checkout: in site-packages the neighbours belong to other packages.
    places = [package / name]
    if (package.parent / "pyproject.toml").is_file():
        places.append(package.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise FileError(
        f"The folder {name!r} of vispeft was asked for, and {package} is installed without it. Build the wheel from a "
        "complete checkout (pip wheel . --no-deps), or install it again."
    )


def config_names() -> list[str]:
    """List the packaged configs.

    Returns:
        Their names for ``vispeft train``: the path below ``configs``, without the ending.

    Raises:
        FileError: If the installation lacks them.
    """
    return sorted(_configs())


def find_config(given: str | Path) -> Path:
    """Find a config by its path or by the name of a packaged one.

    Args:
        given: A path, or a name such as ``classification/digits_ssf``.

    Returns:
        The file. A path with an ending is handed back even if nothing is there: its reader has more to say about it.

    Raises:
        UnknownNameError: If it is neither.
        FileError: If a name was given and the installation lacks the packaged configs.
    """
    path = Path(given)
    if path.suffix or os.path.isfile(path):  # false, too, for a name that the system cannot have
        return path
    known = _configs()
    if str(given) not in known:
        raise UnknownNameError(
            "config", str(given), known, "`vispeft train --list` names the packaged ones; a path ends in .yaml or .py."
        )
    return known[str(given)]


def _configs() -> dict[str, Path]:
    root = resource_folder("configs")
    found = (path.relative_to(root) for path in root.rglob("*") if path.suffix in (".yaml", ".py"))
    return {
        path.with_suffix("").as_posix(): root / path
        for path in found
        if not set(path.parts).intersection((*_FOR_OTHERS, "__pycache__"))
    }
