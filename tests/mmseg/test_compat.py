# ruff: noqa: E402 - mmsegmentation may be missing, and is made importable by the plug-in
import importlib
import pickle
import sys

import pytest

pytest.importorskip("mmseg")
importlib.import_module("vispeft.mmseg")

import mmcv.ops
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.utils.dl_utils import mmcv_full_available

from vispeft.errors import ConfigError


def test_stand_in_for_compiled_operators_is_gone():
    assert "mmcv._ext" not in sys.modules or mmcv_full_available()
    if mmcv_full_available():
        pytest.skip("the full mmcv is installed, and nothing is done")
    with pytest.raises(ConfigError, match="operator nms"):
        mmcv.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    points = mmcv.ops.point_sample(torch.ones(1, 1, 4, 4), torch.rand(1, 3, 2) * 0.5 + 0.25)
    assert torch.allclose(points, torch.ones(1, 1, 3))


def test_checkpoints_are_read_as_data(tmp_path):
    log = HistoryBuffer([1.0, 2.0], [1, 1])
    numbers = {"scalar": np.float64(0.5), "array": np.arange(3), "flags": np.array([True, False])}
    torch.save({"log": log, **numbers}, tmp_path / "good.pth")
    content = torch.load(tmp_path / "good.pth", weights_only=True)
    assert content["log"].mean() == 1.5
    assert content["scalar"] == 0.5
    assert content["array"].tolist() == [0, 1, 2]
    torch.save({"evil": _Reaching()}, tmp_path / "evil.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "evil.pth", weights_only=True)


class _Reaching:
    def __reduce__(self):
        return getattr, (np.ndarray, "tofile")
