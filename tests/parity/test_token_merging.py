"""Token merging against the values of ToMe's public code: matching alone, whole networks, and schedules."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import Tensor

import vispeft
from tests.parity.beyond import DTYPES, GRADIENT, OUTPUT, Case, differs, file
from tests.parity.test_parity import FILES, below
from vispeft.core.token_merging import TokenMerging
from vispeft.errors import ConfigError
from vispeft.hosts.block import BlockHost
from vispeft.hosts.token_merging import Match, Merged, match, merge, places, unmerged

CLAIMED = {path.stem: path for path in FILES if path.stem.startswith("tome_")}
MATCHING = [(name, case) for name in CLAIMED if "matching" in name for case in file(name)[0]["cases"]]
NETWORKS = [name for name in CLAIMED if "matching" not in name]
NETWORK_CASES = [(name, case) for name in NETWORKS for case in file(name)[0]["cases"]]
"""``tome_matching`` and ``tome_vit``, and files of a chosen folder with the same keys."""


def matrix(place: Tensor, count: int) -> Tensor:
    """Make the 0/1 matrix (B, n', n) of the token that each token went into."""
    return torch.nn.functional.one_hot(place, count).transpose(1, 2)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("name", "case"), MATCHING)
def test_matching(name: str, case: str, precision: str) -> None:
    dtype, settings = DTYPES[precision], file(name)[0]["cases"][case]
    tensors = below(file(name)[1], f"{case}.")
    protected = settings["class_token"] + settings["distill_token"]
    x = tensors["input.x"].to(dtype, copy=True).requires_grad_()
    size = tensors["input.size"].to(dtype).squeeze(-1)
    metric = tensors["input.metric"].to(dtype)[:, protected:]
    found = match(metric, settings["r"], protected)

    def merged_by(weights: Tensor) -> tuple[Tensor, Tensor]:
        joined, sizes = merge(x[:, protected:], weights[:, protected:], found, protected)
        return torch.cat([x[:, :protected], joined], 1), torch.cat([weights[:, :protected], sizes], 1)

    out, sizes = merged_by(size)
    assert out.shape[1] == settings["out_tokens"]
    assert differs(out, tensors["out.x"]) <= OUTPUT[precision]
    assert differs(sizes.unsqueeze(-1), tensors["out.size"]) <= OUTPUT[precision]
    assert differs(merged_by(torch.ones_like(size))[0], tensors["out.plain_mean"]) <= OUTPUT[precision]
    own = torch.arange(protected).expand(x.shape[0], -1)
    place = torch.cat([own, places(found, x.shape[1] - protected, protected) + protected], 1)
    assert torch.equal(matrix(place, out.shape[1]), tensors["out.source"].long())
    if "out.unmerged" in tensors:
        state = Merged(sizes[:, protected:], place[:, protected:] - protected)
        assert differs(unmerged(out, state), tensors["out.unmerged"]) <= OUTPUT[precision]
    (out * tensors["input.w"].to(dtype)).sum().backward()
    assert differs(x.grad, tensors["grad.input.x"]) <= GRADIENT[precision]


def network(name: str, dtype: torch.dtype, r: Any, **settings: Any) -> tuple[Any, vispeft.AdapterBank]:
    """Make a file's ViT, which merges tokens."""
    meta, tensors = file(name)
    model = Case(meta, tensors).model(dtype)
    bank = vispeft.attach(model, vispeft.LinearProbe())
    bank.set_active([])
    count, slope = r if isinstance(r, list) and isinstance(r[-1], float) else (r, 0.0)
    own = {"proportional_attention": meta["config"]["prop_attn"]}
    bank.merge_tokens(count, inflection=slope, **{**own, **settings})
    return model, bank


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("name", "case"), NETWORK_CASES)
def test_network(name: str, case: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, meta = DTYPES[precision], file(name)[0]
    case_of, wanted = meta["cases"][case], below(file(name)[1], f"{case}.")
    model, _ = network(name, dtype, case_of["r"])
    protected = model.num_prefix_tokens
    matches: list[tuple[Tensor, Match]] = []

    def noted(metric: Tensor, *args: Any) -> Match:
        matches.append((metric, match(metric, *args)))
        return matches[-1][1]

    monkeypatch.setattr("vispeft.hosts.token_merging.match", noted)
    blocks: list[Any] = []
    for block in model.blocks:
        assert isinstance(block, BlockHost)
        block.register_forward_hook(lambda _m, _a, out: blocks.append(out))
    images = file(name)[1]["input.images"].to(dtype)
    with torch.no_grad():
        logits = model(images)
    assert differs(logits, wanted["out.logits"]) <= OUTPUT[precision]
    state = blocks[-1].merged
    front = torch.arange(protected).expand(len(images), -1)
    source = torch.cat([front, state.source + protected], 1)
    assert torch.equal(matrix(source, state.size.shape[1] + protected), wanted["out.source"].long())
    assert [found.sources.shape[1] for _, found in matches] == case_of["r_used"]
    for index, (metric, found) in enumerate(matches):
        # Protected tokens are among the even and odd ones that the file numbers.
        assert torch.equal(found.sources + (protected + 1) // 2, wanted[f"mid.match{index}.source_positions"])
        assert torch.equal(found.targets + protected // 2, wanted[f"mid.match{index}.destination_positions"])
        if f"mid.match{index}.metric" in wanted:
            assert differs(metric, wanted[f"mid.match{index}.metric"][:, protected:]) <= OUTPUT[precision]
    for index, out in enumerate(blocks):
        tokens, merged = (out.tokens, out.merged) if not isinstance(out, Tensor) else (out, None)
        assert tokens.shape[1] == case_of["tokens"][index]
        size = (
            torch.ones(tokens.shape[:2])
            if merged is None
            else torch.nn.functional.pad(merged.size, (protected, 0), value=1.0)
        )
        assert torch.equal(size.double(), wanted[f"mid.size{index}"].squeeze(-1))
        if f"mid.block{index}" in wanted:
            assert differs(tokens, wanted[f"mid.block{index}"]) <= OUTPUT[precision]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name: str, precision: str) -> None:
    dtype, meta = DTYPES[precision], file(name)[0]
    tensors, compared = file(name)[1], 0
    for case, settings in meta["cases"].items():
        wanted = below(tensors, f"{case}.grad.")
        if not wanted:
            continue
        model, _ = network(name, dtype, settings["r"])
        images = tensors["input.images"].to(dtype, copy=True).requires_grad_()
        parameters = {key: p.requires_grad_() for key, p in model.named_parameters()}
        (model(images) * tensors["input.w"].to(dtype)).sum().backward()
        for key, gradient in wanted.items():
            found = images.grad if key == "input.images" else parameters[key.removeprefix("backbone.")].grad
            assert differs(found, gradient) <= GRADIENT[precision], key
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_without_proportional_attention(name: str, precision: str) -> None:
    dtype, (meta, tensors) = DTYPES[precision], file(name)
    model, bank = network(name, dtype, next(iter(meta["cases"].values()))["r"], proportional_attention=False)
    images = tensors["input.images"].to(dtype)
    if "no_prop_attn.out.logits" in tensors:
        assert differs(model(images), tensors["no_prop_attn.out.logits"]) <= OUTPUT[precision]
    bank.merge_tokens(0)
    assert differs(model(images), tensors["out.base_logits"]) <= OUTPUT[precision]


def test_schedules() -> None:
    schedules = {key: value for name, _ in MATCHING for key, value in file(name)[0]["schedules"].items()}
    assert schedules
    for text, wanted in schedules.items():
        depth, r = ast.literal_eval(text)
        settings = TokenMerging(r[0], r[1]) if isinstance(r, tuple) else TokenMerging(r)
        if len(wanted) > depth:  # the public code drops the surplus without a word
            with pytest.raises(ConfigError, match="at most one number per block"):
                settings.schedule(depth)
        else:
            assert list(settings.schedule(depth)) == wanted, text
