"""Trackers of experiments: what they get, in which of their runs a run goes on, and what happens where one fails."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from tests.tiny import CONFIG
from vispeft.building.known import register_class
from vispeft.cli import trackers
from vispeft.cli.config_changes import is_free
from vispeft.cli.train import resume, train
from vispeft.errors import ConfigError
from vispeft.tasks import TrackioLogger

FEW = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--data.test=0.5"]


@register_class
class Diary(Logger):
    """Writes a line of JSON for each call."""

    def __init__(self, path: str, refuses: bool = False, fails_after: int = 10**9) -> None:
        super().__init__()
        if refuses:
            raise OSError("no server at 127.0.0.1:9")
        self.path, self.left = Path(path), fails_after

    def _write(self, kind: str, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, value]) + "\n")

    @property
    def name(self) -> str:
        return "diary"

    @property
    def version(self) -> str:
        return "first"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._write("config", params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the server is gone")
        self._write("values", {**metrics, "step": step})

    def finalize(self, status: str) -> None:
        self._write("end", status)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def diary(tmp_path: Path) -> list[str]:
    return [*FEW, "--trainer.logger=Diary", f"--trainer.logger.path={tmp_path / 'diary.txt'}"]


def lines(tmp_path: Path) -> list[tuple[str, Any]]:
    return [tuple(json.loads(line)) for line in (tmp_path / "diary.txt").read_text().splitlines()]


@pytest.mark.slow
def test_a_tracker_gets_the_config_all_values_and_the_final_figures(
    config: Path, tmp_path: Path, diary: list[str]
) -> None:
    run = train(config, diary, out=tmp_path / "run")
    (kind, told), *values, (last, status) = lines(tmp_path)
    assert (kind, last, status) == ("config", "end", "success")
    assert told["model"]["init_args"]["lr"] == 1e-2
    assert {name for name, _ in values} == {"values"}
    steps = [row["step"] for _, row in values if "train/loss_step" in row or "train/loss" in row]
    assert steps
    figures = json.loads((run / "metrics.json").read_text())
    assert values[-1][1]["final/test/accuracy"] == figures["test"]["accuracy"]
    assert values[-1][1]["final/validation/loss"] == figures["validation"]["loss"]
    assert values[-1][1]["step"] == figures["steps"] == 2


@pytest.mark.slow
def test_a_tracker_that_fails_is_left_and_the_training_goes_on(
    config: Path, tmp_path: Path, diary: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="vispeft"):
        run = train(config, [*diary, "--trainer.logger.fails_after=1"], out=tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if "Diary" in record.getMessage()]
    assert said == [
        "Diary failed, and gets no further values (ConnectionError: the server is gone.) The training goes on; all "
        "values are in the run's logs/."
    ]
    assert [kind for kind, _ in lines(tmp_path)] == ["config", "values"]
    assert (run / "metrics.json").is_file()


@pytest.mark.slow
def test_a_tracker_that_cannot_start_is_refused_before_the_first_step(
    config: Path, tmp_path: Path, diary: list[str]
) -> None:
    with pytest.raises(ConfigError, match=r"Diary was asked for, and could not be started: OSError: no server at"):
        train(config, [*diary, "--trainer.logger.refuses=true"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_goes_on_in_the_same_run_of_its_tracker(config: Path, tmp_path: Path) -> None:
    boards = [*FEW, "--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'boards'}"]
    first = train(config, boards, out=tmp_path / "first")
    second = train(config, boards, out=tmp_path / "second")
    resume(first, None, ["--trainer.max_epochs=2"])
    kept = [json.loads((run / "trackers.json").read_text())["trackers"] for run in (first, second)]
    assert [[entry["version"] for entry in entries] for entries in kept] == [[0], [1]]
    places = sorted((tmp_path / "boards").glob("*/*"))
    assert [path.name for path in places] == ["version_0", "version_1"]
    assert [len(list(path.glob("events*"))) for path in places] == [2, 1]


def test_a_list_of_runs_that_was_altered_is_left_out(tmp_path: Path) -> None:
    entry = {"class": "lightning.pytorch.loggers.WandbLogger", "version": "aj93pobv"}
    for text in ("[1", "{}", "[]", json.dumps({"trackers": [{"class": "x", "version": None}]})):
        (tmp_path / "trackers.json").write_text(text)
        assert trackers._read(tmp_path) == []
    (tmp_path / "trackers.json").write_text(json.dumps({"trackers": [entry]}))
    assert trackers._read(tmp_path) == [entry]


def test_a_missing_package_is_named_before_anything_is_made(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for cls, package in ((WandbLogger, "wandb"), (MLFlowLogger, "mlflow"), (TrackioLogger, "trackio")):
        told = rf"trainer.logger is {cls.__name__}, .* package {package}.*vispeft\[trackers\]"
        with pytest.raises(ConfigError, match=told):
            trackers.check_trackers([{"class_path": f"{cls.__module__}.{cls.__name__}"}])
    with pytest.raises(ConfigError, match=told):
        train(config, ["--trainer.logger=TrackioLogger"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_tracker_changes_no_result() -> None:
    assert is_free("trainer.logger")
    assert is_free("trainer.logger.init_args.project")


# ------------------------------------------------------------------ the packages themselves, where they are installed


@pytest.mark.slow
def test_wandb_offline(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = [*FEW, "--trainer.logger=WandbLogger", f"--trainer.logger.save_dir={tmp_path}"]
    run = train(config, settings, out=tmp_path / "run")
    resume(run, None, ["--trainer.max_epochs=2"])
    entry = json.loads((run / "trackers.json").read_text())["trackers"][0]
    found = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(found) == 2  # `wandb sync` joins them: they have one name
    assert {name.rpartition("-")[2] for name in found} == {entry["version"]}


@pytest.mark.slow
def test_mlflow_in_a_database(config: Path, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path / 'ml.db'}"
    run = train(
        config,
        [*FEW, "--trainer.logger=MLFlowLogger", f"--trainer.logger.tracking_uri={address}"],
        out=tmp_path / "run",
    )
    resume(run, None, ["--trainer.max_epochs=2"])
    client = mlflow.MlflowClient(address)
    entry = json.loads((run / "trackers.json").read_text())["trackers"][0]
    found = client.search_runs([client.get_experiment_by_name("lightning_logs").experiment_id])
    assert [kept.info.run_id for kept in found] == [entry["version"]]
    assert found[0].info.status == "FINISHED"
    assert found[0].data.params["model/init_args/lr"] == "0.01"
    figures = json.loads((run / "metrics.json").read_text())
    assert found[0].data.metrics["final/test/accuracy"] == figures["test"]["accuracy"]


@pytest.mark.slow
def test_trackio_in_a_folder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run = train(config, [*FEW, "--trainer.logger=TrackioLogger"], out=tmp_path / "run")
    resume(run, None, ["--trainer.max_epochs=2"])
    entry = json.loads((run / "trackers.json").read_text())["trackers"][0]
    import trackio

    found = [kept.name for kept in trackio.Api().runs("vispeft")]
    assert found == [entry["version"]]
