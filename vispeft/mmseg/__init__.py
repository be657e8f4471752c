"""The plug-in for mmsegmentation: importing it registers the backbone, the hook and all else that a config may name.

In a config: ``custom_imports = dict(imports=["vispeft.mmseg"])``. In a script: ``import vispeft.mmseg`` before the
first import of ``mmseg``, which otherwise stops where only the light build of mmcv is installed.
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
