"""The bridge to Hugging Face peft: outputs and gradients equal peft's own, files go both ways."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import timm
import torch
from torch import nn

import vispeft
from vispeft.errors import ConfigError, FileError, SiteError, VispeftError

peft = pytest.importorskip("peft")

from vispeft.interop.peft import LOCAL, PeftMethod, from_peft, to_peft  # noqa: E402

LAYERS = r".*(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)$"
TARGETS = {"target_modules": LAYERS}
CONFIGS = {
    "LORA": {"r": 4, "lora_alpha": 8},
    "LORA dora": {"r": 4, "use_dora": True},
    "LORA patterns": {"r": 4, "rank_pattern": {"blocks.1.attn.qkv": 2}, "alpha_pattern": {"mlp.fc1": 16}},
    "LOHA": {"r": 3},
    "LOKR": {"r": 3},
    "OFT": {"r": 0, "oft_block_size": 8},
    "BOFT": {"boft_block_size": 8},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": r".*mlp\.fc2$"},
    "MISS": {"r": 8},
    "MISS bat": {"r": 8, "init_weights": "bat"},
    "FOURIERFT": {"n_frequency": 50},
    "C3A": {"block_size": 8},
    "HIRA": {"r": 4},
    "DELORA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
}


def config_of(case):
    return peft.get_peft_config({"peft_type": case.partition(" ")[0], **TARGETS, **CONFIGS[case]})


def vit():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size).eval()


def swin():
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 5}
    return timm.create_model("swin_tiny_patch4_window7_224", **size).eval()


MODELS = {"vit": vit, "swin": swin}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def move(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad and "head" not in name:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)


def test_all_tuners_that_are_offered_are_tested():
    assert {case.partition(" ")[0] for case in CONFIGS} == set(LOCAL)


ON_SWIN = ("LORA", "LORA dora", "OFT", "IA3", "MISS")


@pytest.mark.parametrize(("case", "backbone"), [*((c, "vit") for c in CONFIGS), *((c, "swin") for c in ON_SWIN)])
def test_a_tuner_computes_what_peft_computes(case, backbone, tmp_path):
    config = config_of(case)
    theirs = peft.inject_adapter_in_model(copy.deepcopy(config), MODELS[backbone]()).eval()
    base = MODELS[backbone]()
    ours = copy.deepcopy(base)
    frozen = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    bank = vispeft.attach(ours, PeftMethod(config=config))  # verifies that every tensor gets a gradient
    assert bank.report().trainable == bank.plan().method.parameter_count(bank.view) == bank.plan().trainable
    move(ours)
    state = {name.replace("/peft.tuner.", "."): t for name, t in bank.named_tensors().items()}
    adapter = {n: p for n, p in theirs.named_parameters() if p.requires_grad and not n.startswith("head.")}
    assert {name for name in state if not name.startswith("head/")} == set(adapter)
    with torch.no_grad():
        for name, tensor in adapter.items():
            tensor.copy_(state[name])
    mine, wanted = ours(IMAGES), theirs(IMAGES)
    assert (mine - base(IMAGES)).abs().max() > 1e-3
    assert (mine - wanted).abs().max() <= 2e-6
    mine.square().sum().backward()
    wanted.square().sum().backward()
    for name, tensor in adapter.items():
        scale = tensor.grad.abs().max()
        assert (state[name].grad - tensor.grad).abs().max() <= 1e-4 * scale, name
    bank.save(tmp_path)
    again = copy.deepcopy(base)
    vispeft.load(again, tmp_path)
    assert torch.equal(again(IMAGES), ours(IMAGES))
    assert torch.equal(copy.deepcopy(ours)(IMAGES), ours(IMAGES))
    before = ours(IMAGES)
    bank.merge()
    assert (ours(IMAGES) - before).abs().max() <= 1e-4 * before.abs().max()
    bank.unmerge()
    bank.detach("default")
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in ours.state_dict().items())


def test_roles_choose_layers_and_seeds_decide_the_start(tmp_path):
    method = PeftMethod(config=peft.LoraConfig(r=2), roles=("attn.qkv",), blocks=(1,))
    starts = []
    for seed in (5, 5, 6):
        model = vit()
        torch.manual_seed(seed)
        bank = vispeft.attach(model, method)
        assert [item.site.path for item in bank.plan()] == ["blocks.1.attn.qkv"]
        starts.append(bank.state_dict()["blocks.1.attn.qkv/peft.tuner.lora_A.default.weight"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert vispeft.method("peft", **json.loads(json.dumps(method.to_dict()["fields"]))) == method


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lambda: peft.VeraConfig(**TARGETS), "shares tensors between layers"),
        (lambda: peft.AdaLoraConfig(total_step=10, **TARGETS), "every training step"),
        (lambda: peft.PromptTuningConfig(num_virtual_tokens=3), "vispeft.VPT"),
        (lambda: peft.LoraConfig(init_lora_weights="pissa", **TARGETS), "start='pissa'"),
        (lambda: peft.LoraConfig(bias="all", **TARGETS), "trains the base in place"),
        (lambda: peft.LoraConfig(modules_to_save=["head"], **TARGETS), "classifier belongs to the adapter"),
        (lambda: {"peft_type": "LORRA"}, "peft does not take it"),
    ],
)
def test_what_is_broken_is_refused(config, told):
    with pytest.raises(ConfigError, match=told):
        PeftMethod(config=config())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 10**6}, r"r=1000000 is above the \d+ features"),
        ({"r": 2, "rank_pattern": {"mlp.fc1": 10**6}}, "mlp.fc1=1000000 is above"),
        ({"r": 2, "target_modules": "((("}, "no regular expression"),
    ],
)
def test_sizes_and_patterns_that_cannot_be_are_refused_at_once(fields, says):
    with pytest.raises(ConfigError, match=says):
        vispeft.attach(vit(), PeftMethod(config={"peft_type": "LORA", **TARGETS, **fields}))


def test_layers_that_would_not_train_are_refused():
    with pytest.raises(SiteError, match=r"write 'attn\.proj'"):
        vispeft.attach(vit(), PeftMethod(config=peft.OFTConfig(r=0, oft_block_size=8, target_modules=["proj"])))
    with pytest.raises(SiteError, match="matches no linear layer"):
        vispeft.attach(vit(), PeftMethod(config=peft.LoraConfig(target_modules=["q_proj"])))
    size = {"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    swinv2 = timm.create_model("swinv2_tiny_window8_256", **size)
    with pytest.raises(SiteError, match="reads the weight"):
        vispeft.attach(swinv2, PeftMethod(roles=("attn.qkv",)))


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 6},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"mlp.fc1": 2}, "alpha_pattern": {"fc2": 1}},
    ],
    ids=str,
)
def test_a_saved_lora_of_peft_is_read(options, backbone, tmp_path):
    base = MODELS[backbone]()
    head = "head" if backbone == "vit" else "head.fc"
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, modules_to_save=[head], **TARGETS, **options)
    )
    move(wrapped)
    with torch.no_grad():
        for name, tensor in wrapped.named_parameters():
            if "modules_to_save" in name:
                tensor.add_(0.1)
    wrapped.eval().save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    bank = from_peft(model, tmp_path)
    assert (model(IMAGES) - wrapped(IMAGES)).abs().max() <= 2e-6
    assert (model(IMAGES) - base(IMAGES)).abs().max() > 1e-2
    bank.verify()


@pytest.mark.parametrize("backbone", MODELS)
@pytest.mark.parametrize(
    "method",
    [
        vispeft.LoRA(rank=4, alpha=6),
        vispeft.LoRA(rank=2, roles=("attn.q", "attn.v", "attn.proj", "mlp.fc1"), rslora=True, dropout=0.1),
        vispeft.LoRA(rank=2, roles=("attn.qkv", "mlp.fc2"), dora=True),
        vispeft.LoRA(rank=2, roles=("attn.proj",), start="pissa"),
    ],
    ids=["slices", "mixed", "dora", "pissa"],
)
def test_an_adapter_is_written_for_peft(method, backbone, tmp_path):
    base = MODELS[backbone]()
    model = copy.deepcopy(base)
    bank = vispeft.attach(model, method)
    move(model)
    with torch.no_grad():
        model.get_classifier().bias.add_(0.3)
    model.eval()
    to_peft(bank, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    assert (theirs(IMAGES) - model(IMAGES)).abs().max() <= 2e-6
    back = copy.deepcopy(base)
    from_peft(back, tmp_path / "out")
    assert (back(IMAGES) - model(IMAGES)).abs().max() <= 2e-6
    with pytest.raises(ConfigError, match="not empty"):
        to_peft(bank, tmp_path / "out")


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        from_peft(vit(), tmp_path)
    conv = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["patch_embed.proj"]))
    conv.save_pretrained(tmp_path / "conv")
    loha = peft.get_peft_model(vit(), peft.LoHaConfig(r=2, **TARGETS))
    loha.save_pretrained(tmp_path / "loha")
    other = peft.get_peft_model(swin(), peft.LoraConfig(r=2, **TARGETS))
    other.save_pretrained(tmp_path / "swin")
    some = peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules=["blocks.0.attn.qkv", "blocks.1.mlp.fc1"]))
    some.save_pretrained(tmp_path / "some")
    for name, told in {
        "conv": "no part of a LoRA at a linear layer",
        "loha": "this adapter is LOHA",
        "swin": "no linear layer of this",
        "some": "another choice in each block",
    }.items():
        model = vit()
        with pytest.raises(VispeftError, match=told):
            from_peft(model, tmp_path / name)
        assert vispeft.AdapterBank.of(model) is None
    bank = vispeft.attach(vit(), vispeft.SSF())
    with pytest.raises(ConfigError, match="writes LoRA"):
        to_peft(bank, tmp_path / "ssf")


def test_a_task_trains_a_tuner():
    from tests.tiny import TINY
    from vispeft.tasks import Classification

    task = Classification(
        backbone="vit_tiny_patch16_224",
        backbone_args=TINY,
        method=PeftMethod(config=peft.LoHaConfig(r=2)),
        num_classes=3,
    )
    optimizer = torch.optim.AdamW(task.bank.parameter_groups(1e-2, 0.0))
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    task.train()
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(task(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


def test_layers_of_peft_keep_the_results_of_threads_apart(one_thread):
    """The result of the host stood in an attribute of the layer, where another thread's took its place."""
    model = vit().eval()
    vispeft.attach(model, vispeft.LoRA(rank=2, roles=("mlp.fc1",)), name="first", verify=False)
    method = PeftMethod(config={"peft_type": "LORA", "r": 2}, roles=("mlp.fc1",))
    bank = vispeft.attach(model, method, name="second", verify=False)
    move(model)
    bank.set_active(["first", "second"])
    batches = [torch.randn(2, *IMAGES.shape[1:]) for _ in range(3)]
    with torch.no_grad():
        wanted, wrong = [model(images) for images in batches], []

    def predict(number):
        with torch.no_grad():
            for _ in range(40):
                wrong.append(not torch.equal(model(batches[number]), wanted[number]))

    threads = [threading.Thread(target=predict, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(wrong) == 120
    assert not any(wrong)


def test_lora_on_the_classifier_and_old_files_are_named(tmp_path):
    """The first was called no linear classifier, and the second were said not to exist."""
    peft.get_peft_model(vit(), peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "all")
    with pytest.raises(ConfigError, match=r"LoRA at the classifier 'head'.*exclude_modules=\['head'\]"):
        from_peft(vit(), tmp_path / "all")
    (tmp_path / "all/adapter_model.safetensors").rename(tmp_path / "all/adapter_model.bin")
    with pytest.raises(FileError, match=r"holds adapter_model\.bin, which older versions of peft wrote"):
        from_peft(vit(), tmp_path / "all")


@pytest.mark.parametrize(
    "fields", [[], {"peft_type": "LORA", "lora_alpha": "8"}, {"peft_type": "LORA", "alpha_pattern": 3}]
)
def test_a_config_of_another_form_is_refused(fields, tmp_path):
    peft.get_peft_model(vit(), peft.LoraConfig(r=2, **TARGETS)).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(FileError, match=r"adapter_config\.json"):
        from_peft(vit(), tmp_path)


def test_what_the_format_of_peft_does_not_hold_is_refused_or_named(tmp_path, caplog):
    """Terms of all tasks were added up."""
    bank = vispeft.attach(vit(), vispeft.LoRA(rank=2), tasks=["seg", "depth"])
    with pytest.raises(ConfigError, match=r"has tasks \(seg, depth\)"):
        to_peft(bank, tmp_path / "tasks")
    bank = vispeft.attach(vit(), vispeft.LoRA(rank=2))
    assert not list(tmp_path.iterdir())
    bank.annotate(metrics={"accuracy": 0.5})
    to_peft(bank, tmp_path / "notes")
    assert "no place for metrics" in caplog.text
