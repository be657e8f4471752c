"""A finished run of a tiny backbone, made without training, and a zoo with its adapter."""

import contextlib
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tiny import CONFIG
from vispeft.cli import runs
from vispeft.cli.config import ConfigCLI
from vispeft.cli.evaluation import evaluate
from vispeft.cli.main import main
from vispeft.cli.zoo_add import Extras, add_run


def make_run(place: Path, seed: int = 0) -> Path:
    """Write what a run leaves, with an adapter that was not trained and its true figures."""
    place.mkdir(parents=True)
    config = place.parent / f"{place.name}.yaml"
    config.write_text(CONFIG)
    cli = ConfigCLI(config, [f"--seed_everything={seed}"])
    task, data = cli.model, cli.datamodule
    data.fit_to(task.preprocessing)
    task.bank.annotate(
        class_names=task.output_names(data),
        preprocessing=data.preprocessing.to_dict(),
        metrics={},
        output=task.output(),
    )
    task.save_adapter(place / runs.ADAPTER)
    runs.begin(place, cli.resolved(), "vispeft train tiny.yaml")
    figures = evaluate(cli.trainer, task, data, "test")
    metrics = {
        "command": "vispeft train tiny.yaml",
        "validation": figures,
        "test": figures,
        "best_epoch": 1,
        "epochs": 2,
        "steps": 10,
        "seed": seed,
        "parameters": task.report().to_dict(),
        "seconds": {"training": 1.0},
        "device": "cpu",
        "threads": 1,
        "versions": {"vispeft": "0"},
    }
    runs.write_json(place / runs.METRICS, metrics)
    return place


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished run; tests must not change it."""
    return make_run(tmp_path_factory.mktemp("zoo_run") / "run")


@pytest.fixture(scope="session")
def made_zoo(finished_run, tmp_path_factory):
    """A zoo with the adapter of the run as `mine`; tests must not change it."""
    zoo = tmp_path_factory.mktemp("made") / "zoo"
    add_run(str(finished_run), "mine", zoo, Extras(license="MIT"))
    return zoo


@pytest.fixture
def own(made_zoo, tmp_path, monkeypatch):
    """The user's own zoo, a copy of `made_zoo` that a test may change."""
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made_zoo, tmp_path / "cache" / "zoo")
    return tmp_path / "cache" / "zoo"


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """The user's own zoo, which does not exist yet."""
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "zoo"


@pytest.fixture
def zoo_cli(monkeypatch):
    """Run `vispeft zoo` in this process."""
    monkeypatch.setenv("COLUMNS", "400")

    def call(*argv, command="zoo"):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([command, *map(str, argv)])
            except SystemExit as ended:
                status = ended.code
        return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())

    return call
