"""Acting is apart from training: routes, the declaration, classifiers, tasks and modes."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.layers import set_reentrant_ckpt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vispeft
from tests.conformance.cells import Cell, move
from vispeft.adapters.bank import AdapterBank
from vispeft.core.route import Acting
from vispeft.errors import ConfigError, UnknownNameError, VerificationError
from vispeft.interop.export import export_program

NAMES = ("seg", "depth", "edges")
METHODS = {"seg": vispeft.LoRA(rank=2), "depth": vispeft.SSF(), "edges": vispeft.AdaptFormer(bottleneck=4)}


def adapted(backbone: str = "vit", dtype: torch.dtype = torch.float64) -> tuple[Any, AdapterBank, Tensor]:
    """Make a model with three moved adapters of different methods, of which the last acts."""
    cell = Cell("lora", backbone)
    model, images = cell.model().to(dtype), cell.images().to(dtype)
    for name, method in METHODS.items():
        bank = vispeft.attach(model, method, name=name)
        move(bank, name)
    return model, bank, images


def gradients(bank: AdapterBank) -> dict[str, dict[str, Tensor]]:
    found = {name: {key: p.grad for key, p in bank.named_tensors(name).items()} for name in bank.names}
    return {name: {key: grad.clone() for key, grad in own.items() if grad is not None} for name, own in found.items()}


@pytest.mark.parametrize("backbone", ["vit", "vit_reg_ls", "eva_dinov3", "swin", "swinv2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_one_loss_get_the_gradients_they_get_alone(backbone: str, checkpointing: bool) -> None:
    """At a0bd47e every gradient of the first ones was lost without a word."""
    model, bank, images = adapted(backbone)
    model.set_grad_checkpointing(checkpointing)
    alone = {}
    for name in NAMES:
        bank.set_active(name)
        model.zero_grad()
        model(images).square().sum().backward()
        alone[name] = gradients(bank)[name]
    model.zero_grad()
    bank.set_active([])
    loss = torch.zeros((), dtype=images.dtype)
    for name in NAMES:
        with bank.using(name):
            loss = loss + model(images).square().sum()
    loss.backward()  # outside of every context
    together = gradients(bank)
    for name in NAMES:
        assert together[name].keys() == alone[name].keys() == bank.named_tensors(name).keys()
        for key, grad in alone[name].items():
            assert torch.allclose(together[name][key], grad, rtol=1e-6, atol=1e-12), (name, key)


@pytest.mark.parametrize("method", ["vpt", "vqt", "lst", "convpass"])
@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_own_forwards_recompute_under_their_route(method: str, backbone: str) -> None:
    cell = Cell(method, backbone)
    model, images = cell.model().double(), cell.images().double()
    bank = cell.attach(model)
    move(bank, "default")
    model(images).square().sum().backward()
    wanted = gradients(bank)["default"]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    bank.set_active([])
    with bank.using("default"):
        loss = model(images).square().sum()
    loss.backward()
    found = gradients(bank)["default"]
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=1e-12) for key in wanted)


def test_a_checkpoint_of_ones_own_takes_the_route_along() -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    model(images).square().sum().backward()
    wanted = gradients(bank)["seg"]
    model.zero_grad()
    bank.set_active([])
    with bank.using("seg"):
        out = checkpoint(model, images, use_reentrant=False, context_fn=bank.checkpoint_context)
    loss = out.square().sum()
    loss.backward(retain_graph=True)
    found = gradients(bank)["seg"]
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=1e-12) for key in wanted)


def test_checkpointing_is_of_the_kind_that_keeps_routes_whatever_timm_is_told() -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(True)
    try:
        model(images).square().sum().backward()
    finally:
        set_reentrant_ckpt(False)
    assert set(gradients(bank)["seg"]) == set(bank.named_tensors("seg"))


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_kept_graph_goes_backward_twice_under_checkpointing(backbone: str) -> None:
    """Losses of several tasks are weighed by such gradients; each backward pass computes the blocks again."""
    model, bank, images = adapted(backbone)
    model.set_grad_checkpointing(True)
    bank.set_active([])
    with bank.using("seg"):
        out = model(images).square().sum()
        own = checkpoint(model, images, use_reentrant=False, context_fn=bank.checkpoint_context).square().sum()
    tensors = list(bank.named_tensors("seg").values())
    first = torch.autograd.grad(out, tensors, retain_graph=True)
    for loss in (out, own, own):
        again = torch.autograd.grad(loss, tensors, retain_graph=True)
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(first, again, strict=True))


def test_a_new_classifier_answers_in_all_blocks_around_its_making() -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    compiled = torch.compile(model, backend="eager")
    with bank.using("seg"):
        with bank.using():
            model.reset_classifier(3)
        assert (model.num_classes, model(images).shape[1]) == (3, 3)
    assert model(images).shape[1] == compiled(images).shape[1] == 3


def test_compiled_graphs_follow_the_routes_of_threads_back() -> None:
    """Blocks of two threads may overlap: the first one ends inside the second."""
    _, bank, _ = adapted()
    bank.set_active([])
    began, overlapped, ended = (threading.Event() for _ in range(3))

    def first() -> None:
        with bank.using("seg"):
            began.set()
            overlapped.wait()
        ended.set()

    def second() -> None:
        began.wait()
        with bank.using("depth"):
            overlapped.set()
            ended.wait()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bank._routing.traced.names == ()


def test_names_and_order_are_the_same_under_every_route() -> None:
    model, bank, _ = adapted()
    keys, order = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    heads = [key for key in keys if key.startswith("adapter_heads.") and key.endswith("weight")]
    assert heads == [f"adapter_heads.{name}.weight" for name in NAMES]
    model.train()
    modes = [module.training for module in model.modules()]
    for names in ((), *((name,) for name in NAMES), NAMES, NAMES[::-1]):
        bank.set_active(names)
        for context in (nullcontext(), bank.disabled(), bank.using("depth")):
            with context:
                assert list(model.state_dict()) == keys
                assert [name for name, _ in model.named_parameters()] == order
                assert [p.requires_grad for p in model.parameters()] == flags
                assert [module.training for module in model.modules()] == modes


def test_contexts_nest_and_are_put_back_after_an_error() -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    outputs = {}
    for name in NAMES:
        with bank.using(name):
            outputs[name] = model(images)
    with bank.disabled():
        base = model(images)
    with bank.using("depth"):
        with bank.disabled():
            assert torch.equal(model(images), base)
        with pytest.raises(UnknownNameError), bank.using("edges"):
            bank.using("edge")
        assert torch.equal(model(images), outputs["depth"])
        with bank.using():
            assert bank.active == ["depth"]
    assert bank.active == ["seg"]
    assert torch.equal(model(images), outputs["seg"])


def test_bad_choices_are_refused() -> None:
    _, bank, _ = adapted()
    with pytest.raises(UnknownNameError, match="depth"):
        bank.using("deph")
    with pytest.raises(ConfigError, match="named twice"):
        bank.using("seg", "seg")
    with pytest.raises(UnknownNameError, match="task"):
        bank.using("seg", task="seg")
    with pytest.raises(ConfigError, match="not both"):
        bank.using("seg", rows=["seg", None])
    with pytest.raises(UnknownNameError, match="seg"):
        bank.using(rows=["sge", None])
    with pytest.raises(UnknownNameError, match="depth"):
        bank.freeze("deph")
    with pytest.raises(UnknownNameError, match="depth"):
        bank.unfreeze("deph")
    with pytest.raises(ConfigError, match="one after the other"):
        bank.using(["seg", "depth"])  # type: ignore[arg-type]


def test_a_thread_uses_a_route_alone_and_a_choice_for_good_reaches_all() -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    wanted = {}
    for name in NAMES:
        with bank.using(name):
            wanted[name] = model(images)
    entered, go_on, found = threading.Event(), threading.Event(), {}

    def work() -> None:
        with bank.using("depth"):
            entered.set()
            assert go_on.wait(60)
            found["inside"] = model(images)
        found["outside"] = model(images)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    assert torch.equal(model(images), wanted["seg"])
    bank.set_active("edges")
    go_on.set()
    thread.join(60)
    assert torch.equal(found["inside"], wanted["depth"])
    assert torch.equal(found["outside"], wanted["edges"])


def test_a_forward_pass_keeps_its_route_to_its_end() -> None:
    model, bank, images = adapted()
    bank.set_active("depth")
    wanted = model(images)
    reached, go_on, found = threading.Event(), threading.Event(), {}

    def wait(*_: Any) -> None:
        reached.set()
        assert go_on.wait(60)

    handle = model.blocks[0].register_forward_hook(wait)
    thread = threading.Thread(target=lambda: found.update(out=model(images)))
    thread.start()
    assert reached.wait(60)
    bank.set_active("seg")  # in the middle of the other thread's pass
    go_on.set()
    thread.join(60)
    handle.remove()
    assert torch.equal(found["out"], wanted)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_a_route_of_their_own(duplicate: Any) -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    wanted = model(images)
    with bank.using("depth"):
        other = duplicate(model)
        used = model(images)
    twin = AdapterBank.of(other)
    assert twin is not None
    assert twin is not bank
    assert twin.active == ["seg"]
    assert torch.equal(other(images), wanted)
    twin.set_active("depth")
    assert torch.equal(other(images), used)
    assert torch.equal(model(images), wanted)
    with bank.disabled():
        assert torch.equal(other(images), used)
    with torch.no_grad():
        for _, parameter in twin.trainable_parameters():
            parameter.zero_()
    assert torch.equal(model(images), wanted)


def test_the_classifier_of_the_last_acting_adapter_answers() -> None:
    model = Cell("lora", "swin").model()
    images, own = Cell("lora", "swin").images(), model.num_classes
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="ten")
    model.reset_classifier(10)
    vispeft.attach(model, vispeft.LoRA(rank=2), name="own")
    vispeft.attach(model, vispeft.LoRA(rank=2), name="none")
    bank.put_head("none", None)
    for names, classes in ((["ten"], 10), (["own"], own), (["own", "ten"], 10), (["ten", "own"], own), ([], own)):
        bank.set_active(names)
        assert model.num_classes == classes
        assert model(images).shape == (len(images), classes)
        assert model.get_classifier() is (bank.head(names[-1]) if names else model.get_submodule("head.fc"))
    bank.set_active(["ten", "none"])
    assert model.num_classes == 10
    bank.set_active("none")
    assert model.num_classes == own
    assert bank.head("none") is None
    assert bank.head("ten").out_features == 10
    for name in ("ten", "own", "none"):
        bank.detach(name)
    assert type(model.get_submodule("head.fc")) is nn.Linear
    assert model.num_classes == own


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_a_classifier_put_in_by_hand_is_noticed_and_can_be_given_to_an_adapter(backbone: str, tmp_path: Any) -> None:
    """It answered, was in no optimiser and no file, and the adapter could not be taken off."""
    cell = Cell("lora", backbone)
    model, images = cell.model(), cell.images()
    bank = cell.attach(model)
    path = bank.view.head_path
    parent, _, leaf = path.rpartition(".")
    original, own = model.get_submodule(path), nn.Linear(bank.head().in_features, 9)
    setattr(model.get_submodule(parent), leaf, own)
    for use in (
        bank.trainable_parameters,
        lambda: bank.save(tmp_path),
        bank.merge,
        bank.verify,
        lambda: bank.detach("default"),
        lambda: model.reset_classifier(3),
    ):
        with pytest.raises(ConfigError, match=rf"'{path}' was replaced by hand.*put_head"):
            use()
    bank.put_head("default", own)
    assert bank.head() is own
    assert model.get_submodule(path) is original
    assert {id(own.weight), id(own.bias)} <= {id(tensor) for _, tensor in bank.trainable_parameters()}
    assert model(images).shape == (len(images), 9)
    bank.save(tmp_path)
    other = cell.model()
    vispeft.load(other, tmp_path)
    assert torch.equal(other(images), model(images))
    bank.detach("default")
    assert model.get_submodule(path) is original


def test_adapters_put_on_in_inference_mode_can_train(tmp_path: Any) -> None:
    cell = Cell("lora_2bit", "vit")
    cell.attach(cell.model()).save(tmp_path)
    model, images = cell.model(), cell.images()
    with torch.inference_mode():
        wanted = model(images)
        served = Cell("lora_2bit", "vit").model().to(torch.float64).float()  # a base made in it serves as well
        assert next(served.parameters()).is_inference()
        with vispeft.load(served, tmp_path).disabled():
            assert torch.equal(served(images), wanted)
        bank = vispeft.load(model, tmp_path)
        assert torch.equal(served(images), model(images))
        bank = vispeft.attach(model, vispeft.SSF(), name="fresh")
        assert torch.is_inference_mode_enabled()
        model(images)
    bank.set_active(["default", "fresh"])
    model.train()(images).square().sum().backward()
    assert not any(tensor.is_inference() for _, tensor in bank.trainable_parameters())
    for name in bank.names:
        assert any(tensor.grad is not None for tensor in bank.named_tensors(name).values())


def test_a_new_classifier_answers_in_every_block_around() -> None:
    """The route of an outer block kept the replaced classifier."""
    model, bank, images = adapted()
    with bank.using("seg"):
        with bank.using("seg", "depth"), bank.using("seg"):
            model.reset_classifier(9)
            assert model(images).shape == (len(images), 9)
        assert model.num_classes == 9
        assert model(images).shape == (len(images), 9)
        assert model.get_classifier() is bank.head("seg")
    assert model(images).shape == (len(images), 5)


def test_a_state_dict_of_the_old_names_loads() -> None:
    """Up to a0bd47e the acting adapter's classifier stood at timm's place, and the base's waited as ``(base)``."""
    model, bank, images = adapted(dtype=torch.float32)
    bank.set_active("seg")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wanted = model(images)
    old = {key: t for key, t in state.items() if not key.startswith(("head.", "adapter_heads.seg."))}
    for leaf in ("weight", "bias"):
        old[f"head.{leaf}"] = state[f"adapter_heads.seg.{leaf}"]
        old[f"adapter_heads.(base).{leaf}"] = state[f"head.{leaf}"]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    outer = nn.ModuleDict({"model": model})
    outer.load_state_dict({f"model.{key}": tensor for key, tensor in old.items()})
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(images), wanted)


def test_a_frozen_adapter_acts_and_does_not_train() -> None:
    model, bank, images = adapted(dtype=torch.float32)
    bank.set_active(["seg", "depth"])
    groups = bank.parameter_groups(1e-1, 0.5)
    optimizer = torch.optim.AdamW(groups)
    for _ in range(2):
        model(images).square().sum().backward()
        optimizer.step()
    bank.freeze("seg")
    before = {key: tensor.clone() for key, tensor in bank.state_dict("seg").items()}
    other = {key: tensor.clone() for key, tensor in bank.state_dict("depth").items()}
    state = len(optimizer.state)
    model(images).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in bank.state_dict("seg").items())
    assert any(not torch.equal(tensor, other[key]) for key, tensor in bank.state_dict("depth").items())
    assert len(optimizer.state) == state
    assert bank.frozen == ["seg"]
    own = {id(p) for p in bank.named_tensors("seg").values()}
    assert not own & {id(p) for _, p in bank.trainable_parameters()}
    model.train()
    assert not any(unit.training for unit in bank._entries["seg"].units.values())
    assert all(unit.training for unit in bank._entries["depth"].units.values())
    bank.unfreeze("seg")
    assert all(unit.training for unit in bank._entries["seg"].units.values())
    assert all(p.requires_grad for p in bank.named_tensors("seg").values())


def test_the_declaration_is_in_the_order_of_attaching_and_whatever_a_step_switches() -> None:
    _, bank, _ = adapted()
    listed = [name for name, _ in bank.trainable_parameters()]
    owner = [next(label for label in NAMES if f".{label}." in name) for name in listed]
    assert owner == sorted(owner, key=NAMES.index)
    for parameter in bank.named_tensors("seg").values():
        parameter.requires_grad_(False)  # one step of layer sampling
    bank.set_active([])
    assert [name for name, _ in bank.trainable_parameters()] == listed
    bank.verify()  # switches them on for a moment, and off again
    assert not any(p.requires_grad for p in bank.named_tensors("seg").values())


def test_verify_runs_each_adapter_under_its_own_route() -> None:
    model, bank, images = adapted()
    bank.set_active("seg")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    bank.verify()
    assert bank.active == ["seg"]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    host = bank._entries["depth"].placed[0].host
    unit = next(iter(host.adapters["depth"].values()))
    unit.register_parameter("idle", nn.Parameter(torch.zeros(2, dtype=images.dtype)))
    with pytest.raises(VerificationError, match="idle"):
        bank.verify()
    bank.freeze("depth")
    bank.verify()


def test_drop_path_is_the_largest_rate_of_the_acting_adapters() -> None:
    model = Cell("lora", "vit").model()
    images = Cell("lora", "vit").images().repeat(8, 1, 1, 1)
    for name, rate in (("small", 0.1), ("large", 0.9), ("none", 0.0)):
        bank = vispeft.attach(model, vispeft.SSF(drop_path=rate), name=name)
    modules = list(model.modules())
    host = model.blocks[-1].drop_path1

    def dropped(names: list[str]) -> float:
        bank.set_active(names)
        torch.manual_seed(0)
        ones = torch.ones(2000, 1, 1)
        return float((host(ones) == 0).double().mean())

    model.train()
    assert dropped(["small"]) == pytest.approx(0.1, abs=0.03)
    assert dropped(["small", "large"]) == pytest.approx(0.9, abs=0.03)
    assert dropped(["none"]) == 0.0
    assert dropped([]) == 0.0
    bank.set_active("large")
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert dropped(["large"]) == 0.0
    assert list(model.modules()) == modules


def test_one_copy_of_the_units_per_task(tmp_path: Any) -> None:
    cell = Cell("lora", "vit")
    model, images = cell.model(), cell.images()
    bank = vispeft.attach(model, vispeft.LoRA(rank=2), name="tasks", tasks=["seg", "depth"])
    single = vispeft.LoRA(rank=2).parameter_count(bank.view)
    assert bank.report("tasks").trainable == 2 * single
    assert bank.tasks("tasks") == ["seg", "depth"]
    move(bank, "tasks")
    with pytest.raises(ConfigError, match=r"has tasks \(seg, depth\), and none was chosen"):
        model(images)
    with pytest.raises(UnknownNameError, match="depth"):
        bank.using("tasks", task="deph")
    outputs = {}
    loss = torch.zeros(())
    for task in ("seg", "depth"):
        with bank.using(task=task):
            assert bank.task == task
            outputs[task] = model(images)
            loss = loss + outputs[task].square().sum()
            with bank.using("tasks"):
                assert bank.task is None
    assert not torch.allclose(outputs["seg"], outputs["depth"])
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in bank.named_tensors("tasks").values())
    bank.save(tmp_path / "tasks", "tasks")
    fresh = cell.model()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "adapter" not in k})
    again = vispeft.load(fresh, tmp_path / "tasks")
    for task in ("seg", "depth"):
        with again.using(task=task):
            assert torch.equal(fresh(images), outputs[task])
    again.set_active("default", task="seg")
    again.merge()
    assert torch.allclose(fresh(images), outputs["seg"], atol=1e-5)
    again.unmerge()
    assert torch.equal(fresh(images), outputs["seg"])


@pytest.mark.parametrize("tasks", [[], "seg", ["seg", "seg"], ["a b"], [1]])
def test_bad_tasks_are_refused(tasks: Any) -> None:
    model = Cell("lora", "vit").model()
    with pytest.raises(ConfigError, match="list of different names"):
        vispeft.attach(model, vispeft.LoRA(rank=2), tasks=tasks)
    assert AdapterBank.of(model) is None


def test_a_compiled_model_follows_a_choice_that_another_thread_made_meanwhile() -> None:
    """At the end of a block, compiled graphs went back to the choice from before the block."""
    model, bank, images = adapted()
    bank.set_active("seg")
    compiled = torch.compile(model, backend="eager")
    with bank.using("edges"):
        thread = threading.Thread(target=bank.set_active, args=("depth",))
        thread.start()
        thread.join(60)
    assert torch.equal(compiled(images), model(images))


def test_a_compiled_model_follows_the_route() -> None:
    model, bank, images = adapted(dtype=torch.float32)
    bank.set_active("seg")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name in ("seg", "depth"):
        with bank.using(name), torch.no_grad():
            assert torch.allclose(compiled(images), model(images), atol=1e-5)
    bank.set_active("depth")
    with torch.no_grad():
        assert torch.allclose(compiled(images), model(images), atol=1e-5)


def test_an_export_freezes_the_present_route_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, bank, images = adapted(dtype=torch.float32)
    bank.set_active([])
    with bank.using("edges"), caplog.at_level("INFO"):
        program = export_program(model.eval(), images)
        wanted = model(images)
    assert "holds the adapters that act now: edges." in caplog.text
    bank.set_active("depth")
    assert torch.allclose(program.module()(images), wanted, atol=1e-5)


def test_units_of_a_host_are_those_of_all_kinds_and_nothing_else():
    kinds = Acting._fields[: Acting._fields.index("carries")]
    assert kinds[-1] == "depth", "a new kind of unit comes before the other fields"
    assert list(Acting(carries=True, routed=True).units()) == []
    assert list(Acting(**{kind: (kind,) for kind in kinds}).units()) == list(kinds)
