"""No config, override or run directory runs code: nothing is started or imported, and objects are of listed classes."""

import runpy
import shutil
import sys

import pytest
import yaml
from PIL import Image

from tests.cli.conftest import call
from tests.tiny import CONFIG
from vispeft.building.known import register_class
from vispeft.cli.config import ConfigCLI
from vispeft.cli.config_keys import check_config, split_overrides
from vispeft.cli.trackers import make_trackers
from vispeft.data import DigitsData
from vispeft.errors import ConfigError, VispeftError

PLANTED = {
    "backbone_args": "model.init_args.backbone_args.x",
    "deep in backbone_args": "model.init_args.backbone_args.x.y.0.z",
    "a field of the method": "model.init_args.method.init_args.roles",
    "the optimiser": "model.init_args.optimizer.init_args.betas",
    "the method": "model.init_args.method",
    "the task": "model",
    "weights": "model.init_args.weights",
    "the data": "data",
    "a setting of the data": "data.init_args.batch_size",
    "augmentation": "data.init_args.augment",
    "a callback": "trainer.callbacks.0",
    "a callback alone": "trainer.callbacks",
    "a logger": "trainer.logger",
    "plugins": "trainer.plugins",
    "a plugin": "trainer.plugins.0",
    "strategy": "trainer.strategy",
    "profiler": "trainer.profiler",
    "accelerator": "trainer.accelerator",
    "precision": "trainer.precision",
    "max_time": "trainer.max_time",
    "checkpoints": "checkpoints.minutes",
    "init": "init",
    "cache_features": "cache_features",
    "seed": "seed_everything",
}


def planted(tree, path, value):
    """Set a value in a config; a number is a place in a list that holds nothing else."""
    first, _, rest = path.partition(".")
    inner = planted(tree.get(first) if isinstance(tree, dict) else None, rest, value) if rest else value
    return [inner] if first.isdecimal() else {**(tree if isinstance(tree, dict) else {}), first: inner}


def evil(place):
    """A class that runs a command when it is made, in the forms in which parsers take it."""
    node = {"class_path": "os.system", "init_args": {"command": f"touch {place / 'MARKER'}"}}
    return {"mapping": node, "text": yaml.safe_dump(node, default_flow_style=True), "escaped": _escaped(place)}


def _escaped(place):
    return '{"class\\u005fpath": os.system, "init_args": {"command": "touch ' + str(place / "MARKER") + '"}}'


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A directory that looks like a finished run as far as tools read it before its config."""
    place = tmp_path_factory.mktemp("run")
    (place / "adapter").mkdir()
    (place / "adapter/adapter.json").write_text('{"class_names": ["a", "b"]}')
    (place / "metrics.json").write_text("{}")
    return place


@pytest.fixture(autouse=True)
def nothing_happened(tmp_path):
    before = set(sys.modules)
    yield
    assert not (tmp_path / "MARKER").exists()
    assert not {"antigravity", "this", "planted_module"} & (set(sys.modules) - before)


@pytest.mark.parametrize("path", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("form", ["mapping", "text", "escaped"])
def test_a_class_is_refused_wherever_it_stands(tmp_path, path, form):
    tree = planted(yaml.safe_load(CONFIG), path, evil(tmp_path)[form])
    with pytest.raises(VispeftError):
        ConfigCLI(tmp_path / "a.yaml", [], tree=tree)


@pytest.mark.parametrize("path", [path for path in PLANTED.values() if ".0" not in path])
@pytest.mark.parametrize("form", ["mapping", "escaped"])
def test_a_class_is_refused_in_an_override(tmp_path, path, form):
    value = evil(tmp_path)[form]
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    for overrides in ([f"--{path}={text}"], [f"--{path}.class_path=os.system", f"--{path}.init_args.command=ls"]):
        with pytest.raises(VispeftError):
            ConfigCLI(tmp_path / "a.yaml", overrides, tree=yaml.safe_load(CONFIG))


@pytest.mark.parametrize("tool", ["predict", "evaluate", "merge", "export", "select_features", "resume"])
def test_no_tool_makes_an_object_that_a_run_directory_names(opened, tmp_path, tool):
    run = tmp_path / "run"
    shutil.copytree(opened, run)
    tree = planted(yaml.safe_load(CONFIG), "model.init_args.backbone_args.x", evil(tmp_path)["mapping"])
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    if tool == "resume":
        (run / "metrics.json").unlink()  # of a finished run, the config is not looked at
    arguments = {
        "predict": (run, tmp_path / "a.png", "--out", tmp_path / "out"),
        "evaluate": (run,),
        "merge": (run, "--out", tmp_path / "out.safetensors"),
        "export": (run, "--format", "onnx", "--out", tmp_path / "out.onnx"),
        "select_features": (run, run, "--out", tmp_path / "out"),
        "resume": ("--resume", run),
    }[tool]
    result = call("train" if tool == "resume" else tool, *arguments)
    assert result.status == 2
    assert "has the key class_path, and only plain values are taken there" in result.err


NAMES = {
    "task": ("model.class_path", "Unknown task"),
    "data": ("data", "Unknown data module"),
    "method": ("model.init_args.method", "Unknown method"),
    "optimiser": ("model.init_args.optimizer", "Unknown optimizer"),
    "callback": ("trainer.callbacks", "Unknown callback"),
    "callback in a list": ("trainer.callbacks.0.class_path", "Unknown callback"),
    "logger": ("trainer.logger", "Unknown logger"),
}


@pytest.mark.parametrize(("path", "message"), NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("name", ["antigravity.x", "this.s", "planted_module.Method", "os.system"])
def test_no_module_is_imported_for_a_name(tmp_path, monkeypatch, path, message, name):
    (tmp_path / "planted_module.py").write_text(f"open({str(tmp_path / 'MARKER')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_config(planted(yaml.safe_load(CONFIG), path, name), [], "a.yaml")
    key = path.removesuffix(".0.class_path")
    with pytest.raises(ConfigError, match=message):
        check_config(yaml.safe_load(CONFIG), [(key, name)], "a.yaml")


REFUSED = {
    "a function": (
        "trainer.callbacks",
        "{class_path: ModelPruning, init_args: {pruning_fn: os.system}}",
        "object",
    ),
    "functions": ("trainer.callbacks", "{class_path: LambdaCallback, init_args: {setup: os.system}}", "it calls funct"),
    "checkpoints of one's own": ("trainer.callbacks", "ModelCheckpoint", "keeps its own checkpoints"),
    "a rate that no config states": ("trainer.callbacks", "[LearningRateFinder]", "it changes model.lr"),
    "a batch that no config states": ("trainer.callbacks", "BatchSizeFinder", "it changes data.batch_size"),
    "a backbone that wakes": ("trainer.callbacks", "BackboneFinetuning", "there is the method Full"),
    "the run's own callback": ("trainer.callbacks", "vispeft.tasks.checkpoints.RunCheckpoints", "Unknown callback"),
    "an unknown argument": ("trainer.callbacks", "{class_path: EarlyStopping, init_args: {monitr: x}}", "monitor"),
    "an object as argument": ("trainer.callbacks", "{class_path: RichProgressBar, init_args: {theme: x.y}}", "Theme"),
    "further arguments": ("model", "{class_path: Classification, dict_kwargs: {x: 1}}", "model.dict_kwargs is given"),
    "plugins": ("trainer.plugins", "[AsyncCheckpointIO]", "trainer.plugins takes objects"),
    "a strategy's class": ("trainer.strategy", "{class_path: DDPStrategy}", "only plain values are taken there"),
    "a section from a file": ("trainer", "evil.yaml", "keys with values are needed"),
    "a section in one": ("trainer", "{callbacks: [{class_path: os.system}]}", "Unknown callback 'os.system'"),
    "a list from a file": ("model.method.roles", "evil.yaml", "which is no value for it"),
    "help for a class": ("data.help", "os.system", "Unknown data module 'os.system'"),
    "help elsewhere": ("model.init_args.backbone_args.help", "os.system", "leave it out"),
    "sixty by sixty": ("data.batch_size", "1:04", "which is no value for it"),
    "a key twice": ("model.backbone_args", "{depth: 1, depth: 2}", "the key 'depth' twice"),
}


@pytest.mark.parametrize(("key", "value", "message"), REFUSED.values(), ids=REFUSED)
def test_an_override_is_refused(tmp_path, monkeypatch, key, value, message):
    (tmp_path / "evil.yaml").write_text("class_path: os.system")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_config(yaml.safe_load(CONFIG), split_overrides([f"--{key}={value}"]), "a.yaml")


def test_a_file_with_the_name_of_a_value_is_not_read(tmp_path, monkeypatch):
    node = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path / 'MARKER'}"}}
    for name in ("auto", "cpu", "simple"):
        (tmp_path / name).write_text(yaml.safe_dump(node))
    monkeypatch.chdir(tmp_path)
    overrides = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.profiler=simple"]
    cli = ConfigCLI(tmp_path / "a.yaml", overrides, tree=yaml.safe_load(CONFIG))
    names = [cli.trainer_settings[name] for name in ("accelerator", "strategy", "profiler")]
    assert names == ["cpu", "auto", "simple"]


def test_callbacks_and_loggers_of_lightning_are_made_by_name(tmp_path):
    overrides = [
        "--trainer.callbacks=EarlyStopping",
        "--trainer.callbacks.monitor=validation/loss",
        "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.LearningRateMonitor}",
        f"--trainer.logger={{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}}}}}",
    ]
    cli = ConfigCLI(tmp_path / "a.yaml", overrides, tree=yaml.safe_load(CONFIG))
    first, second = cli.trainer_settings["callbacks"]
    assert (type(first).__name__, first.monitor, type(second).__name__) == (
        "EarlyStopping",
        "validation/loss",
        "LearningRateMonitor",
    )
    assert cli.trainer_settings["logger"] is None  # a training makes it, and no other command
    (tracker,) = make_trackers(tmp_path, cli)
    assert type(tracker._make()).__name__ == tracker.title == "CSVLogger"
    again = ConfigCLI(tmp_path / "a.yaml", [], tree=yaml.safe_load(cli.resolved()))
    assert again.resolved() == cli.resolved()
    assert list(tmp_path.iterdir()) == []


def test_schedules_over_blocks_are_named(tmp_path):
    decays = "{class_path: TensorDecay, init_args: {decays: {A: 0.0, B: 0.5}}}"
    progressive = "{class_path: vispeft.tasks.ProgressiveLayers, init_args: {until: 0.3}}"
    overrides = [
        "--trainer.callbacks=SampledLayers",
        "--trainer.callbacks.share=0.5",
        f"--trainer.callbacks+={progressive}",
        f"--trainer.callbacks+={decays}",
    ]
    cli = ConfigCLI(tmp_path / "a.yaml", overrides, tree=yaml.safe_load(CONFIG))
    drawn, rising, decay = cli.trainer_settings["callbacks"]
    assert (type(drawn).__name__, drawn.share, rising.until, decay.decays) == (
        "SampledLayers",
        0.5,
        0.3,
        {"A": 0.0, "B": 0.5},
    )
    again = ConfigCLI(tmp_path / "a.yaml", [], tree=yaml.safe_load(cli.resolved()))
    assert again.resolved() == cli.resolved()


class Numbers(DigitsData): ...


def test_a_class_of_one_s_own_is_named_once_it_is_on_the_list(tmp_path):
    tree = planted(yaml.safe_load(CONFIG), "data", "Numbers")
    with pytest.raises(ConfigError, match=r"Unknown data module 'Numbers'.*--code MODULE"):
        check_config(tree, [], "a.yaml")
    register_class(Numbers)
    check_config(tree, [], "a.yaml")
    assert tree["data"]["class_path"].endswith("Numbers")


CODE = """
from lightning.pytorch import Callback
from vispeft.data import DigitsData

class OwnDigits(DigitsData): ...

class OwnCallback(Callback):
    def __init__(self, size: int = 1): self.size = size
"""


REGISTERED = """
from own_digits import OwnCallback, OwnDigits
from vispeft.building.known import register_class
register_class(OwnDigits), register_class(OwnCallback)
"""
SCRIPT = """
import registered, sys
from vispeft.cli.main import run_command
sys.exit(run_command(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.slow
def test_code_of_one_s_own_is_named_on_the_command_line_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("vispeft.building.known._MODULES", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_digits.py").write_text(CODE)
    text = CONFIG.replace("vispeft.data.DigitsData", "OwnDigits") + "  callbacks: [OwnCallback]\n"
    (tmp_path / "own.yaml").write_text(text.replace("max_epochs: 2", "max_epochs: 1"))
    assert "Unknown callback 'OwnCallback'" in call("train", tmp_path / "own.yaml").err
    for wrong, message in (("none.py", "no such file"), ("a b", "import path"), ("not_there", "could not be imported")):
        assert message in call("train", tmp_path / "own.yaml", "--code", wrong).err
    code = ("--code", tmp_path / "own_digits.py")
    result = call("train", tmp_path / "own.yaml", *code, "--out", tmp_path / "run")
    assert result.status == 0, result.err
    monkeypatch.setattr("vispeft.building.known._MODULES", set())  # as in another process
    (tmp_path / "run/metrics.json").unlink()
    assert "Unknown callback 'own_digits.OwnCallback'" in call("train", "--resume", tmp_path / "run").err
    assert call("train", "--resume", tmp_path / "run", *code).status == 0
    monkeypatch.setattr("vispeft.building.known._MODULES", set())
    refused = call("evaluate", tmp_path / "run").err
    assert "Unknown data module" in refused
    assert "vispeft.cli.main.run_command" in refused
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert call("predict", tmp_path / "run", tmp_path / "a.png", "--out", tmp_path / "p").status == 0
    monkeypatch.setattr("vispeft.building.known._CLASSES", set())
    (tmp_path / "registered.py").write_text(REGISTERED)
    (tmp_path / "my_tools.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["my_tools.py", "evaluate", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(tmp_path / "my_tools.py"))


MODEL = "{class_path: Classification, init_args: {backbone: vit_tiny, method: ssf, optimizer: SGD, lr: 0.5}}"


@pytest.mark.parametrize(
    ("overrides", "section", "wanted"),
    [
        (["--trainer.max_epochs=3", "--trainer={max_epochs: 7}"], "trainer", {"max_epochs": 7}),
        (["--trainer={max_epochs: 7}", "--trainer.max_epochs=3"], "trainer", {"max_epochs": 3}),
        (["--trainer.max_epochs=3", "--trainer={max_time: 00:01:00:00}"], "trainer", {"max_epochs": 3}),
        (["--checkpoints.minutes=1", "--checkpoints={minutes: 2}"], "checkpoints", {"minutes": 2.0}),
        (["--model.lr=0.1", f"--model={MODEL}"], "model", {"lr": 0.5}),
        ([f"--model={MODEL}", "--model.lr=0.1"], "model", {"lr": 0.1}),
        (["--model.optimizer=RMSprop", f"--model={MODEL}"], "model", {"optimizer": "torch.optim.SGD"}),
        ([f"--model={MODEL}", "--model.optimizer=RMSprop"], "model", {"optimizer": "torch.optim.RMSprop"}),
    ],
)
def test_the_last_of_several_overrides_wins(tmp_path, overrides, section, wanted):
    cli = ConfigCLI(tmp_path / "a.yaml", overrides, tree=yaml.safe_load(CONFIG), create=False)
    found = yaml.safe_load(cli.resolved())[section]
    found = found.get("init_args", found)
    found = {name: found[name]["class_path"] if name == "optimizer" else found[name] for name in wanted}
    assert found == wanted
