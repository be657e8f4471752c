"""What sharing must not do: delete a user's files, or leave a zoo that cannot be read. Nothing is trained or built."""

import dataclasses
from pathlib import Path
from urllib.request import Request

import pytest
import yaml

import vispeft.zoo.pull
from vispeft.cli.evaluate import safe_settings
from vispeft.cli.runs import Run
from vispeft.cli.zoo import zoo_table
from vispeft.cli.zoo_push import _has_own_weights, model_card, push_adapter
from vispeft.errors import ConfigError, FileError
from vispeft.zoo.adapters import ZooAdapter, find_adapter
from vispeft.zoo.hub import _asked
from vispeft.zoo.index import FILES, INDEX, ZooEntry, describe_file, read_index, write_index
from vispeft.zoo.install import remove_adapter
from vispeft.zoo.pull import Wanted, pull
from vispeft.zoo.sources import _SafeRedirects, find_source


def make_adapter(zoo, name, card="a card", metrics="", **changes):
    """Write a zoo with one adapter, whose files have nothing in them but the card, and list it beside others."""
    (zoo / name).mkdir(parents=True)
    texts = {"CARD.md": card, "metrics.json": metrics}
    for file in FILES:
        (zoo / name / file).write_text(texts.get(file, ""))
    given = {"figures": {"accuracy": 0.5}, "baseline": None, **changes}
    entry = ZooEntry(
        name=name,
        task="classification",
        data="digits",
        needs="",
        backbone="vit_tiny_patch16_224",
        method="ssf",
        trainable=1,
        license="MIT",
        files={file: describe_file(zoo / name / file) for file in sorted(FILES)},
        **given,
    )
    write_index(zoo, {**read_index(zoo), name: entry})
    return ZooAdapter(entry, zoo)


@pytest.fixture
def mine(tmp_path):
    return make_adapter(tmp_path / "zoo", "mine")


def test_a_folder_that_is_no_adapter_is_kept(mine, tmp_path):
    runs = tmp_path / "runs"
    precious = runs / "mine" / "1" / "precious.ckpt"
    precious.parent.mkdir(parents=True)
    precious.write_text("weeks of work")
    with pytest.raises(FileError, match=r"is no adapter of this zoo \(found 1\)"):
        push_adapter(mine, f"{runs}/")
    assert precious.read_text() == "weeks of work"
    assert read_index(runs) == {}


def test_a_link_and_a_file_are_kept(mine, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    target.mkdir()
    elsewhere.mkdir()
    (elsewhere / "CARD.md").write_text("kept")
    (target / "mine").symlink_to(elsewhere)
    with pytest.raises(FileError, match="found a link"):
        push_adapter(mine, f"{target}/")
    (target / "mine").unlink()
    (target / "mine").write_text("kept")
    with pytest.raises(FileError, match="Not a directory"):
        push_adapter(mine, f"{target}/")
    assert (target / "mine").read_text() == (elsewhere / "CARD.md").read_text() == "kept"


def test_what_a_killed_process_left_is_replaced(mine, tmp_path):
    target = tmp_path / "target"
    (target / "mine").mkdir(parents=True)
    (target / "mine" / "CARD.md").write_text("half a c")
    push_adapter(mine, f"{target}/")
    assert (target / "mine" / "CARD.md").read_text() == "a card"
    remove_adapter(target, "mine")
    assert {path.name for path in target.iterdir()} == {INDEX}


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("the figures", {"figures": {}}),
        ("the baseline", {"baseline": {"miou": 0.5}}),
        ("the baseline", {"baseline": {"accuracy": 0.5, "miou": 0.5}}),
        ("the baseline", {"baseline": {}}),
        ("the baseline", {"baseline": {"accuracy": 0.0}}),
        ("the baseline", {"baseline": {"accuracy": -0.5}}),
    ],
)
def test_an_index_of_which_no_table_can_be_made(tmp_path, says, changes):
    with pytest.raises(FileError, match=f"{says} .* of mine"):
        make_adapter(tmp_path / "zoo", "mine", **changes)
    assert read_index(tmp_path / "zoo") == {}


def test_the_table_has_the_gain_over_the_baseline(tmp_path):
    adapter = make_adapter(tmp_path / "zoo", "mine", baseline={"accuracy": 0.4})
    assert zoo_table({"mine": adapter.entry})[0][4:6] == ["accuracy 50.0%", "+25.0 %"]


@pytest.mark.parametrize("address", ["https://[::1", "https://a:b/zoo", "https://", "https://a:99999/x", "http://[::1"])
def test_what_is_no_address(address):
    with pytest.raises(ConfigError, match="address"):
        find_source(address)


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        ("https://example.org/zoo", "http://127.0.0.1/admin", False),
        ("https://example.org/zoo", "http://localhost:8080/", False),
        ("https://example.org/zoo", "https://[::1", False),
        ("https://example.org/zoo", "file:///etc/passwd", False),
        ("http://localhost/zoo", "http://example.org/zoo", False),
        ("https://example.org/zoo", "https://example.net/zoo", True),
        ("http://localhost/zoo", "http://127.0.0.1/zoo", True),
        ("http://localhost/zoo", "https://example.org/zoo", True),
    ],
)
def test_where_a_redirection_may_lead(first, second, allowed):
    def follow():
        return _SafeRedirects().redirect_request(Request(first), None, 302, "Found", {}, second)

    if allowed:
        assert follow().full_url == second
    else:
        with pytest.raises(ConfigError, match="address"):
            follow()


@pytest.mark.parametrize("source", [None, "me/shells@main"])
def test_a_pulled_adapter_is_one_of_others_however_it_is_named(tmp_path, monkeypatch, source):
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    adapter = make_adapter(tmp_path / "cache" / "zoo", "mine", metrics="{}", source=source)
    (tmp_path / "link").symlink_to(adapter.folder)
    monkeypatch.chdir(adapter.zoo)
    for named in ("zoo:mine", adapter.folder, f"{adapter.folder}/", "mine", tmp_path / "link"):
        assert Run.open(named).foreign is (source is not None), named


def test_data_of_others_are_read_without_processes():
    for foreign, workers in ((True, 0), (False, 8000)):
        settings = {"batch_size": 8, "num_workers": 8000}
        tree = {"data": {"class_path": "vispeft.data.DigitsData", "init_args": settings}}
        safe_settings(Run(Path("run"), {}, foreign=foreign), tree)
        assert tree["data"]["init_args"] == {"batch_size": 8, "num_workers": workers}


def test_a_renamed_adapter_is_pulled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    for name in ("mine", "other", "sea"):
        adapter = make_adapter(tmp_path / "zoo", name, card=name)
    own = tmp_path / "cache" / "zoo"
    pull(str(adapter.zoo), Wanted(adapter="mine", name="sea"), lambda *_: None)
    assert read_index(own)["sea"].named_there == "mine"
    (own / "sea" / "CARD.md").write_text("damaged")
    with pytest.raises(FileError, match="vispeft zoo pull sea"):
        find_adapter("zoo:sea")
    assert pull("sea", Wanted(), lambda *_: None)[1]
    assert (own / "sea" / "CARD.md").read_text() == "mine"


def test_a_name_that_another_process_takes_meanwhile(tmp_path, monkeypatch):
    """Two pulls of one name: the second finds it taken once it may change the zoo, and replaces nothing."""
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    first = make_adapter(tmp_path / "first", "mine", card="the first one")
    second = make_adapter(tmp_path / "second", "mine", card="the second one")
    hold = vispeft.zoo.pull.held_zoo

    def other_comes_first(zoo):
        monkeypatch.setattr("vispeft.zoo.pull.held_zoo", hold)
        pull(str(first.zoo), Wanted(), lambda *_: None)
        return hold(zoo)

    monkeypatch.setattr("vispeft.zoo.pull.held_zoo", other_comes_first)
    with pytest.raises(ConfigError, match="installed already, with other content"):
        pull(str(second.zoo), Wanted(), lambda *_: None)
    assert (tmp_path / "cache" / "zoo" / "mine" / "CARD.md").read_text() == "the first one"


@pytest.mark.parametrize("name", ["parts", "pulling", "adding", "before", "index", "zoo"])
def test_names_that_folders_of_our_own_might_have(tmp_path, monkeypatch, name):
    monkeypatch.setenv("VISPEFT_CACHE", str(tmp_path / "cache"))
    adapter = make_adapter(tmp_path / "zoo", name)
    assert pull(str(adapter.zoo), Wanted(), lambda *_: None)[1]
    assert find_adapter(f"zoo:{name}") == tmp_path / "cache" / "zoo" / name
    assert {path.name for path in (tmp_path / "cache" / "zoo").iterdir()} == {name, INDEX}


@pytest.mark.parametrize(
    ("backbone", "base", "found"),
    [
        ("zoo:vit_tiny", None, "it comes with vispeft (model_zoo/backbones/vit_tiny)"),
        ("vit_base_patch16_224.mae", "timm/vit_base_patch16_224.mae", "timm/vit_base_patch16_224.mae has weights"),
        ("vit_tiny_patch16_224", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "has weights for it"),
        ("vit_base_patch16_224.of_another_timm", None, "no repository has weights"),
    ],
)
def test_a_model_card_says_where_the_base_is_found(mine, backbone, base, found):
    text = model_card(dataclasses.replace(mine.entry, backbone=backbone), "the card")
    facts = yaml.safe_load(text.split("---")[1])
    assert facts.get("base_model") == base
    assert facts.get("base_model_relation") == (base and "adapter")
    assert found in text


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, False),
        ({"backbone_args": None, "weights": None}, False),
        ({"backbone_args": {"pretrained": True}}, False),
        ({"backbone_args": {"pretrained": False}}, True),
        ({"weights": "/home/me/vit.safetensors"}, True),
    ],
)
def test_a_base_with_weights_of_its_own_is_not_named_as_one_of_the_hub(mine, settings, own):
    """As in peft 2124: a model from the disk has the name of one on the hub."""
    (mine.folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": settings}}))
    assert _has_own_weights(mine.folder / "config.yaml") is own
    facts = yaml.safe_load(model_card(mine.entry, "the card", own_weights=own).split("---")[1])
    assert ("base_model" in facts) is not own
    assert ("base_model_relation" in facts) is not own


@pytest.mark.parametrize(
    ("stated", "facts"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC BY 4.0", {"license": "cc-by-4.0"}),
        ("not stated", {"license": "unknown"}),
        ("ask me", {"license": "other", "license_name": "ask me"}),
    ],
)
def test_a_licence_in_the_words_of_the_hub(mine, stated, facts):
    text = model_card(dataclasses.replace(mine.entry, license=stated), "the card")
    found = yaml.safe_load(text.split("---")[1])
    assert {key: value for key, value in found.items() if key.startswith("license")} == facts


def test_a_card_that_the_hub_refuses():
    def ask(api):
        raise ValueError("Invalid metadata in README.md.\n- the key tags has to be a list")

    with pytest.raises(ConfigError, match=r"refuses the model card.*tags has to be a list"):
        _asked("me/shells", ask)
