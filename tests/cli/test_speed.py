"""``vispeft doctor --speed``: both rates, and which side waits."""

import pytest

from tests.tiny import CONFIG
from vispeft.cli import speed
from vispeft.cli.speed import Speed


@pytest.mark.parametrize(
    ("workers", "read", "says"),
    [
        (2, 900.0, "Reading keeps up"),
        (2, 200.0, "waits for images 75% of the time. 8 workers would keep up"),
        (0, 800.0, "waits for images 50% of the time. 1 worker would keep up"),
        (0, 8000.0, "waits for images 9% of the time. 1 worker would keep up"),
    ],
)
def test_the_verdict_says_who_waits(workers, read, says):
    lines = Speed(read=read, needed=800.0, workers=workers, device="cpu", batch=16).lines()
    assert says in lines[-1]
    assert "800 images per second, by steps of 16 images on cpu" in lines[1]


def test_both_rates_of_a_config_are_measured(config, run_cli, monkeypatch, tmp_path):
    for name, value in {"SECONDS": 0.05, "STEPS": 4, "WARMUP": 1}.items():
        monkeypatch.setattr(speed, name, value)
    config.write_text(CONFIG.replace("batch_size: 256", "batch_size: 16"))
    result = run_cli("doctor", config, "--speed", "--data.num_workers=0")
    assert result.status == 0, result.err
    read, needed, verdict = result.out.splitlines()[-3:]
    assert read.startswith("read: ")
    assert "by steps of 16 images on " in needed
    assert "waits for images" in verdict
    assert "is neither" in run_cli("doctor", tmp_path, "--speed").err
