"""Pulling and pushing: folders, a web server and a hub of this machine; nothing of them is trusted."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

import vispeft
from tests.zoo.server import COMMIT, Handler, serving
from vispeft.cli.zoo_push import model_card
from vispeft.cli.zoo_trust import check_foreign
from vispeft.errors import ConfigError, FileError, UnknownNameError
from vispeft.zoo import find_adapter
from vispeft.zoo.index import FILES, INDEX, describe_file, read_index, write_index
from vispeft.zoo.pull import Wanted, pull


@pytest.fixture(scope="module")
def served(made_zoo, tmp_path_factory):
    """A server with the zoo at /zoo, and as the repository me/shells."""
    root = tmp_path_factory.mktemp("served")
    for place in ("zoo", "me/shells"):
        shutil.copytree(made_zoo, root / place)
    with serving(root) as server:
        yield server


@pytest.fixture
def server(served):
    """The server, as it was made."""
    served.asked.clear()
    served.cut, served.more = None, b""
    return served


@pytest.fixture
def hub(server, monkeypatch):
    """The server as the hub that the client asks."""
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    return server


def get(source, **wanted):
    return pull(str(source), Wanted(**wanted), check_foreign)


def left(zoo):
    return {path.name for path in zoo.iterdir()}


def test_from_a_folder(made_zoo, empty):
    entry, fetched = get(made_zoo)
    assert fetched
    assert entry.source == str(made_zoo.resolve())
    assert left(empty) == {"mine", INDEX}
    assert find_adapter("zoo:mine") == empty / "mine"
    assert get(made_zoo) == (entry, False)
    assert get("mine") == (entry, False)
    assert get(made_zoo, name="other")[0].name == "other"
    made = vispeft.zoo.create("other")
    assert made.entry.source is not None
    (empty / "mine" / "CARD.md").write_text("changed")
    assert get("zoo:mine")[1]
    assert find_adapter("zoo:mine")


def test_from_a_web_server(server, empty):
    entry, fetched = get(f"{server.address}/zoo/")
    assert fetched
    assert entry.source == f"{server.address}/zoo"
    assert find_adapter("zoo:mine") == empty / "mine"
    assert sorted(path for _, path, _ in server.asked) == sorted(
        ["/zoo/index.json", *(f"/zoo/mine/{f}" for f in FILES)]
    )


def test_a_download_that_was_cut_goes_on(server, empty):
    server.cut = 3000
    with pytest.raises(FileError, match="goes on"):
        get(f"{server.address}/zoo")
    assert INDEX not in left(empty)
    server.asked.clear()
    get(f"{server.address}/zoo")
    assert [asked for *_, asked in server.asked if asked] == ["bytes=3000-"]
    assert find_adapter("zoo:mine")
    assert left(empty) == {"mine", INDEX}


def test_a_server_that_sends_more_or_other_bytes(server, empty, made_zoo):
    server.more = b"x"
    with pytest.raises(FileError, match="valid JSON"):
        get(f"{server.address}/zoo")
    server.more = b""
    place = server.root / "zoo" / "mine" / "CARD.md"
    whole = place.read_bytes()
    try:
        place.write_bytes(whole + b"more")
        with pytest.raises(FileError, match="sends more of"):
            get(f"{server.address}/zoo")
        place.write_bytes(whole[:-1] + b"x")
        with pytest.raises(FileError, match=r"CARD\.md of mine .* is not the one"):
            get(f"{server.address}/zoo")
        place.unlink()
        with pytest.raises(FileError, match="404"):
            get(f"{server.address}/zoo")
    finally:
        place.write_bytes(whole)
    assert INDEX not in left(empty)
    get(f"{server.address}/zoo")
    assert find_adapter("zoo:mine")


def test_addresses_that_are_refused(empty, monkeypatch):
    for address in ("http://example.org/zoo", "file:///etc", "ftp://example.org/zoo"):
        with pytest.raises(ConfigError, match="https"):
            get(address)
    for given in ("nothing here", "a/b/c", "./none", "/none/there"):
        with pytest.raises(ConfigError, match="is no source"):
            get(given)
    with pytest.raises(FileError, match="cannot be reached"):
        get("http://127.0.0.1:9/zoo")
    monkeypatch.setenv("VISPEFT_OFFLINE", "1")
    with pytest.raises(FileError, match="forbids the network"):
        get("https://example.org/zoo")
    assert not empty.exists()


def test_from_a_hub_and_from_its_cache(hub, empty, monkeypatch):
    entry, fetched = get("me/shells")
    assert fetched
    assert entry.source == f"me/shells@{COMMIT}"
    assert find_adapter("zoo:mine")
    assert all(COMMIT in path for method, path, _ in hub.asked if "/resolve/" in path)
    assert left(empty.parent) == {"zoo", "hub"}
    shutil.rmtree(empty)
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileError, match="Give the commit"):
        get("me/shells")
    assert get(f"me/shells@{COMMIT}")[1]
    assert not hub.asked
    with pytest.raises(FileError, match="not in the cache"):
        get(f"me/shells@{'d' * 40}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [INDEX, "mine/adapter.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "longer", "shorter", "gone"])
def test_a_damaged_copy_in_the_cache_of_the_hub_is_fetched_anew(hub, empty, name, damage, monkeypatch):
    """As in huggingface_hub 3643 and 3371: its client takes what its cache holds for whole."""
    get("me/shells")
    shutil.rmtree(empty)
    (kept,) = (empty.parent / "hub").rglob(f"snapshots/{COMMIT}/{name}")
    whole = kept.read_bytes()
    changed = {"flipped": bytes([whole[0] ^ 1]) + whole[1:], "longer": whole + b"x" * 10_000, "shorter": whole[:-1]}
    if damage == "gone":
        kept.resolve().unlink()  # a link stays that leads nowhere
    else:
        kept.resolve().write_bytes(changed[damage])
    assert get("me/shells")[1]
    assert find_adapter("zoo:mine")
    assert kept.read_bytes() == whole


@pytest.mark.slow
def test_a_download_from_a_hub_that_was_cut_ends_whole(hub, empty):
    """As in huggingface_hub 1396: half of a file is never taken for all of it."""
    hub.cut = 300
    for _ in range(2):  # whether its client goes on by itself depends on its version
        with contextlib.suppress(FileError):
            get("me/shells")
    assert find_adapter("zoo:mine")
    assert hub.cut is None
    assert len([path for method, path, _ in hub.asked if method == "GET" and path.endswith(f"{COMMIT}/{INDEX}")]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("links", ["0", "1"])
def test_a_cache_of_the_hub_without_links(hub, empty, links):
    """As in huggingface_hub 4022: a disk that cannot hold links. The client reads the variable when it is imported."""
    env = {**os.environ, "HF_HUB_DISABLE_SYMLINKS": links}
    script = "import sys; from vispeft.cli.main import main; sys.exit(main(['zoo', 'pull', 'me/shells']))"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = list((empty.parent / "hub").rglob(f"snapshots/{COMMIT}/mine/adapter.safetensors"))
    assert [path.is_symlink() for path in kept] == [links == "0"]
    assert find_adapter("zoo:mine")


@pytest.mark.slow
def test_a_hub_that_fails_between_two_answers(hub, empty, monkeypatch):
    """As in huggingface_hub 3007: its client then gives what the cache has, which is not all of it."""
    get("me/shells")
    shutil.rmtree(empty)
    for kept in (empty.parent / "hub").rglob("adapter.safetensors"):
        kept.unlink()
    describe, asked = Handler.describe, []

    def describe_once(self, repository, revision):
        asked.append(revision)
        # The index: commit, sizes, and the client itself; then the sizes of each file, and the client again.
        return describe(self, repository, revision) if len(asked) % 2 or len(asked) < 3 else self.fail(503)

    monkeypatch.setattr(Handler, "describe", describe_once)
    with pytest.raises(FileError, match=r"cannot be reached|did not answer"):
        get("me/shells")
    assert not empty.exists() or not (empty / "mine").exists()
    monkeypatch.setattr(Handler, "describe", describe)
    assert get("me/shells")[1]


def test_what_a_hub_refuses(hub, empty, monkeypatch):
    with pytest.raises(FileError, match="no repository me/none"):
        get("me/none")
    with pytest.raises(FileError, match="no such revision"):
        get("me/shells@other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileError, match="cannot be reached"):
        get("me/shells")


def test_push_to_a_hub(hub, own, zoo_cli):
    pushed = zoo_cli("push", "mine", "me/pushed")
    assert pushed.status == 0, pushed.err
    assert f"me/pushed@{COMMIT}" in pushed.out
    text = (hub.root / "me" / "pushed" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: vispeft\nlicense: mit\n")
    assert "base_model" not in text, "its backbone was drawn; timm's weights of that name are others"
    assert "its weights are of a file or were drawn" in text
    assert text == model_card(read_index(own)["mine"], (own / "mine" / "CARD.md").read_text(), own_weights=True)
    assert get("me/pushed", name="again")[0].source == f"me/pushed@{COMMIT}"
    assert find_adapter("zoo:again")


def test_a_push_to_a_hub_keeps_the_other_adapters(hub, own, made_zoo, zoo_cli):
    def index():
        return read_index(hub.root / "me" / "pushed")

    assert zoo_cli("push", "mine", "me/pushed").status == 0
    assert zoo_cli("pull", str(made_zoo), "--name", "second").status == 0
    assert zoo_cli("push", "second", "me/pushed").status == 0
    assert index().keys() == {"mine", "second"}
    assert "zoo pull me/pushed --adapter mine" in (hub.root / "me" / "pushed" / "README.md").read_text()
    assert get("me/pushed", adapter="mine", name="first_again")[0].same_content(read_index(own)["mine"])
    before = index()
    (own / "mine" / "CARD.md").write_text("another card")
    relist(own)
    assert "with other content" in zoo_cli("push", "mine", "me/pushed").err
    assert index() == before


def test_push_to_a_folder(own, zoo_cli, tmp_path):
    target = tmp_path / "stick"
    (own / "mine" / "secret.txt").write_text("not of the adapter")
    (target / ".adding" / "mine").mkdir(parents=True)  # of a process that was killed
    (target / ".adding" / "mine" / "half.safetensors").touch()
    assert zoo_cli("push", "mine", f"{target}/").status == 0
    assert left(target) == {"mine", INDEX}
    assert left(target / "mine") == set(FILES)
    assert read_index(target)["mine"].same_content(read_index(own)["mine"])
    assert "neither" in zoo_cli("push", "mine", "a/b/c").err
    (own / "mine" / "CARD.md").write_text("changed")
    assert "truncated or altered" in zoo_cli("push", "mine", f"{target}/").err


def test_names_that_are_taken(made_zoo, own, tmp_path, zoo_cli):
    other = tmp_path / "other"
    shutil.copytree(made_zoo, other)
    (other / "mine" / "CARD.md").write_text("another card")
    relist(other)
    assert "installed already, with other content" in zoo_cli("pull", other).err
    assert "ships with the package" in zoo_cli("pull", other, "--name", "vit_tiny").err
    assert "is no name" in zoo_cli("pull", other, "--name", "../x").err
    assert zoo_cli("pull", other, "--name", "second").status == 0
    assert f"Here it is zoo:second; its card is that of {other.resolve()}." in zoo_cli("show", "second").out
    with pytest.raises(UnknownNameError, match="'mine'"):
        get(other, adapter="mien")
    with pytest.raises(FileError, match="at most 1,000"):
        get(other, name="third", largest=1000)
    with pytest.raises(ConfigError, match="nothing to pull it from"):
        get("mine")


def relist(zoo, **changes):
    """Describe all files of a zoo's adapter anew, so that digests are right."""
    entry = read_index(zoo)["mine"]
    files = {name: describe_file(zoo / "mine" / name) for name in entry.files}
    write_index(zoo, {"mine": dataclasses.replace(entry, files=files, **changes)})


HOSTILE = {
    "a wide backbone": ("embed_dim: 32", "embed_dim: 1000000000", "embed_dim"),
    "a long backbone": ("depth: 2", "depth: 1000000", "depth"),
    "another argument": ("num_heads: 2", "mlp_ratio: 2", "mlp_ratio"),
    "weights": ("    weights: null", "    weights: /etc/passwd", "file of weights"),
    "another method": ("patch_merging: false", "patch_merging: true", "names another method"),
    "code": ("class_path: vispeft.SSF", "class_path: os.system", "os.system"),
    "a hub": ("backbone: vit_tiny_patch16_224", "backbone: hf-hub:evil/model", "backbone"),
    "a huge batch": ("batch_size: ", "batch_size: 1000000000 # ", "data.init_args.batch_size"),
    "many workers": ("num_workers: ", "num_workers: 100000 # ", "data.init_args.num_workers"),
    "a huge epoch": ("lr: 0.01", "lr: 1.0e+300", "at most"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config(case, made_zoo, empty, tmp_path):
    before, after, says = HOSTILE[case]
    evil = tmp_path / "evil"
    shutil.copytree(made_zoo, evil)
    path = evil / "mine" / "config.yaml"
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    relist(evil)
    with pytest.raises((FileError, ConfigError), match=says):
        get(evil)
    assert "mine" not in left(empty)


def test_links_and_special_files_of_a_folder(made_zoo, empty, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(made_zoo, evil)
    card = evil / "mine" / "CARD.md"
    card.unlink()
    card.symlink_to("/etc/hostname")
    with pytest.raises(FileError):
        get(evil)
    card.unlink()
    os.mkfifo(card)
    with pytest.raises(FileError, match="pipe"):
        get(evil)
    (evil / INDEX).unlink()
    (evil / "config.yaml").touch()
    with pytest.raises(FileError, match=r"is no zoo.*vispeft zoo add"):
        get(evil)


def test_an_index_that_tells_another_method(made_zoo, empty, tmp_path):
    evil = tmp_path / "evil"
    shutil.copytree(made_zoo, evil)
    relist(evil, method="lora")
    with pytest.raises(FileError, match="has the method 'lora', and it has 'ssf'"):
        get(evil)
    relist(evil, method="ssf")
    (evil / "mine" / "metrics.json").write_text(json.dumps([1]))
    relist(evil)
    with pytest.raises(FileError, match="keys with values"):
        get(evil)
