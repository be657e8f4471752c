"""Hugging Face peft: conversion of LoRA adapters from and to it, and its local tuners as methods of this project.

peft is optional and imported where it is used.
"""

from vispeft.interop.peft.files import from_peft, to_peft
from vispeft.interop.peft.tuners import LOCAL, REFUSED, PeftMethod, PeftUnit

__all__ = ["LOCAL", "REFUSED", "PeftMethod", "PeftUnit", "from_peft", "to_peft"]
