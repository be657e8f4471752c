"""The methods, one file each: importing this package imports every module, and each registers its methods by name."""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from vispeft.core.method import Method, list_methods, method, register

# For type checkers only. A method missing from this list still works; type checkers see its class as `Any`.
if TYPE_CHECKING:
    from vispeft.methods.adapter import Adapter as Adapter
    from vispeft.methods.adapter_plus import AdapterPlus as AdapterPlus
    from vispeft.methods.adaptformer import AdaptFormer as AdaptFormer
    from vispeft.methods.bitfit import BitFit as BitFit
    from vispeft.methods.bone import Bone as Bone
    from vispeft.methods.compacter import Compacter as Compacter
    from vispeft.methods.conformer_adapter import ConformerAdapter as ConformerAdapter
    from vispeft.methods.convpass import Convpass as Convpass
    from vispeft.methods.ditask import DiTASK as DiTASK
    from vispeft.methods.dyt import DyT as DyT
    from vispeft.methods.fact import FacT as FacT
    from vispeft.methods.full import Full as Full
    from vispeft.methods.hydra import Hydra as Hydra
    from vispeft.methods.linear_probe import LinearProbe as LinearProbe
    from vispeft.methods.lofit import LoFiT as LoFiT
    from vispeft.methods.lora import LoRA as LoRA
    from vispeft.methods.lst import LST as LST
    from vispeft.methods.mam import MAM as MAM
    from vispeft.methods.mask import Mask as Mask
    from vispeft.methods.mlae import MLAE as MLAE
    from vispeft.methods.mmrl import MMRL as MMRL
    from vispeft.methods.mona import Mona as Mona
    from vispeft.methods.mos import MoS as MoS
    from vispeft.methods.mtlora import MTLoRA as MTLoRA
    from vispeft.methods.norm_tuning import NormTuning as NormTuning
    from vispeft.methods.polyhistor import Polyhistor as Polyhistor
    from vispeft.methods.prefix import Prefix as Prefix
    from vispeft.methods.pst import PST as PST
    from vispeft.methods.rein import Rein as Rein
    from vispeft.methods.repadapter import RepAdapter as RepAdapter
    from vispeft.methods.snell import SNELL as SNELL
    from vispeft.methods.sparse import Sparse as Sparse
    from vispeft.methods.ssf import SSF as SSF
    from vispeft.methods.svfit import SVFit as SVFit
    from vispeft.methods.triadapt import TriAdapt as TriAdapt
    from vispeft.methods.vpt import VPT as VPT
    from vispeft.methods.vpt_window import VPTWindow as VPTWindow
    from vispeft.methods.vptsp import VPTSP as VPTSP
    from vispeft.methods.vqt import VQT as VQT

    def __getattr__(name: str) -> Any: ...


for _module in pkgutil.iter_modules(__path__):
    for _name in (_loaded := importlib.import_module(f"{__name__}.{_module.name}")).__all__:
        globals()[_name] = getattr(_loaded, _name)

CONFIGURATIONS = sorted(
    name
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, Method) and value is not Method
)
"""Names of the configuration classes that the package re-exports."""

if not TYPE_CHECKING:  # a type checker would take this list as complete
    __all__ = ["CONFIGURATIONS", "Method", "list_methods", "method", "register"]
