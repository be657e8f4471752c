"""The methods, one file each. Every module of this package is imported, and what it registers is found by its name."""

import importlib
import pkgutil

from vispeft.core.method import Method, list_methods, method, register

for _module in pkgutil.iter_modules(__path__):
    for _name in (_loaded := importlib.import_module(f"{__name__}.{_module.name}")).__all__:
        globals()[_name] = getattr(_loaded, _name)

CONFIGURATIONS = sorted(
    name
    for name, value in globals().items()
    if isinstance(value, type) and issubclass(value, Method) and value is not Method
)
"""Names of the configuration classes, which the package hands on."""

__all__ = ["CONFIGURATIONS", "Method", "list_methods", "method", "register"]
