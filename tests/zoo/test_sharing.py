"""What sharing must not do: delete a user's files, or leave a zoo that cannot be read. Nothing is trained or built."""

import pytest

from vispeft.cli.zoo_push import push_adapter
from vispeft.errors import FileError
from vispeft.zoo.adapters import ZooAdapter
from vispeft.zoo.index import FILES, INDEX, ZooEntry, describe_file, read_index, write_index
from vispeft.zoo.install import remove_adapter


def make_adapter(zoo, name, card="a card", **changes):
    """Write a zoo with one adapter, whose files have nothing in them but the card, and list it beside others."""
    (zoo / name).mkdir(parents=True)
    for file in FILES:
        (zoo / name / file).write_text(card if file == "CARD.md" else "")
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
