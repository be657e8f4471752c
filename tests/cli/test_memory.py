"""The estimate of the memory that a training step takes."""

from __future__ import annotations

import pytest

from vispeft.cli.inspect import main
from vispeft.cli.memory import MemoryEstimate, estimate_memory
from vispeft.errors import ConfigError

MIB = 2**20


def test_the_peak_is_the_sum_and_says_what_fits() -> None:
    found = MemoryEstimate(
        parameters=100 * MIB,
        gradients=2 * MIB,
        optimizer=4 * MIB,
        constant=6 * MIB,
        per_image=10 * MIB,
        temporary=2 * MIB,
        batch=8,
    )
    assert found.fixed == 112 * MIB
    assert found.total == (112 + 8 * 12) * MIB
    assert found.largest_batch(1.5) == (1024 - 112) // 12
    assert found.largest_batch(0.5) == 0
    assert "8 GiB: 630" in found.fits()


def test_a_method_beside_the_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.method"):
        main(["classification/digits_lora", "ssf", "--memory"])
    with pytest.raises(ConfigError, match="is a folder"):
        main([".", "--memory"])


@pytest.mark.slow
def test_counted_on_a_real_config() -> None:
    found = {
        memory: estimate_memory("classification/digits_lora", ["--memory", memory]) for memory in ("plain", "leaner")
    }
    lean, plain = found["leaner"], found["plain"]
    assert plain.batch == 32
    assert plain.parameters == lean.parameters > 10 * MIB
    assert plain.optimizer > 2 * plain.gradients - 1  # AdamW holds two numbers per parameter
    assert lean.per_image < 0.75 * plain.per_image
