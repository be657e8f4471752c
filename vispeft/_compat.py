"""Makes torchvision importable beside a torch build that its compiled library was not linked for.

PyPI's torchvision wheel is linked against CUDA. Beside a CPU-only torch its compiled library cannot load, and
``import torchvision`` (hence ``import timm``) then stops with "operator torchvision::nms does not exist": the
package registers shape functions for operators that only the compiled library declares. Declaring the schemas of
those operators is enough for everything that needs no compiled operator: transforms, data sets and models. The
operators themselves stay unavailable, and torchvision says so when one of them is called.

An import hook does it, when torchvision is imported and at no other time. Until then neither torch nor torchvision is
touched. Whether torchvision works is seen from its own import, never from the names of its files, which change between
versions: it is tried first, and only where it stops for want of these operators are they declared and the import
repeated. A torchvision that was imported before, or that works, is left alone.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from importlib.abc import Loader  # at run time it costs more than this module

    import torch

__all__ = ["declare_operators", "install_hook"]

# The operators for which torchvision registers a shape function without asking whether its library was loaded
# (torchvision 0.26 to 0.28, `_meta_registrations.py`).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A schema is withdrawn when the library object that declared it is collected, so it lives as long as the process.
_declared: list[torch.library.Library] = []


def install_hook() -> None:
    """Repair imports of torchvision from now on; calling it again is harmless."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision where the other finders do, and repairs its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Hand out what another finder knows of torchvision, with a loader that repairs the import; of nothing else."""
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
                    spec.loader = cast("Loader", _Loader(spec.loader))
                return spec
        return None


class _Loader:
    """Leaves the import to the loader it stands in for, and repeats it with declared operators if they are missing."""

    def __init__(self, own: Loader) -> None:
        """Keep the loader that was found.

        Args:
            own: The loader.
        """
        self._own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Leave it to the loader that was found."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the import; the module then looks as if this loader had never been there."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        module.__loader__ = self._own
        try:
            self._own.exec_module(module)
        except RuntimeError:
            # Modules of the package that were imported before the error stay as they are; the rest is imported now.
            if not declare_operators():
                raise
            self._own.exec_module(module)


def declare_operators() -> bool:
    """Declare those of the operators torchvision expects that do not exist.

    Returns:
        Whether anything was declared by this call.
    """
    import logging

    import torch  # torchvision has done it, so this costs nothing

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
