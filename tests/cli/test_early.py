"""What is wrong with settings and places is said before the backbone is made, and leaves nothing behind."""

import json

import pytest

import vispeft
from tests.tiny import CONFIG, TINY
from vispeft.cli import quickstart
from vispeft.cli.common import run_tool
from vispeft.cli.early import TrainCLI
from vispeft.cli.runs import METRICS, begin
from vispeft.errors import FileError
from vispeft.interop.staging import check_free
from vispeft.storage.places import check_folder
from vispeft.tasks import base


@pytest.fixture(autouse=True)
def _no_backbone(monkeypatch, tmp_path):
    def make(*_, **__):
        raise AssertionError("the backbone was made")

    monkeypatch.setattr(base, "create_model", make)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapter")
    vispeft.attach(vispeft.create_model("vit_tiny_patch16_224", num_classes=3, **TINY), vispeft.LoRA()).save(place)
    return place


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "full"], "full is not empty (found a.txt)"),
        (["--out", "full/a.txt"], "could not be made"),
        (["--out", "full/a.txt/run"], "could not be made"),
        (["--out", "x" * 300], "File name too long"),
        (["--out", "caf\udce9"], "is no UTF-8"),
        (["--init", "nowhere"], "There is no adapter in 'nowhere'"),
        (["--init", "ADAPTER"], "is an adapter of the method lora, and this run trains ssf"),
        (["--cache_features", "full/a.txt"], "The folder of cache_features full/a.txt could not be made"),
        (["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=fsdp"], "trainer.strategy is fsdp"),
        (["--trainer.logger=false"], "trainer.logger is off"),
        (["--trainer.max_epochs=0"], "at least 1 is needed"),
        (["--trainer.precision=bf16-true"], "trainer.precision is bf16-true"),
        (["--model.schedule_epochs=1"], "model.schedule_epochs is 1"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_train_refuses_before_the_backbone_is_made(config, run_cli, adapter, tmp_path, arguments, told):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run_cli("train", config, *(str(adapter) if part == "ADAPTER" else part for part in arguments))
    assert result.status == 2
    assert told in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_numbered_runs_need_a_folder(config, run_cli, tmp_path):
    (tmp_path / "runs").touch()
    assert "runs is no folder" in run_cli("train", config).err


def test_resume_compares_configs_before_the_backbone_is_made(config, run_cli, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    begin(place, TrainCLI(config, []).resolved(), "vispeft train tiny.yaml")
    assert "this would change the result: model.init_args.lr" in run_cli("train", "--resume", place, "--model.lr=1").err
    assert "No epoch of" in run_cli("train", "--finish", place).err
    (place / METRICS).write_text(json.dumps({"epochs": 2}))
    (place / "adapter").mkdir()
    (place / "adapter/adapter.json").touch()
    result = run_cli("train", "--resume", place, "--trainer.max_epochs=1")
    assert "is finished after 2 epochs, and --trainer.max_epochs asks for 1" in result.err
    result = run_cli("train", config, "--resume", place)
    assert result.status == 0, result.err
    assert "is finished; there is nothing to go on with" in result.out


def test_quickstart_looks_at_the_place_of_its_figures_first(tmp_path, capsys):
    (tmp_path / "a.txt").touch()
    (tmp_path / "folder").mkdir()
    for place, told in (("a.txt/b.json", "could not be made"), ("folder", "is a folder")):
        assert run_tool(quickstart.main, ["--json", place]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_place_is_looked_at_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "a.txt").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for good in (".", "new/deep", tmp_path, tmp_path / "new"):
        check_folder(tmp_path / good, "A run")
    for bad in ("a.txt", "a.txt/deep/er", "gone/deep", "x" * 300):
        with pytest.raises(FileError, match=r"^A run .* could not be made"):
            check_folder(tmp_path / bad, "A run")
    with pytest.raises(FileError, match=r"a\.txt is no folder"):
        check_free(tmp_path / "a.txt/model.onnx")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FileError, match="Permission denied"):
        check_folder(tmp_path / "new", "A run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "gone"]


def test_the_config_is_read_without_making_anything(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    cli = TrainCLI(tmp_path / "tiny.yaml", ["--model.lr=5e-3"])
    assert cli.settings("model")["init_args"]["lr"] == 5e-3
    assert not hasattr(cli, "model")
