import json
import statistics

import pytest

from vispeft.cli import train as train_tool
from vispeft.cli.config import ConfigCLI

SHORT = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--model.method=linear_probe")


@pytest.mark.slow
def test_every_fold_is_tested_once_and_finished_ones_are_skipped(config, run_cli, tmp_path, monkeypatch):
    out = tmp_path / "cv"
    train, trained = train_tool.train, []

    def stopped(config, overrides, **settings):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(train(config, overrides, **settings))

    monkeypatch.setattr(train_tool, "train", stopped)
    assert run_cli("train", config, *SHORT, "--folds", "2", "--out", out).status == 130
    monkeypatch.setattr(train_tool, "train", train)
    assert [path.name for path in trained] == ["fold-0"]
    first = (out / "fold-0/metrics.json").stat().st_mtime_ns
    result = run_cli("train", config, *SHORT, "--folds", "2", "--out", out)
    assert result.status == 0, result.err
    assert (out / "fold-0/metrics.json").stat().st_mtime_ns == first
    figures = json.loads((out / "folds.json").read_text())
    runs = [json.loads((out / name / "metrics.json").read_text()) for name in figures["runs"]]
    accuracies = [run["test"]["accuracy"] for run in runs]
    assert figures["test"]["mean"]["accuracy"] == pytest.approx(statistics.mean(accuracies))
    assert figures["test"]["std"]["accuracy"] == pytest.approx(statistics.stdev(accuracies))
    assert f"{statistics.stdev(accuracies):.4f}" in result.out

    tested = []
    for run in ("fold-0", "fold-1"):
        cli = ConfigCLI(out / run / "config.yaml", [])
        cli.datamodule.fit_to(cli.model.preprocessing)
        cli.datamodule.setup()
        tested.append({image.numpy().tobytes() for image in cli.datamodule.split("test").images})
    assert len(tested[0] | tested[1]) > 1700
    assert len(tested[0] & tested[1]) < 5  # a few images of the set are equal
    again = run_cli("train", config, *SHORT, "--model.lr=1", "--folds", "2", "--out", out)
    assert "would change the result: model.init_args.lr" in again.err
    (out / "fold-2").mkdir()
    assert "more than 2 folds" in run_cli("train", config, *SHORT, "--folds", "2", "--out", out).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--folds=1",), "at least 2 are needed"),
        (("--folds=3", "--data.fold=1"), "Leave one of them out"),
        (("--folds=3", "--resume=runs"), "give the same command again"),
    ],
)
def test_folds_refuse(config, run_cli, tmp_path, arguments, message):
    result = run_cli("train", config, *arguments, *(() if "--resume=runs" in arguments else ("--out", tmp_path / "cv")))
    assert result.status == 2
    assert message in result.err
    assert not (tmp_path / "cv").exists()
