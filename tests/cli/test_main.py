"""The console command and the scripts of ``tools/``: one function per name."""

import ast
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.fresh import run
from vispeft.cli import evaluation
from vispeft.cli import main as command_line
from vispeft.cli.common import quiet_libraries
from vispeft.cli.main import COMMANDS, command, main
from vispeft.resources import config_names, package_version

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("lightning", "numpy", "timm", "torch", "torchvision")


def script(name):
    return ROOT / "tools" / f"{name.replace('-', '_')}.py"


def test_every_script_is_a_command_and_the_other_way_round():
    assert sorted(path.name for path in (ROOT / "tools").glob("*.py")) == sorted(script(name).name for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_and_its_script_are_one_function(name, monkeypatch):
    calls = []

    def record(argv):
        calls.append(argv)

    module = sys.modules[command(name).__module__]
    monkeypatch.setattr(module, "main", record)
    assert main([name, "one", "--two", "3"]) == 0
    monkeypatch.setattr(sys, "argv", [str(script(name)), "one", "--two", "3"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script(name)), run_name="__main__")
    assert left.value.code == 0
    assert calls == [["one", "--two", "3"]] * 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_by_an_example(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vispeft {name} ")
    assert f"  vispeft {name}" in text.partition("example")[2]
    assert f"`vispeft {name}`" in ast.get_docstring(ast.parse(script(name).read_text()))


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]], ids=lambda argv: " ".join(argv) or "nothing")
def test_help_lists_the_commands(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n  {name} " not in text] == []


def test_help_and_errors_import_nothing_heavy():
    code = f"""
import sys
from vispeft.cli.main import main
assert main(["--help"]) == 0 and main(["--version"]) == 0 and main(["trian"]) == 2
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert done.stderr == "error: Unknown command 'trian'. Did you mean 'train'? `vispeft --help` lists them.\n"


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(command_line, "package_version", lambda: "9.8")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "vispeft 9.8\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "vispeft", "--version"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"vispeft {package_version()}\n"
    done = subprocess.run([sys.executable, "-m", "vispeft", "trian"], capture_output=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2


def test_scripts_run_from_anywhere(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VISPEFT_DEBUG")}
    result = subprocess.run(
        [sys.executable, str(script("inspect")), "vit_tiny_patch16_224", "ssff"],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: Unknown method 'ssff'. Did you mean 'ssf'?")


def test_train_lists_the_packaged_configs(capsys):
    assert main(["train", "--list"]) == 0
    assert capsys.readouterr().out.split() == config_names()


def test_the_list_takes_no_heavy_imports():
    """PyTorch alone took eight seconds."""
    lines = run("from vispeft.cli.main import main\nmain(['train', '--list'])\nprint('torch' in sys.modules)")
    assert lines == [*config_names(), "False"]


def test_lightning_s_own_lines_are_not_shown(caplog):
    """Importing it sets the level of its package, and so devices and tips stood among the output of every command."""
    from lightning.fabric.utilities import rank_zero as fabric
    from lightning.pytorch.utilities import rank_zero as pytorch

    with caplog.at_level(logging.INFO):
        quiet_libraries()
        for package in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(package).setLevel(logging.INFO)
        pytorch.rank_zero_info("GPU available: False")
        fabric.rank_zero_info("a tip")
        logging.getLogger(pytorch.__name__).warning("seen")
    assert caplog.messages == ["seen"]


@pytest.mark.parametrize(("seen", "told"), [([1], "1 of 4 batches were measured"), ([4], ""), ([0], "0 of 4")])
def test_partial_figures_are_said_to_be_partial(seen, told, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vispeft"), "propagate", True)
    trainer = SimpleNamespace(num_test_batches=seen, test_dataloaders=[1, 2, 3, 4], limit_test_batches=seen[0])
    evaluation.tell_if_partial(trainer, "test")
    assert (told in caplog.text) if told else not caplog.text


def test_a_packaged_config_is_named_without_path_and_ending(run_cli, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "classification/digits_ssf", "--print_config"])
    assert "class_path: vispeft.SSF" in capsys.readouterr().out
    assert "SSF on vit:" in run_cli("inspect", "zoo:vit_tiny", "classification/digits_ssf").out
    near = "Unknown config 'classification/digit_ssf'. Did you mean 'classification/digits_ssf'"
    assert near in run_cli("train", "classification/digit_ssf").err
    assert near in run_cli("inspect", "zoo:vit_tiny", "classification/digit_ssf").err
    assert list(tmp_path.iterdir()) == []
