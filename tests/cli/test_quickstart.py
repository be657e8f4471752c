import pytest
import torch

from vispeft.cli.config import ConfigCLI
from vispeft.cli.quickstart import _features, train_probe
from vispeft.cli.train import train
from vispeft.errors import ConfigError


def test_a_probe_on_features_takes_the_steps_of_the_task(config, tmp_path):
    """Features computed once are those of every epoch, so that the quickstart's shortcut changes nothing."""
    folder = train(config, ["--model.method=linear_probe", "--model.lr=0.05"], out=tmp_path / "run")
    cli = ConfigCLI(config, ["--model.method=linear_probe"])
    data = cli.datamodule
    data.fit_to(cli.model.preprocessing)
    data.setup()
    features = {split: _features(cli.model, data, split) for split in ("train", "validation")}
    _, tensors = train_probe(cli.model, features, lr=0.05, epochs=2, batch_size=256, seed=0)
    cli.model.restore(max((folder / "checkpoints").glob("step-*")))
    head = cli.model.model.get_classifier()
    best = torch.load(max((folder / "checkpoints").glob("best-*")), weights_only=True)["epoch"]
    if best == 1:
        assert torch.allclose(head.weight, tensors["weight"], atol=1e-5)
        assert torch.allclose(head.bias, tensors["bias"], atol=1e-5)
    cli.model.restore(max((folder / "checkpoints").glob("best-*")))
    assert torch.allclose(cli.model.model.get_classifier().weight, tensors["weight"], atol=1e-5)


def test_seeds_are_checked():
    from vispeft.cli.quickstart import main

    with pytest.raises(ConfigError, match="at least 1"):
        main(["--seeds", "0"])
