import contextlib
import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tiny import CONFIG
from vispeft.cli import (
    demo,
    doctor,
    embed,
    evaluate,
    export,
    inspect,
    merge,
    predict,
    report,
    search,
    select_features,
    train,
)
from vispeft.cli.common import run_tool

TOOLS = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "embed": embed,
    "report": report,
    "search": search,
    "merge": merge,
    "export": export,
    "inspect": inspect,
    "demo": demo,
    "doctor": doctor,
    "select_features": select_features,
}


def call(tool, *argv):
    """Run a tool in this process."""
    out, err = io.StringIO(), io.StringIO()
    # rich asks for the width of the terminal; a wide one keeps messages on one line
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run_tool(TOOLS[tool].main, [str(argument) for argument in argv])
        except SystemExit as ended:
            status = ended.code
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def run_cli():
    return call


@pytest.fixture(scope="session")
def call_cli():
    return call


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run, made once; tests must not change it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.yaml").write_text(CONFIG)
    result = call("train", folder / "tiny.yaml", "--out", folder / "run", "--model.label_smoothing=0.1")
    assert result.status == 0, result.err
    return Path(folder / "run")
