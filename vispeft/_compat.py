"""Makes torchvision importable beside a torch build that its compiled library was not linked for.

PyPI's torchvision wheel is linked against CUDA. Beside a CPU-only torch its compiled library cannot load, and
``import torchvision`` (hence ``import timm``) then stops with "operator torchvision::nms does not exist": the
package registers shape functions for operators that only the compiled library declares. Declaring the schemas of
those operators is enough for everything that needs no compiled operator: transforms, data sets and models. The
operators themselves stay unavailable, and torchvision says so when one of them is called.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import sys

import torch

__all__ = ["ensure_torchvision"]

logger = logging.getLogger(__name__)

# The operators for which torchvision registers a shape function without asking whether its library was loaded
# (torchvision 0.26 to 0.28, `_meta_registrations.py`).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# A schema is withdrawn when the library object that declared it is collected, so it lives as long as the process.
_declared: list[torch.library.Library] = []


def ensure_torchvision() -> bool:
    """Declare the operators torchvision expects, where its own compiled library cannot do it.

    Does nothing when torchvision is already imported, is not installed, or works: nothing is then declared and
    nothing is changed. Meant to be called before anything imports torchvision; calling it again is harmless.

    Returns:
        Whether anything was declared by this call.
    """
    if "torchvision" in sys.modules:
        return False
    folder = _torchvision_folder()
    if folder is None or _compiled_library_loads(folder):
        return False
    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if not missing:
        return False
    # A fragment, because another package may hold the namespace's one "DEF" with only some of the operators.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in missing:
        library.define(schema)
    _declared.append(library)
    logger.debug("torchvision's compiled library does not load beside torch %s; operators declared", torch.__version__)
    return True


def _torchvision_folder() -> str | None:
    """Find the folder of the torchvision that an import would take, without importing it.

    Returns:
        The folder, or None when torchvision is not installed as an ordinary package.
    """
    try:
        spec = importlib.util.find_spec("torchvision")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(spec.submodule_search_locations))


def _compiled_library_loads(folder: str) -> bool:
    """Try to load torchvision's compiled library, the way torchvision will.

    Loading is the only sure test: a wheel carries its library whether or not it fits the torch beside it. Where it
    succeeds, the import of torchvision finds it loaded, and nothing is done twice.

    Args:
        folder: The folder of the torchvision package.

    Returns:
        Whether the library was found and loaded.
    """
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    spec = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        if os.name == "nt":
            os.add_dll_directory(folder)
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError):
        return False
    return True
