"""Run directories: withdrawn, edited by hand, and of other versions."""

from pathlib import Path

import pytest

from vispeft.cli import runs
from vispeft.errors import ConfigError, FileError
from vispeft.storage.locks import InUseError


def test_a_run_that_is_withdrawn_keeps_others_out_to_the_end(tmp_path):
    """Its lock was removed first, and the next run of the same name began in a directory that was being removed."""
    place = runs.claim(tmp_path / "run", Path("a.yaml"))
    with runs.held(place):
        runs.begin(place, "a: 1\n", "")
        runs.withdraw(place)
        with pytest.raises(InUseError), runs.held(place):
            pass
    (place / "config.yaml").write_text("a: 2\n")  # of a run that was quicker
    with runs.held(place), pytest.raises(ConfigError, match="not empty"):
        runs.check_empty(place)
    runs.remove_empty(place)
    assert (place / "config.yaml").exists()
    (place / "config.yaml").unlink()
    runs.remove_empty(place)
    assert not place.exists()


def read_figures(place):
    run = runs.Run.open(place)
    return run.number("epochs"), run.figures("test"), run.number("seconds", "total")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "It is [1, 2]; keys with values are needed"),
        ("[" * 100_000, "recursion"),
        ("1" * 5000, "Exceeds the limit"),
        ("{}", "'epochs' is None; a number is needed"),
        ('{"epochs": "two"}', "'epochs' is 'two'; a number is needed"),
        ('{"epochs": true}', "'epochs' is True"),
        ('{"epochs": 2}', "'test' is None; names with numbers are needed"),
        ('{"epochs": 2, "test": {"accuracy": "high"}}', "'test' is {'accuracy': 'high'}"),
        ('{"epochs": 2, "test": {"accuracy": null}, "seconds": 3}', "'seconds.total' is None"),
    ],
)
def test_figures_that_were_edited_are_refused_with_a_way_out(tmp_path, text, told):
    (tmp_path / "adapter").mkdir()
    for name in ("config.yaml", "adapter/adapter.json"):
        (tmp_path / name).touch()
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(FileError) as caught:
        read_figures(tmp_path)
    assert told in str(caught.value)
    assert f"`vispeft train --finish {tmp_path}` measures the run again." in str(caught.value)
