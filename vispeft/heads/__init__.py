"""Dense decoders, one file each: importing this package imports every module, and each registers its decoder."""

import importlib
import pkgutil

from vispeft.heads.base import Decoder, decoder, list_decoders, register_decoder

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Decoder", "decoder", "list_decoders", "register_decoder"]
