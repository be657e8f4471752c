"""Files of an earlier revision: its adapters load and compute what they did, and its run goes on to the same end.

They were written by `tests.golden.write` at revision a0bd47e and are never written anew.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vispeft
from tests.golden.backbones import (
    ADAPTERS,
    DECODED,
    NOTES,
    STACK,
    WEIGHTS,
    images,
    make,
    make_run_backbone,
    outputs,
    segmentation,
)
from vispeft.cli import train
from vispeft.tasks import Classification

HERE = Path(__file__).parent
FOLDER = HERE / "adapters"
PLAIN = "raw"
"""How a file calls a tensor that is not packed."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stored():
    """The outputs of that revision, by name and number."""
    return load_file(HERE / "outputs.safetensors")


def check(found, wanted):
    """Check that tensors are equal up to rounding."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def check_outputs(found, stored, name):
    assert len(found) == sum(key.startswith(f"{name}/") for key in stored)
    for index, tensor in enumerate(found):
        check(tensor, stored[f"{name}/{index}"])


def check_files(folder, golden):
    """Check that two adapters have the same tensors, bit for bit, in the same form; packed ones are their bytes."""
    files = sorted(path.name for path in golden.glob("*.safetensors"))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == files
    for name in files:
        found, wanted = load_file(folder / name), load_file(golden / name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor), key
    assert forms(folder) == forms(golden)


def forms(folder):
    """Read how each tensor of an adapter stands in its file."""
    return json.loads((folder / "adapter.json").read_text())["tensors"]


def test_no_adapter_is_forgotten(stored):
    written = {path.name for path in FOLDER.iterdir()}
    assert written == {*ADAPTERS, *STACK, DECODED}
    assert {key.partition("/")[0] for key in stored} == {*ADAPTERS, DECODED, "stack"}
    codecs = {entry["codec"] for name in written for entry in forms(FOLDER / name).values()}
    assert codecs == {PLAIN, *(f"l1-normal-500/{bits}" for bits in (1, 2, 4, 8))}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_computes_and_is_saved_as_it_was(name, stored, tmp_path):
    golden = ADAPTERS[name]
    model = make(golden.backbone, golden.classes)
    bank = vispeft.load(model, FOLDER / name)
    check_outputs(outputs(model, golden.backbone, golden.maps), stored, name)
    bank.save(tmp_path)
    check_files(tmp_path, FOLDER / name)
    again = make(golden.backbone, golden.classes)
    vispeft.load(again, tmp_path)
    check_outputs(outputs(again, golden.backbone, golden.maps), stored, name)


@pytest.mark.parametrize("name", [name for name, golden in ADAPTERS.items() if "bit_" in name])
def test_packed_bytes_outlive_further_saving(name, tmp_path):
    """What was never trained again is never quantised again."""
    golden, folder = ADAPTERS[name], FOLDER / name
    packed = [key for key, entry in forms(folder).items() if entry["codec"] != PLAIN]
    assert packed
    for turn in ("first", "second"):
        vispeft.load(make(golden.backbone, golden.classes), folder).save(tmp_path / turn)
        folder = tmp_path / turn
    check_files(folder, FOLDER / name)


def test_two_adapters_act_together(stored):
    model = make("vit")
    for name in STACK:
        bank = vispeft.load(model, FOLDER / name, name=name)
    bank.set_active(STACK)
    check_outputs(outputs(model, "vit"), stored, "stack")


def test_notes_are_kept(tmp_path):
    name, golden = next((name, golden) for name, golden in ADAPTERS.items() if golden.notes)
    bank = vispeft.load(make(golden.backbone), FOLDER / name)
    assert {key: bank.notes()[key] for key in NOTES} == NOTES
    bank.save(tmp_path)
    saved = json.loads((tmp_path / "adapter.json").read_text())
    assert {key: saved[key] for key in NOTES} == NOTES


def test_classifier_replaces_one_for_other_classes(stored):
    model = make("vit", classes=7)
    vispeft.load(model, FOLDER / "ssf_vit")
    assert model.num_classes == 3
    check_outputs(outputs(model, "vit", maps=True), stored, "ssf_vit")


def test_another_backbone_is_refused():
    model = make("vit")
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.raises(vispeft.VispeftError, match="other weights"):
        vispeft.load(model, FOLDER / "ssf_vit")


def test_adapter_of_a_whole_model_loads_on_its_stages(stored):
    model = make("swin_features")
    vispeft.load(model, FOLDER / "ssf_swin")
    for index, tensor in enumerate(outputs(model, "swin_features")):
        check(tensor.permute(0, 3, 1, 2), stored[f"ssf_swin/{index + 1}"])


@torch.no_grad()
def test_decoder_loads_into_its_task(stored, tmp_path):
    task = segmentation(tmp_path)
    task.load_adapter(FOLDER / DECODED)
    check(task.eval()(images("vit")), stored[f"{DECODED}/0"])
    task.save_adapter(tmp_path / "again")
    check_files(tmp_path / "again", FOLDER / DECODED)


def test_decoder_is_left_aside_without_its_task(tmp_path):
    head = load_file(FOLDER / DECODED / "head.safetensors")
    decoder = {key.removeprefix("decoder/"): tensor for key, tensor in head.items() if key.startswith("decoder/")}
    assert decoder
    bank = vispeft.load(make("vit", 0), FOLDER / DECODED)
    bank.save(tmp_path, decoder=decoder)
    check_files(tmp_path, FOLDER / DECODED)


def test_stopped_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE / "run", "run")
    save_file(make_run_backbone().state_dict(), WEIGHTS)
    training_step, steps = Classification.training_step, []

    def counted(self, batch, batch_idx):
        steps.append(self.global_step)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(Classification, "training_step", counted)
    train.main(["--resume", "run"])
    assert steps == [6, 7, 8, 9]  # begun anew, it would come to the same end
    found, wanted = tmp_path / "run", HERE / "run_end"
    for name in ("adapter.safetensors", "head.safetensors"):
        ours, theirs = load_file(found / "adapter" / name), load_file(wanted / "adapter" / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            check(ours[key], tensor)
    metrics = json.loads((found / "metrics.json").read_text())
    for key, value in json.loads((wanted / "metrics.json").read_text()).items():
        assert metrics[key] == pytest.approx(value, rel=1e-5), key
    vispeft.load(make_run_backbone(), found / "adapter")  # it fits the backbone it was trained on
    vispeft.load(make_run_backbone(), wanted / "adapter")
