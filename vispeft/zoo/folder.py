"""The folders of zoos: the one that comes with the package, and the user's own, where adapters of others go."""

from __future__ import annotations

import os
from pathlib import Path

from vispeft.resources import resource_folder
from vispeft.storage.places import cache_folder

__all__ = ["ZOO_VARIABLE", "own_zoo", "zoo_folder"]

ZOO_VARIABLE = "VISPEFT_ZOO"
"""Environment variable with the path of a ``model_zoo`` folder that replaces the packaged one."""


def zoo_folder() -> Path:
    """Return the folder of shipped models.

    Returns:
        The folder given by the environment variable ``VISPEFT_ZOO``, which need not exist, or the package's own.

    Raises:
        FileError: If the package is installed without its data.
    """
    named = os.environ.get(ZOO_VARIABLE)
    return Path(named).expanduser() if named else resource_folder("model_zoo")


def own_zoo() -> Path:
    """Return the folder of the adapters that a user has added or pulled; it need not exist."""
    return cache_folder() / "zoo"
