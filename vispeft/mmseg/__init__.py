"""The plug-in for mmsegmentation: importing it registers the backbone, the hook and everything else for configs.

In a config: ``custom_imports = dict(imports=["vispeft.mmseg"])``. In a script: ``import vispeft.mmseg`` before the
first import of ``mmseg``, which otherwise fails if only mmcv-lite is installed.
"""

from vispeft.mmseg.compat import prepare

prepare()  # before anything imports mmseg

from vispeft.mmseg.backbone import VispeftBackbone  # noqa: E402
from vispeft.mmseg.datasets import VispeftEarthDataset  # noqa: E402
from vispeft.mmseg.deploy import merge  # noqa: E402
from vispeft.mmseg.files import load_decoder, save_adapter  # noqa: E402
from vispeft.mmseg.hooks import VispeftHook  # noqa: E402
from vispeft.mmseg.optim import VispeftOptimWrapperConstructor  # noqa: E402

__all__ = [
    "VispeftBackbone",
    "VispeftEarthDataset",
    "VispeftHook",
    "VispeftOptimWrapperConstructor",
    "load_decoder",
    "merge",
    "save_adapter",
]
