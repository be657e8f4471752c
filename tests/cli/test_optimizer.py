"""The optimiser of a config, and settings that have moved."""

import pytest
import torch
import yaml

from vispeft.cli.config import ConfigCLI


def named(config, *overrides):
    return ConfigCLI(config, list(overrides)).model.optimizer


def written(config, optimizer):
    tree = yaml.safe_load(config.read_text())
    tree["model"]["init_args"]["optimizer"] = optimizer
    config.write_text(yaml.safe_dump(tree))
    return config


def test_the_optimizer_of_a_config_and_of_its_overrides(config):
    assert named(config) == {"class_path": "torch.optim.AdamW", "init_args": {}}
    assert named(config, "--model.optimizer=RMSprop")["class_path"] == "torch.optim.RMSprop"
    written(config, {"class_path": "SGD", "init_args": {"momentum": 0.9}})
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    assert named(config) == sgd
    for override in ("--model.optimizer.momentum", "--model.init_args.optimizer.init_args.momentum"):
        assert named(config, override, "0.5") == {**sgd, "init_args": {"momentum": 0.5}}
    changed = named(config, "--model.optimizer.init_args={nesterov: true, momentum: 0.8}")
    assert changed == {**sgd, "init_args": {"nesterov": True, "momentum": 0.8}}
    assert named(config, "--model.optimizer.class_path", "Adam")["init_args"] == {}
    assert named(config, "--model.optimizer", "{class_path: Adam, init_args: {eps: 0.1}}")["init_args"] == {"eps": 0.1}


def test_the_printed_config_names_the_optimizer_and_reads_back(config, capsys, tmp_path):
    with pytest.raises(SystemExit):
        ConfigCLI(written(config, "SGD"), ["--model.optimizer.momentum=0.9", "--print_config"])
    text = capsys.readouterr().out
    printed = yaml.safe_load(text)
    assert printed["model"]["init_args"]["optimizer"] == {
        "class_path": "torch.optim.SGD",
        "init_args": {"momentum": 0.9},
    }
    (tmp_path / "again.yaml").write_text(text)
    assert named(tmp_path / "again.yaml")["init_args"] == {"momentum": 0.9}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--model.optimizer=SDG", "Unknown optimizer 'SDG'. Did you mean 'SGD'"),
        ("--model.optimizer=os.system", "Optimizers are the classes of torch.optim"),
        ("--model.optimizer.momentun=1", "Unknown argument of AdamW 'momentun'"),
        ("--model.optimizer={class_path: SGD, init_arg: {}}", "Did you mean 'optimizer.init_args'"),
        ("--model.optimizer.init_args.lr=1", "Give model.lr instead"),
        ("--model.optimizer={class_path: SGD, init_args: {momentum: -1}}", "SGD(momentum=-1) cannot be made"),
        ("--model.optimiser=SGD", "Did you mean 'model.optimizer'"),
        ("--model.head_sparsity=1e-4", "set model.method.head_sparsity"),
    ],
)
def test_what_is_refused_before_anything_is_made(config, run_cli, tmp_path, override, told):
    result = run_cli("train", config, "--out", tmp_path / "run", override)
    assert result.status == 2
    assert told in result.err, result.err
    assert not (tmp_path / "run").exists()


def test_a_config_with_a_setting_that_has_moved(config):
    tree = yaml.safe_load(config.read_text())
    tree["model"]["init_args"]["head_sparsity"] = 0.0  # as every run directory of an earlier version has it
    config.write_text(yaml.safe_dump(tree))
    assert named(config)["class_path"] == "torch.optim.AdamW"
    tree["model"]["init_args"]["head_sparsity"] = 1e-4
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="head_sparsity is a field of the method vqt now"):
        ConfigCLI(config, [])


def test_a_run_with_momentum_is_resumed_as_it_was_begun(config, run_cli, tmp_path):
    settings = ["--model.optimizer=SGD", "--model.optimizer.momentum=0.9", "--trainer.max_epochs=1"]
    result = run_cli("train", config, "--out", tmp_path / "run", *settings)
    assert result.status == 0, result.err
    (tmp_path / "run/metrics.json").unlink()
    refused = run_cli("train", "--resume", tmp_path / "run", "--model.optimizer.momentum=0.8")
    assert "momentum was 0.9 and is 0.8" in refused.err
    resumed = run_cli("train", "--resume", tmp_path / "run")
    assert resumed.status == 0, resumed.err
    state = torch.load(next((tmp_path / "run/checkpoints").glob("step-*.ckpt")), weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9


def test_configs_of_two_runs_compare_whether_or_not_they_name_the_default(config):
    plain = ConfigCLI(config, [])
    printed = plain.resolved()
    assert "class_path: torch.optim.AdamW" in printed
    assert plain.completed(yaml.safe_load(printed)) == yaml.safe_load(printed)
    assert plain.completed(yaml.safe_load(config.read_text())) == yaml.safe_load(printed)
