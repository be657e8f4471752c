"""Code of the user's own: the module that ``vispeft train --code`` names.

It is named on the command line and nowhere else. No config, preset or run directory can name it, so whatever a stranger
made is read without running code.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from vispeft.building.known import register_module
from vispeft.errors import ConfigError, FileError, brief

__all__ = ["load_code"]


def load_code(name: str) -> None:
    """Import a module, which runs it, and put its classes onto the list of those that configs may name.

    Args:
        name: An import path, such as ``my_package.tasks``, or a Python file, such as ``my_tasks.py``.

    Raises:
        FileError: If there is no such file.
        ConfigError: If it is no module, or fails when it is imported.
    """
    module = _import(name)
    register_module(module.__name__)


def _import(name: str) -> ModuleType:
    file = Path(name).absolute() if name.endswith(".py") else None
    if file is not None and not file.is_file():
        raise FileError(f"--code is {name!r}, and there is no such file.")
    # Processes that load data import it by its name again, so a file is found by its folder.
    folder, path = ("", name) if file is None else (str(file.parent), file.stem)
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"--code is {name!r}; a Python file, or the import path of a module, is needed.")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise ConfigError(f"--code {name} could not be imported ({type(error).__name__}: {brief(error)})") from error
    if file is not None and not _is_file_of(file, module):
        raise ConfigError(f"--code is {name!r}, and another module has the name {path}. Rename the file.")
    return module


def _is_file_of(file: Path, module: ModuleType) -> bool:
    """Whether a module was read from a file, under whichever of its names."""
    found = getattr(module, "__file__", None)  # a folder may have the name, and then there is none
    return found is not None and os.path.exists(found) and os.path.samefile(found, file)
