"""Single layers and rules of reference part E against the project's units and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vispeft
from tests.parity.test_deltas import BY_STEM, assert_close, site, tolerance
from tests.parity.test_parity import PRECISIONS, below, read
from vispeft.core.units import LayerPass, WeightUnit
from vispeft.hosts.low_rank import low_rank_linear
from vispeft.methods.ditask import WarpTask, WarpUnit, warp
from vispeft.methods.mask import MaskUnit, dropped_gradient
from vispeft.methods.mos import MoSPool, MoSUnit, _Place
from vispeft.methods.pst import PSTUnit, _Shape, cubic
from vispeft.methods.snell import SNELLUnit
from vispeft.methods.sparse import SparseUnit, largest_entries, principal_weights
from vispeft.methods.sparse_schedules import SM3, DropAndRegrow, Samples, SparseAdamW, best_inactive, largest_changes
from vispeft.methods.svfit import SVFitUnit, rank_for_energy

Tensors = dict[str, Tensor]


def cases(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensors]:
    """Sort the tensors of a file by case, whose name may stand in the middle of theirs."""
    found: dict[str, Tensors] = {case: {} for case in meta["config"]}
    for key, tensor in tensors.items():
        case = next(case for case in found if f"{case}." in f"{key}.")
        found[case][key.replace(f"{case}.", "", 1)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


def check_layer(unit: WeightUnit, case: Tensors, names: dict[str, str], limit: float) -> None:
    """Compare the output, all gradients and the merged weight of a layer whose weight a unit changes."""
    x = case["input.x"].clone().requires_grad_()
    out = F.linear(x, unit.fold_weight(case["weight"]), case["bias"])
    assert_close("y", out, case["out.y"], limit)
    (out * case["input.w"]).sum().backward()
    found: dict[str, Tensor | None] = {f"adapter.{names[k]}": p.grad for k, p in unit.named_parameters()}
    wanted = below(case, "grad.")
    found = {**found, "input.x": x.grad}
    assert set(found) == {name for name in wanted if not name.startswith("norm_penalty")}
    for name, grad in found.items():
        assert grad is not None
        assert_close(f"grad.{name}", grad, wanted[name], limit)
    if "merged.weight" in case:
        assert_close("merged", unit.fold_weight(case["weight"]), case["merged.weight"], limit)


def svfit(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    for name, case in cases(meta, tensors, dtype).items():
        weight, config = case["weight"], meta["config"][name]
        unit = SVFitUnit(site(name, *weight.shape), config["r_used"]).to(dtype)
        unit.prepare(weight)
        for share, rank in config["rank_for_energy"].items():
            assert rank_for_energy(weight, float(share)) == rank
        values = torch.linalg.svdvals(weight.double())
        assert_close("singular values", values, case["mid.singular_values"], limit)
        with torch.no_grad():
            unit.shift.copy_(case["adapter.sigma"].double() - values[: config["r_used"]])
            assert_close("delta", unit.fold_weight(weight) - weight, case["mid.delta"], limit)
        check_layer(unit, case, {"shift": "sigma"}, limit)


def mask(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    case = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    unit = MaskUnit(site("layer", *case["weight"].shape)).to(dtype)
    with torch.no_grad():
        unit.M.copy_(case["adapter.mask_real"])
    assert torch.equal(unit.mask, case["mid.mask"])
    check_layer(unit, case, {"M": "mask_real"}, limit)
    unit.M.grad = None
    norm = unit.M.norm()
    assert_close("norm_penalty", norm, case["out.norm_penalty"], limit)
    norm.backward()
    assert_close("norm_penalty gradient", unit.M.grad, case["grad.norm_penalty.mask_real"], limit)
    packed = numpy.packbits(unit.file_tensors()["M"].bool().numpy())
    assert torch.equal(torch.from_numpy(packed), case["out.packed_bits"])


def gradient_dropout(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    given = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    units = [MaskUnit(site("layer", *given[f"weight.{i}"].shape)).to(dtype) for i in range(2)]
    for i, unit in enumerate(units):
        with torch.no_grad():
            unit.M.copy_(given[f"adapter.mask_real.{i}"])
    hidden = F.linear(given["input.x"], units[0].fold_weight(given["weight.0"]), given["bias.0"]).relu()
    logits = F.linear(hidden, units[1].fold_weight(given["weight.1"]), given["bias.1"])
    ce = F.cross_entropy(logits, given["input.labels"].long())
    teacher = F.cross_entropy(logits, given["input.teacher_logits"].softmax(1))
    penalty = sum(unit.M.norm() for unit in units)
    for name, value in (("logits", logits), ("ce", ce), ("teacher_loss", teacher), ("norm_penalty", penalty)):
        assert_close(name, value, given[f"out.{name}"], limit)
    masks = [unit.M for unit in units]
    others = torch.autograd.grad(teacher, masks, retain_graph=True)
    for kind, loss in (("plain", ce), ("penalty", ce + meta["config"]["loss_weight"] * penalty)):
        for i, (own, other) in enumerate(zip(torch.autograd.grad(loss, masks, retain_graph=True), others, strict=True)):
            assert_close("a", own, given[f"mid.{kind}.a.{i}"], limit)
            assert_close("b", other, given[f"mid.b.{i}"], limit)
            for share in meta["config"]["lam"]:
                used = dropped_gradient(own, other, share, given[f"input.U.{i}"])
                assert_close("used", used, given[f"grad.used.{kind}.lam{share:g}.{i}"], limit)


def lift_mask(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    for name, case in cases(meta, tensors, dtype).items():
        config, weight = meta["config"][name], case["weight"]
        scores = principal_weights(weight, config["q"])
        assert_close("approximation", scores, case["mid.approximation"].abs(), limit)
        found = largest_entries(scores, config["k"])
        assert torch.equal(found, case["out.indices"].sort().values.long())
        flags = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, found, True)
        assert torch.equal(flags.view(weight.shape), case["out.mask"].bool())


RULES: dict[str, Callable[..., None]] = {
    "svfit_linear": svfit,
    "mask_linear": mask,
    "mask_gradient_dropout": gradient_dropout,
    "sparse_lift_mask": lift_mask,
}


def sft_cycle(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    """Ten steps of two layers with two reselections, at the steps and with the samples of the public phase counter."""
    config, t = meta["config"], {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    shapes = {"0": (20, 12), "2": (10, 20)}
    units = {n: SparseUnit(site(n, *shape), config["k"][n], "random", 1).to(dtype) for n, shape in shapes.items()}
    for n, unit in units.items():
        unit.values.data.copy_(t[f"adapter.values.{n}"])
        unit.positions.copy_(t[f"before.indices.{n}"])
    optimizer = SparseAdamW(
        [unit.values for unit in units.values()],
        **{key: config[key] for key in ("lr", "betas", "eps", "weight_decay")},
    )
    rule = DropAndRegrow(1, 1, config["initial_reselection_rate"], config["reselection_rate_policy"])
    first = 1
    for number, event in enumerate([*config["events"], {"after_step": config["steps"], "samples": 0}], 1):
        samples = {n: Samples(config["k"][n]) for n in units}
        for step in range(first, event["after_step"] + 1):
            watched = step > event["after_step"] - event["samples"]
            for n, unit in units.items():
                unit.observer = samples[n].add if watched else None
            hidden = F.linear(t[f"input.x.{step}.0"], units["0"].fold_weight(t["weight.0"]), t["bias.0"]).tanh()
            out = F.linear(hidden, units["2"].fold_weight(t["weight.2"]), t["bias.2"])
            assert_close("y", out, t[f"out.y.{step}.0"], limit)
            optimizer.zero_grad()
            (out * t[f"input.w.{step}.0"]).sum().backward()
            for n, unit in units.items():
                assert_close(f"step{step}.grad", unit.values.grad, t[f"step{step}.grad_values.{n}"], limit)
            optimizer.step()
            for n, unit in units.items():
                samples[n].close()
                assert_close(f"step{step}.values", unit.values, t[f"step{step}.values.{n}"], limit)
        first = event["after_step"] + 1
        if "p" not in event:
            break
        rule.steps, rule.rounds = event["after_step"], number - 1
        assert rule.share(config["total_steps"]) == pytest.approx(event["p"])
        for n, unit in units.items():
            check_reselection(unit, samples[n], optimizer, rule, below(t, f"reselect{number}."), n, limit)


def check_reselection(
    unit: SparseUnit, samples: Samples, optimizer: Any, rule: DropAndRegrow, wanted: Tensors, n: str, limit: float
) -> None:
    assert torch.equal(samples.candidates.sort().values, wanted[f"candidates.{n}"].long())
    assert samples.samples == int(wanted[f"samples.{n}"][0])
    before = unit.positions.clone()
    rule._reselect(unit, samples, optimizer, rule.share(30))
    changed = before != unit.positions
    assert torch.equal(before[changed].sort().values, wanted[f"dropped.{n}"])
    assert torch.equal(unit.positions[changed].sort().values, wanted[f"grown.{n}"])
    state = optimizer.state[unit.values]
    found = {"values": unit.values, "age": state["age"], **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
    order, theirs = unit.positions.argsort(), wanted[f"after.indices.{n}"].argsort()
    assert torch.equal(unit.positions[order], wanted[f"after.indices.{n}"][theirs])
    for name, value in found.items():
        assert_close(f"after.{name}", value[order], wanted[f"after.{name}.{n}"][theirs], limit)
    # Go on in the authors' order of slots, which later steps are stored in.
    slots = torch.searchsorted(unit.positions[order].contiguous(), wanted[f"after.indices.{n}"])
    with torch.no_grad():
        for tensor in (unit.values, unit.positions, *state.values()):
            tensor.copy_(tensor[order][slots])


def sm3(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    config, t = meta["config"], {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    values, positions = torch.nn.Parameter(t["adapter.values"].clone()), t["before.indices"]
    optimizer = SM3([values], config["lr"], config["eps"], config["weight_decay"])
    optimizer.bind(values, positions, config["out_features"], config["in_features"])
    for step in range(1, config["steps"] + 1):
        values.grad = t[f"input.grad.{step}"]
        optimizer.step()
        found = {"values": values, "row": optimizer.state[values]["row"], "col": optimizer.state[values]["column"]}
        for name, value in found.items():
            assert_close(f"step{step}.{name}", value, t[f"step{step}.{name}"], limit)
    growth = best_inactive(positions, values, found["row"], found["col"], config["p"])
    assert torch.equal(positions[growth.slots].sort().values, t["reselect.dropped"])
    assert torch.equal(growth.positions.sort().values, t["reselect.grown"].long())


def lottery(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    after, masks = below(tensors, "input.tuned0."), below(tensors, "out.mask0.")
    before = {name: below(tensors, "backbone.")[name] for name in masks}
    found = largest_changes(before, after, meta["config"]["k"])
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    for name, values in below(tensors, "out.file.").items():
        if not name.endswith(".values"):
            continue
        path = name.removesuffix(".values")
        entries = tensors[f"out.file.{path}.index_steps"].long().cumsum(0)
        # Their flat index runs along the first dimension first.
        change = torch.where(masks[path], after[path] - before[path], 0.0)
        flat = change.permute(*reversed(range(change.ndim))).flatten()
        assert torch.equal(flat[entries], values)
        assert int((flat.abs() > 1e-7).sum()) == len(entries)


SCHEDULES = {"sparse_sft_cycle": sft_cycle, "sparse_sft_sm3": sm3, "sparse_lt_sft": lottery}


@pytest.mark.parametrize("stem", [stem for stem in SCHEDULES if stem in BY_STEM])
def test_schedules(stem: str) -> None:
    """In float64 alone: wrong variants of an optimiser may differ by 5e-6."""
    meta, tensors = read(BY_STEM[stem])
    SCHEDULES[stem](meta, tensors, torch.float64, tolerance(meta, "float64"))


def pst(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    names = {"U": "weight_U", "V": "weight_V", **{n: f"mask_scores_{n}" for n in "ABRC"}}
    for name, case in cases(meta, tensors, dtype).items():
        config = meta["config"][name]
        scales = tuple(config[key] for key in ("beta", "alpha1", "alpha2"))
        shape = _Shape(config["weight_rank"], config["mask_rank"], scales, "normal")
        unit = PSTUnit(site(name, *case["weight"].shape), shape).to(dtype)
        with torch.no_grad():
            for ours, theirs in names.items():
                unit.get_parameter(ours).copy_(case[f"adapter.{theirs}"])
            unit.pruned.fill_(int(config["sparsity"] * unit.size))
            assert int(unit.pruned) == config["pruned"]
            scores = unit.scores(unit.changed(case["weight"]))
            assert_close("scores", scores, case["mid.scores"], limit)
            assert torch.equal(unit.mask(scores), case["out.mask"].bool())
        check_layer(unit, case, names, limit)


def pst_schedule(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    for name, config in meta["config"].items():
        total = config["total_steps"]
        ends, shares = ([config[f"{when}_{what}"] for when in ("initial", "final")] for what in ("sparsity", "warmup"))
        found = torch.tensor([cubic(step, total, tuple(ends), tuple(shares)) for step in range(total + 1)], dtype=dtype)
        assert_close(name, found, tensors[f"out.{name}.sparsity"], limit)


def mos(meta: dict[str, Any], tensors: Tensors, dtype: torch.dtype, limit: float) -> None:
    config, t = meta["config"], {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    place = site("layer", config["out_features"], config["in_features"])
    method = vispeft.MoS(
        rank=config["r"],
        equivalent=config["equivalent_rank"],
        private=config["private_rank"],
        shards=config["shards_per_vector"],
        alpha=float(config["alpha"]),
    )
    pool = MoSPool(len(t["adapter.pool_A"]), method.shards, place).to(dtype)
    assert_close("bound", torch.tensor(pool.bound), t["out.init_bound_of_A"], 1e-6)
    with torch.no_grad():
        pool.A.copy_(t["adapter.pool_A"])
        pool.B.copy_(t["adapter.pool_B"])
    public = (method.equivalent - method.private) * config["blocks"] * method.shards
    loss = torch.zeros((), dtype=dtype)
    for k in range(config["blocks"]):
        unit = MoSUnit(place, _Place(method.rank, method.private, method.shards, public, k), config["scale"], 0.0)
        unit.borrow(pool)
        unit.reset(torch.Generator().manual_seed(k))
        for rows, name in ((unit.rows_a, "A"), (unit.rows_b, "B")):
            # Private rows are in one order; public ones are a draw without replacement.
            own = method.private * method.shards
            wanted = t[f"adapter.index_{name}.{k}"]
            assert torch.equal(rows[len(rows) - own :].long(), wanted[len(rows) - own :].long())
            assert len(rows.unique()) == len(rows)
            rows.copy_(wanted)
        a, b = unit.factors()
        assert_close("A", a, t[f"mid.A.{k}"], limit)
        assert_close("B", b, t[f"mid.B.{k}"], limit)
        out = low_rank_linear(t[f"input.x.{k}"], t[f"weight.{k}"], t[f"bias.{k}"], unit.branches())
        assert_close("y", out, t[f"out.y.{k}"], limit)
        loss = loss + (out * t[f"input.w.{k}"]).sum()
    loss.backward()
    assert_close("grad A", pool.A.grad, t["grad.adapter.pool_A"], limit)
    assert_close("grad B", pool.B.grad, t["grad.adapter.pool_B"], limit)


RULES |= {"pst_linear": pst, "pst_schedule": pst_schedule, "mos_linear": mos, "mos_linear_noprivate": mos}


@pytest.mark.parametrize("dtype", list(PRECISIONS), ids=list(PRECISIONS.values()))
@pytest.mark.parametrize("stem", [stem for stem in RULES if stem in BY_STEM])
def test_rules(stem: str, dtype: torch.dtype) -> None:
    meta, tensors = read(BY_STEM[stem])
    RULES[stem](meta, tensors, dtype, tolerance(meta, PRECISIONS[dtype]))


def snell(case: dict[str, Any], t: Tensors, limits: tuple[float, float]) -> None:
    variant = "snella" if "adapter.alpha" in t else "snell"
    method = vispeft.SNELL(
        dim=case["q_dim"], threshold=case.get("init_thres", 0.0), variant=variant, norm=case.get("norm_p", 2)
    )
    unit = SNELLUnit(site("layer", case["out_features"], case["in_features"]), method).to(t["input.x"].dtype)
    names = {"inputs": "In_Qs", "outputs": "Out_Qs", **{n: n for n in ("alpha", "beta", "gamma")}}
    with torch.no_grad():
        for ours, tensor in unit.named_parameters():
            tensor.copy_(t[f"adapter.{names[ours]}"])
        assert_close("dense", unit.dense(), t["out.dense_delta"], limits[0])
    x = t["input.x"].requires_grad_()
    delta = unit.fold_weight(torch.zeros_like(t["out.delta"]))
    assert int((delta != 0).sum()) == case["kept"]
    assert_close("delta", delta, t["out.delta"], limits[0])
    out = F.linear(x, delta)
    assert_close("y", out, t["out.y"], limits[0])
    (out * t["input.w"]).sum().backward()
    assert_close("grad x", x.grad, t["grad.input.x"], limits[1])
    wanted = below(t, "grad.adapter.")
    assert set(wanted) == {names[ours] for ours, _ in unit.named_parameters()}
    for ours, tensor in unit.named_parameters():
        assert_close(ours, tensor.grad, wanted[names[ours]], limits[1])


def ditask_layer(case: dict[str, Any], t: Tensors, limits: tuple[float, float]) -> None:
    cells, dtype = case["cells"], t["input.x"].dtype
    place = site("layer", case["out_features"], case["in_features"])
    unit = WarpUnit(place, cells["shared"], "uniform").to(dtype)
    unit.prepare(t["weight"])
    assert unit.parts == case["blocks"]
    unit.theta.data.copy_(t["adapter.lora_shared_A"][0])
    leaves, x = {"lora_shared_A": unit.theta}, t["input.x"].requires_grad_()
    inputs = {name: tensor.requires_grad_() for name, tensor in below(t, "input.x_tasks.").items()}
    weight = unit.fold_weight(t["weight"])
    assert_close("weight", weight, t["out.weight_shared"], limits[0])
    assert_close("values", unit.moved(unit.theta)[0], t["mid.singular_new"], limits[0])
    bias = t.get("bias")  # patch merging has none
    shared = F.linear(x, weight, bias)
    outputs = {"shared": shared}
    for task in case["tasks"] or ():
        own = WarpTask(cells[task], "uniform", task, bias).to(dtype)
        own.borrow(unit)
        own.theta.data.copy_(t[f"adapter.lora_tasks_A.{task}"][0])
        leaves[f"lora_tasks_A.{task}"] = own.theta
        outputs[f"task.{task}"] = own.branches(LayerPass(x, inputs, shared, shared))[task]
    loss = torch.zeros((), dtype=dtype)
    for name, out in outputs.items():
        assert_close(name, out, t[f"out.{name}"], limits[0])
        loss = loss + (out * t[f"input.w.{name}"]).sum()
    loss.backward()
    if dtype == torch.float32:
        return  # gradients of the maps are badly conditioned in float32 (README-F)
    wanted = below(t, "grad.")
    found = {**{f"adapter.{n}": leaf.grad[None] for n, leaf in leaves.items()}, "input.x": x.grad}
    found |= {f"input.x_tasks.{name}": tensor.grad for name, tensor in inputs.items()}
    assert set(wanted) == set(found)
    for name, grad in found.items():
        assert_close(f"grad.{name}", grad, wanted[name], limits[1])


FLOAT64, FLOAT32 = (1e-10, 1e-9), (2e-5, 1e-4)
"""Limits of outputs and gradients, relative to a tensor's largest entry (README-F, "Tolerances")."""
SINGLE = {"snell_linear": (snell, FLOAT64, FLOAT32), "ditask_linear": (ditask_layer, (1e-10, 1e-7), (1e-4, 0.0))}


@pytest.mark.parametrize("dtype", list(PRECISIONS), ids=list(PRECISIONS.values()))
@pytest.mark.parametrize("stem", [stem for stem in SINGLE if stem in BY_STEM])
def test_layers_in_several_cases(stem: str, dtype: torch.dtype) -> None:
    meta, tensors = read(BY_STEM[stem])
    check, wide, narrow = SINGLE[stem]
    for name, case in meta["cases"].items():
        own = below(tensors, f"{name}.")
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in own.items()}
        check(case, given, wide if dtype == torch.float64 else narrow)


@pytest.mark.parametrize("cells", [2, 5, 16, 64])
def test_warps(cells: int) -> None:
    if "ditask_cpab" not in BY_STEM:
        pytest.skip("the folder of reference files has none of the warp")
    t = below(read(BY_STEM["ditask_cpab"])[1], f"cells{cells}.")
    theta = t["adapter.theta"][0].double().requires_grad_()
    grid = torch.linspace(0, 1, t["out.warped_grid"].shape[1], dtype=torch.float64)
    moved = warp(theta, grid)
    (moved * t["input.w"][0].double()).sum().backward()
    assert_close("grid", moved, t["out.warped_grid"][0], 1e-10)
    assert_close("grad", theta.grad, t["grad.adapter.theta"][0], 1e-7)
    assert (moved.diff() > 0).all()
    still = torch.zeros(cells - 1, dtype=torch.float64, requires_grad=True)
    out = warp(still, grid)
    assert torch.equal(out, grid)
    # At the identity the map moves by its velocity, whose derivatives are the columns of the basis.
    jacobian = torch.autograd.functional.jacobian(lambda x: warp(x, grid), still)
    assert torch.allclose(jacobian @ theta.detach(), t["out.velocity"][0], atol=1e-12)
