"""Make mmsegmentation 1.2 work on current releases of torch, with mmcv-lite.

There are two obstacles. mmseg imports ``mmcv.ops`` without a guard, and that needs the compiled ``mmcv._ext``, for
which there are no wheels for a current torch; none of the models used here calls it. And `torch.load` reads only
tensors by default since torch 2.6, while mmengine's checkpoints contain its log and numpy values.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch

from vispeft.errors import ConfigError

__all__ = ["allow_checkpoints", "import_ops", "prepare"]

_EXTENSION = "mmcv._ext"
_NUMPY, _HOMES = ("scalar", "_reconstruct"), ("numpy._core", "numpy.core")
"""Functions that pickled scalars and arrays of numpy call, and their modules."""


def prepare() -> None:
    """Make mmseg importable and its checkpoints readable; calling it again changes nothing.

    Raises:
        ConfigError: If mmseg, or a package it needs, is missing or cannot be imported.
    """
    missing = [name for name in ("mmengine", "mmcv", "mmseg") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"vispeft.mmseg was asked for, and {', '.join(missing)} is not installed. Install the extra: "
            'pip install "vispeft[mmseg]" (Python below 3.14).'
        )
    try:
        import_ops()
        importlib.import_module("mmseg.models")
    except (ImportError, AssertionError) as error:  # mmseg asserts the versions it was made for
        raise ConfigError(
            f"vispeft.mmseg was asked for, and mmseg cannot be imported ({error}). Install the extra: pip install "
            '"vispeft[mmseg]". A missing libGL.so.1 or libgthread-2.0.so.0 is OpenCV\'s (Debian: libgl1, libglib2.0-0).'
        ) from error
    allow_checkpoints()


def import_ops() -> None:
    """Import ``mmcv.ops`` without its compiled part, where that is not installed.

    Operators written in Python then work, such as ``point_sample``; the others raise an error when they are called.
    The stand-in is removed afterwards, as mmengine detects the full mmcv by ``mmcv._ext``.
    """
    if "mmcv.ops" in sys.modules or importlib.util.find_spec(_EXTENSION) is not None:
        return
    sys.modules[_EXTENSION] = _Absent(_EXTENSION)
    try:
        importlib.import_module("mmcv.ops")
    finally:
        del sys.modules[_EXTENSION]


class _Absent(ModuleType):
    """Stand-in for mmcv's compiled operators, which has any attribute and raises on call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise ConfigError(
                f"The operator {name} of mmcv was called, and it is compiled: the light build of mmcv lacks it. "
                "Install the full mmcv for your torch, or choose a model that does without."
            )

        return refuse


def allow_checkpoints() -> None:
    """Let `torch.load` read the non-tensor objects in mmengine's checkpoints, still without running code.

    These are mmengine's log with the names of its statistics, and scalars and arrays of numpy.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    home = importlib.import_module("numpy._core.multiarray")
    # Checkpoints written under numpy 1 refer to the same functions by the module's old name.
    calls = [(getattr(home, name), f"{place}.multiarray.{name}") for name in _NUMPY for place in _HOMES]
    kinds = dict.fromkeys(type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV")
    allowed = [HistoryBuffer, np.ndarray, np.dtype, *kinds, *calls, (_statistic, "builtins.getattr")]
    torch.serialization.add_safe_globals(allowed)


def _statistic(owner: Any, name: str) -> Any:
    """Replace `getattr`, by which a pickled log refers to its statistics, and return nothing else.

    Args:
        owner: Must be mmengine's `HistoryBuffer`.
        name: A statistic of it.

    Raises:
        UnpicklingError: If anything else is asked for.
    """
    from mmengine.logging.history_buffer import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"The checkpoint asks for {name!r} of {owner!r}, which is no tensor and no log.")
    return getattr(owner, name)
