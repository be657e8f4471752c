"""Published checkpoints become adapters: generated files of each format, and the authors' own where present."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vispeft
from tests.tiny import TINY as NARROW
from vispeft.cli import import_official as tool
from vispeft.cli.common import run_tool
from vispeft.interop import load_binary, to_official
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.storage.quantize import codebook
from vispeft.zoo import zoo_folder

MODEL = "zoo:mini"
TINY = {**NARROW, "embed_dim": 64}  # in a narrower one, every file fits both kinds of classifier
PUBLISHED = Path(os.environ.get("VISPEFT_REFERENCE_DIR", "")) / "binadapter_published_bins.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _zoo(tmp_path_factory):
    """A zoo with one tiny backbone, which is made in no time."""
    place = tmp_path_factory.mktemp("zoo")
    folder = place / "backbones" / "mini"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(
        vispeft.create_model("vit_tiny_patch16_224", num_classes=10, **TINY).state_dict(), folder / "model.safetensors"
    )
    described = json.loads((zoo_folder() / "backbones/vit_tiny/config.json").read_text())
    args = {name: value for name, value in TINY.items() if name != "pretrained"}
    sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps({**described, "args": args, "sha256": sha}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISPEFT_ZOO", str(place))
        yield


@pytest.fixture(scope="module")
def model(_zoo):
    return vispeft.create_model(MODEL).eval()


def matrices(source, model, bottleneck):
    """List names and shapes as the specification orders them: blocks, then down and up, queries before values."""
    width = model.embed_dim
    modules = {"biadaptformer": ("adapter_mlp",), "bilora": ("attn.lora_q", "attn.lora_v")}[source]
    for block in range(len(model.blocks)):
        for module in modules:
            yield f"blocks.{block}.{module}.adapter_down.weight", (bottleneck, width)
            yield f"blocks.{block}.{module}.adapter_up.weight", (width, bottleneck)


def published(source, model, bits, bottleneck, bihead, classes=5):
    """Write a file as the authors do, bit by bit, and say what its matrices are."""
    random = numpy.random.default_rng(0)
    content, values = b"", {}
    width = model.embed_dim

    def quantised(name, shape, bits):
        nonlocal content
        codes = random.integers(0, 2**bits, size=shape)
        bit_rows = (codes.reshape(-1, 1) >> numpy.arange(bits)) & 1
        mean, std = numpy.float32(random.normal(0, 0.001)), numpy.float32(random.uniform(0.01, 0.02))
        content += numpy.packbits(bit_rows.reshape(-1).astype(numpy.uint8), bitorder="little").tobytes()
        content += mean.tobytes() + std.tobytes()
        levels = codebook(bits)[0].numpy()
        values[name] = torch.from_numpy(levels[codes] * std + mean)

    for name, shape in matrices(source, model, bottleneck):
        quantised(name, shape, bits)
    if bihead:
        quantised("head.weight", (classes, width), 1)
    else:
        for name, shape in (("head.weight", (classes, width)), ("head.bias", (classes,))):
            values[name] = torch.from_numpy(random.normal(0, 0.1, shape).astype(numpy.float32))
            content += values[name].numpy().tobytes()
    return content, values


def call(capsys, *arguments):
    status = run_tool(tool.main, [str(argument) for argument in arguments])
    return status, capsys.readouterr()


@pytest.mark.parametrize("bihead", [False, True])
@pytest.mark.parametrize(
    ("source", "bits", "bottleneck"), [("biadaptformer", 1, 8), ("bilora", 1, 1), ("bilora", 4, 2)]
)
def test_a_file_without_a_header_becomes_an_adapter(source, bits, bottleneck, bihead, model, tmp_path, capsys):
    content, values = published(source, model, bits, bottleneck, bihead)
    file = tmp_path / "task.bin"
    file.write_bytes(content)
    hyper = (f"bits={bits}", f"bottleneck={bottleneck}", "scale=10")
    status, said = call(capsys, source, file, "--model", MODEL, "--out", tmp_path / "a", "--hyper", *hyper)
    assert status == 0, said.err
    again = vispeft.create_model(MODEL).eval()
    bank = vispeft.load(again, tmp_path / "a")
    for name, tensor in to_official(bank, source).items():
        assert torch.equal(tensor, values[name]), name
    method = bank.plan().method
    assert (method.bits, method.head_bits, bank.notes()["preprocessing"]["std"]) == (
        bits,
        1 if bihead else 32,
        [1, 1, 1],
    )
    assert again.num_classes == 5
    # What acts is what was decoded, in training mode too: nothing is quantised a second time.
    for unit in (bank.plan().items[0], bank.plan().items[-1]):
        module = again.get_submodule(unit.site.path).adapters["default"][unit.slot]
        for tensor in module.matrices:
            assert torch.equal(module.matrix(tensor), getattr(module, tensor))
    bank.save(tmp_path / "b")
    stored = b""
    tensors = {**load_file(tmp_path / "b/adapter.safetensors"), **load_file(tmp_path / "b/head.safetensors")}
    for item in bank.plan():
        for name in item.shapes():
            stored += bytes(tensors[f"{item.key}.{name}"].tolist())
    head = [tensors["head/weight"], *([] if bihead else [tensors["head/bias"]])]
    stored += b"".join(tensor.numpy().tobytes() for tensor in head)
    assert stored == content


@pytest.mark.parametrize(
    ("hyper", "told"),
    [
        ({"bits": 1, "bottleneck": 8}, "needs scale"),
        ({"bits": 2, "bottleneck": 8, "scale": 1}, "standard deviation|bits=2, bottleneck=8"),
        ({"bits": 1, "bottleneck": 4, "scale": 1}, "standard deviation"),
        ({"bits": 1, "bottleneck": 8, "scale": 1, "bihead": True}, "no classifier of 1 bit|left after"),
    ],
)
def test_wrong_settings_are_noticed(hyper, told, model):
    content, _ = published("biadaptformer", model, 1, 8, bihead=False)
    with pytest.raises(vispeft.VispeftError, match=told):
        load_binary(model, "biadaptformer", content, hyper)
    assert vispeft.AdapterBank.of(model) is None


def test_both_kinds_of_classifier_may_fit(model):
    width = model.embed_dim
    content, _ = published("biadaptformer", model, 1, 8, bihead=True, classes=1)
    ambiguous = next(c for c in range(1, 4000) if (c * width // 8 + 8) % (4 * (width + 1)) == 0)
    content, values = published("biadaptformer", model, 1, 8, bihead=True, classes=ambiguous)
    hyper = {"bits": 1, "bottleneck": 8, "scale": 1}
    with pytest.raises(vispeft.VispeftError, match="bihead=true or bihead=false"):
        load_binary(model, "biadaptformer", content, hyper)
    bank = load_binary(model, "biadaptformer", content, {**hyper, "bihead": True})
    assert torch.equal(to_official(bank, "biadaptformer")["head.weight"], values["head.weight"])
    bank.detach("default")


def ssf_tensors(model):
    adapted = vispeft.create_model(MODEL).eval()
    bank = vispeft.attach(adapted, vispeft.SSF())
    return to_official(bank, "ssf"), adapted


@pytest.mark.parametrize("kind", ["safetensors", "wrapped", "parallel"])
def test_checkpoints_with_names(kind, model, tmp_path, capsys):
    tensors, adapted = ssf_tensors(model)
    # Published checkpoints of such methods hold the backbone too.
    whole = {**{name: t for name, t in model.state_dict().items() if not name.startswith("head.")}, **tensors}
    file = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth.tar")
    if kind == "safetensors":
        save_file({name: t.contiguous() for name, t in whole.items()}, file)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": whole}, file)
    else:
        torch.save({"model": {f"module.{name}": tensor for name, tensor in whole.items()}}, file)
    status, said = call(capsys, "ssf", file, "--model", MODEL, "--out", tmp_path / "out")
    assert status == 0, said.err
    again = vispeft.create_model(MODEL).eval()
    vispeft.load(again, tmp_path / "out")
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    assert torch.equal(again(images), adapted(images))


def test_metadata_of_a_file_is_read(model, tmp_path, capsys):
    adapted = vispeft.create_model(MODEL).eval()
    bank = vispeft.attach(adapted, vispeft.AdaptFormer(bottleneck=4, scale=0.3))
    tensors = {f"adapter.{name}": tensor for name, tensor in to_official(bank, "adaptformer").items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"hyper": json.dumps({"scale": 0.3})})
    status, said = call(capsys, "adaptformer", tmp_path / "a.safetensors", "--model", MODEL, "--out", tmp_path / "out")
    assert status == 0, said.err
    described = json.loads((tmp_path / "out/adapter.json").read_text())["method"]["fields"]
    assert (described["scale"], described["bottleneck"]) == (0.3, 4)
    # what is given on the command line stands above what the file says
    argv = ("--model", MODEL, "--out", tmp_path / "out2", "--hyper", "scale=0.5")
    assert call(capsys, "adaptformer", tmp_path / "a.safetensors", *argv)[0] == 0
    assert json.loads((tmp_path / "out2/adapter.json").read_text())["method"]["fields"]["scale"] == 0.5


def test_classes_of_a_checkpoint_without_a_classifier_are_given(tmp_path, capsys):
    texts = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    classes = tmp_path / "classes.safetensors"
    ClassEmbeddings(texts, ("a", "b", "c"), 100.0, torch.randn(8, TINY["embed_dim"])).save(classes)
    adapted = vispeft.create_model(MODEL, num_classes=3).eval()
    bank = vispeft.attach(adapted, vispeft.MMRL(classes=str(classes), token_dim=6, beta=0.4), verify=False)
    tensors = to_official(bank, "mmrl")
    text = "representation_learner.srra_r2tproj.weight"
    save_file({**tensors, text: torch.randn(5, 6)}, tmp_path / "a.safetensors")
    given = (tmp_path / "a.safetensors", "--model", MODEL, "--out", tmp_path / "out", "--hyper")
    hyper = (f"classes={classes}", "alpha=0.7", "beta=0.4")
    status, said = call(capsys, "mmrl", *given, *hyper)
    assert status == 2
    assert "3 classes, and the classifier 10" in said.err
    status, said = call(capsys, "mmrl", *given, *hyper, "--num_classes", "3")
    assert status == 0, said.err
    again = vispeft.create_model(MODEL, num_classes=3).eval()
    vispeft.load(again, tmp_path / "out")
    images = torch.randn(2, 3, *adapted.patch_embed.img_size)
    assert torch.equal(again(images), adapted(images))


def test_what_cannot_be_imported_is_refused_first(model, tmp_path, capsys):
    tensors, _ = ssf_tensors(model)
    file, out = tmp_path / "a.pt", tmp_path / "out"
    name = "blocks.0.mlp.fc1.weight"
    torch.save({**tensors, name: model.state_dict()[name] + 1}, file)
    torch.save(tensors, tmp_path / "b.pt")
    cases = {
        ("ssf", file): "are not those of the model, first blocks.0.mlp.fc1.weight",
        ("ssv", file): "Did you mean 'ssf'",
        ("ssf", tmp_path / "none.pt"): "There is no file",
        ("hydra", tmp_path / "b.pt"): "needs scale, which the tensors do not show",
    }
    for (source, path), told in cases.items():
        status, said = call(capsys, source, path, "--model", MODEL, "--out", out)
        assert status == 2
        assert told in said.err
        assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("keep")
    assert "not empty" in call(capsys, "ssf", file, "--model", MODEL, "--out", out)[1].err
    file.write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    assert "tensors" in call(capsys, "ssf", file, "--model", MODEL, "--out", tmp_path / "new")[1].err
    assert "no name=value" in call(capsys, "ssf", file, "--model", MODEL, "--out", out, "--hyper", "scale")[1].err


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_file(), reason="VISPEFT_REFERENCE_DIR holds no files of the authors")
@pytest.mark.parametrize(("key", "source"), [("adaptformer-bihead", "biadaptformer"), ("lora-bihead", "bilora")])
def test_the_authors_files(key, source, tmp_path):
    with safe_open(PUBLISHED, "pt") as file:
        names = [name for name in file.keys() if name.startswith(f"{key}.weight.")]  # noqa: SIM118 (no mapping)
        wanted = {name.removeprefix(f"{key}.weight."): file.get_tensor(name) for name in names}
        content = bytes(file.get_tensor(f"{key}.bin_bytes").tolist())
    path = tmp_path / "kitti.bin"
    path.write_bytes(content)
    model = vispeft.create_model("vit_base_patch16_224", pretrained=False, num_classes=0).eval()
    hyper = {"bits": 1, "bottleneck": 1, "scale": 10.0}
    bank = tool.import_official(model, source, path, hyper, tmp_path / "kitti")  # reloads and compares outputs
    found = to_official(bank, source)
    assert {name.removesuffix(".weight") for name in found} == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[f"{name}.weight"], tensor), name
    stored = {**load_file(tmp_path / "kitti/adapter.safetensors"), **load_file(tmp_path / "kitti/head.safetensors")}
    keys = [f"{item.key}.{tensor}" for item in bank.plan() for tensor in item.shapes()]
    assert b"".join(bytes(stored[name].tolist()) for name in [*keys, "head/weight"]) == content
