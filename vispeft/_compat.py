"""Makes torchvision importable beside a torch build that its compiled library was not linked for.

PyPI's torchvision wheel is linked against CUDA. Beside a CPU-only torch its compiled library cannot load, and
``import torchvision`` (hence ``import timm``) then stops with "operator torchvision::nms does not exist": the
package registers shape functions for operators that only the compiled library declares. Declaring the schemas of
those operators is enough for everything that needs no compiled operator: transforms, data sets and models. The
operators themselves stay unavailable, and torchvision says so when one of them is called.

An import hook does it, when torchvision is imported and at no other time. Until then neither torch nor torchvision is
touched, and a torchvision that was imported before, or that works, is left alone.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader  # at run time it costs more than this module

    import torch

__all__ = ["ensure_operators", "install_hook"]

# The operators for which torchvision registers a shape function without asking whether its library was loaded
# (torchvision 0.26 to 0.28, `_meta_registrations.py`).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A schema is withdrawn when the library object that declared it is collected, so it lives as long as the process.
_declared: list[torch.library.Library] = []


def install_hook() -> None:
    """Have `ensure_operators` run whenever torchvision is imported from now on; calling it again is harmless."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision where the other finders do, and prepares its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Hand out what another finder knows of torchvision, with a loader that goes first; of nothing else."""
        if fullname != "torchvision":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if isinstance(finder, _Finder) or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                # Without a loader or a folder it is no ordinary package, and none of our business.
                if spec.loader is not None and spec.submodule_search_locations:
                    # By duck typing: the base class of loaders would be imported by every process.
                    spec.loader = cast("Loader", _Loader(spec.loader, next(iter(spec.submodule_search_locations))))
                return spec
        return None


class _Loader:
    """Declares missing operators, then leaves the import to the loader it stands in for."""

    def __init__(self, own: Loader, folder: str) -> None:
        """Keep what the import needs.

        Args:
            own: The loader that was found.
            folder: The folder of the torchvision package.
        """
        self._own = own
        self._folder = folder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leave it to the loader that was found."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Prepare and run the import; the module then looks as if this loader had never been there."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        ensure_operators(self._folder)
        self._own.exec_module(module)


def ensure_operators(folder: str) -> bool:
    """Declare the operators torchvision expects, where its own compiled library cannot do it.

    Does nothing where that library loads, or where the operators exist already.

    Args:
        folder: The folder of the torchvision package.

    Returns:
        Whether anything was declared by this call.
    """
    import logging

    import torch  # torchvision is about to do it, so this costs nothing

    if _compiled_library_loads(folder):
        return False
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    # A fragment, because another package may hold the namespace's one "DEF" with only some of the operators.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    _declared.append(library)
    logging.getLogger(__name__).debug("torchvision's library does not load beside torch %s", torch.__version__)
    return True


def _compiled_library_loads(folder: str) -> bool:
    """Try to load torchvision's compiled library, the way torchvision will.

    Loading is the only sure test: a wheel carries its library whether or not it fits the torch beside it. Where it
    succeeds, the import of torchvision finds it loaded, and nothing is done twice.

    Args:
        folder: The folder of the torchvision package.

    Returns:
        Whether the library was found and loaded.
    """
    import torch

    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    spec = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        if sys.platform == "win32":
            os.add_dll_directory(folder)
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError):
        return False
    return True
