"""The attention of rows to tokens against the formula with keys and values of the tokens."""

from __future__ import annotations

import pytest
import torch

from vispeft.hosts.row_attention import Reading, read_rows

IMAGES, HEADS, COUNT, WIDTH, CHANNELS, TOKENS = 2, 2, 3, 4, 5, 6


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("windows", [1, 3])
def test_rows_read_keys_and_values(windows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    asked, x = draw(IMAGES, HEADS, COUNT, WIDTH).requires_grad_(), draw(IMAGES * windows, TOKENS, CHANNELS)
    keys, values = draw(HEADS, WIDTH, CHANNELS), draw(HEADS, WIDTH, CHANNELS)
    bias = draw(HEADS, 1, WIDTH) if biased else None
    found = read_rows(asked, Reading(x, keys, values, bias, 0.3))
    by_head = [torch.einsum("bnd,hwd->bhnw", x, matrix) for matrix in (keys, values)]
    read = by_head[1] if bias is None else by_head[1] + bias
    spread = asked.repeat_interleave(windows, 0)
    scores = 0.3 * (spread @ (by_head[0] + draw(HEADS, 1, WIDTH)).transpose(2, 3))  # a key bias changes nothing
    wanted = (scores.softmax(-1) @ read).unflatten(0, (IMAGES, windows)).mean(1).transpose(1, 2).flatten(2)
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)
    slopes = [torch.autograd.grad(y.square().sum(), asked)[0] for y in (found, wanted)]
    assert torch.allclose(*slopes, rtol=1e-9, atol=1e-12)


def test_no_images() -> None:
    reading = Reading(torch.empty(0, TOKENS, CHANNELS), *torch.ones(2, HEADS, WIDTH, CHANNELS), None, 1.0)
    assert read_rows(torch.empty(0, HEADS, COUNT, WIDTH), reading).shape == (0, COUNT, HEADS * WIDTH)
