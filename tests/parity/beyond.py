"""What the tests of reference part F share: networks, cases, tolerances, and a comparison of outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tests.parity.test_parity import FOLDER, HERE, backbone, below, read
from vispeft.adapters.bank import AdapterBank
from vispeft.interop import load_official, to_official

DTYPES = {"float64": torch.float64, "float32": torch.float32}
OUTPUT = {"float64": 1e-10, "float32": 2e-5}
GRADIENT = {"float64": 1e-9, "float32": 1e-4}
"""README-F, "Tolerances": relative to the largest entry of each tensor."""


@cache
def file(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a reference file of the chosen folder, or of the one beside the tests."""
    folder = FOLDER if (FOLDER / f"{name}.safetensors").is_file() else HERE
    return read(folder / f"{name}.safetensors")


def differs(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference relative to the largest entry of a tensor."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.detach().double() - wanted.double()).abs().max() / wanted.double().abs().max())


@dataclass(frozen=True)
class Case:
    """One case of a file: a configuration with its tensors."""

    meta: dict[str, Any]
    """The file's metadata, with the case's configuration under ``config``."""
    tensors: dict[str, Tensor]
    """The case's tensors, those of the backbone and the inputs included."""

    @classmethod
    def of(cls, name: str, case: str | None = None, base: str | None = None) -> Case:
        """Read a case; `base` is the file that has the backbone and the inputs."""
        meta, tensors = file(name)
        own = tensors if case is None else below(tensors, f"{case}.")
        config = meta["config"] if case is None else meta["cases"][case]
        shared = {**file(base or name)[1], **tensors}
        shared = {key: tensor for key, tensor in shared.items() if key.startswith(("backbone.", "input."))}
        return cls({**meta, "config": config}, {**shared, **own})

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Make the backbone in float64 or float32."""
        return backbone(self.meta, self.tensors, dtype)

    def adapted(self, source: str, dtype: torch.dtype) -> tuple[nn.Module, AdapterBank]:
        """Make the backbone with the file's adapter."""
        model = self.model(dtype)
        return model, load_official(model, source, below(self.tensors, "adapter."), self.meta)


def compare(bank: AdapterBank, source: str, out: Tensor, case: Case, precision: str, prefix: str = "") -> None:
    """Compare logits and the gradients of ``sum(logits * w)``, those of every trained tensor."""
    wanted = case.tensors
    assert differs(out, wanted[f"{prefix}out.logits"]) <= OUTPUT[precision]
    (out * wanted["input.w"].to(out.dtype)).sum().backward()
    gradients = {**below(wanted, f"{prefix}grad.adapter."), **head_gradients(wanted, prefix)}
    found = to_official(bank, source, grad=True)
    assert set(found) - set(gradients) <= {name for name in found if name.startswith("head")}
    for name, gradient in gradients.items():
        error = differs(found[name], gradient)
        assert error <= GRADIENT[precision], f"{name}: {error:.1e}"


def head_gradients(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Collect the gradients of the classifier, under timm's names."""
    start = f"{prefix}grad.head."
    return {f"head.{key.removeprefix(start)}": tensor for key, tensor in tensors.items() if key.startswith(start)}
