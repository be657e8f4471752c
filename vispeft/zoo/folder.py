"""The folder of shipped models."""

from __future__ import annotations

import os
from pathlib import Path

from vispeft.resources import resource_folder

__all__ = ["ZOO_VARIABLE", "zoo_folder"]

ZOO_VARIABLE = "VISPEFT_ZOO"
"""Environment variable that names another ``model_zoo`` folder than the packaged one."""


def zoo_folder() -> Path:
    """Find the folder of shipped models.

    Returns:
        The folder the environment variable ``VISPEFT_ZOO`` names, which need not exist, or the package's own.

    Raises:
        FileError: If the package is installed without its data.
    """
    named = os.environ.get(ZOO_VARIABLE)
    return Path(named).expanduser() if named else resource_folder("model_zoo")
