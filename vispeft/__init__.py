"""vispeft: parameter-efficient adaptation of frozen timm backbones."""

from vispeft._compat import ensure_torchvision

ensure_torchvision()  # before anything imports torchvision, as timm does

from vispeft import methods  # noqa: E402
from vispeft.adapters.attach import attach, load  # noqa: E402
from vispeft.adapters.bank import AdapterBank  # noqa: E402
from vispeft.backbones.create import create_model  # noqa: E402
from vispeft.core.method import Method, list_methods, method, register, register_lazy  # noqa: E402
from vispeft.core.plan import Plan, plan  # noqa: E402
from vispeft.errors import VispeftError  # noqa: E402

register_lazy("peft", "vispeft.interop.peft")
globals().update({name: getattr(methods, name) for name in methods.CONFIGURATIONS})

__all__ = [  # noqa: PLE0604  (the methods register themselves)
    "AdapterBank",
    "Method",
    "Plan",
    "VispeftError",
    "attach",
    "create_model",
    "list_methods",
    "load",
    "method",
    "plan",
    "register",
    *methods.CONFIGURATIONS,
]
