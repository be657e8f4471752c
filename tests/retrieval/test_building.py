import csv
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.data.images import read_image
from vispeft.data.reading import FileReader
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.metrics import retrieval_scores
from vispeft.retrieval import (
    Builder,
    Collection,
    Index,
    Model,
    approximate,
    building,
    collect,
    neighbours_of,
    search_table,
)
from vispeft.retrieval import index as index_module
from vispeft.storage.locks import InUseError, hold

COLOURS = np.array([[240, 90, 90], [90, 240, 90], [90, 90, 240], [20, 20, 20]])
MODEL = Model(adapter="a" * 64, preprocessing={"size": [8, 8]}, reading={}, similarity={"name": "cosine"})


class Embed:
    """Colours as embeddings; counts the images, and may stop."""

    def __init__(self, stop=None):
        self.seen, self.stop = 0, stop

    def __call__(self, images):
        if self.stop is not None and self.seen >= self.stop:
            raise KeyboardInterrupt
        self.seen += len(images)
        return torch.stack([image.float().mean((1, 2)) - 100 for image in images])

    def files(self, paths):
        return self([read_image(path) for path in paths])


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(0)
    for number in range(20):
        folder = tmp_path / "images" / f"class {number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        colour = COLOURS[number % 4] + random.integers(-9, 9, 3)
        Image.fromarray(np.broadcast_to(colour.clip(0, 255).astype(np.uint8), (6, 6, 3))).save(folder / f"{number}.png")
    return tmp_path / "images"


def builder(images, place="index", **settings):
    place = images.parent / place
    return Builder(place=place, model=MODEL, run="run", collection=collect(images), batch_size=6, **settings)


READER = FileReader(mark="digest")


def build(builder, embed, reader=READER):
    return builder.build(reader, embed).index


def names(place):
    return sorted(path.name for path in place.iterdir())


def test_an_index_holds_images_labels_and_embeddings(images):
    index = build(builder(images), Embed())
    assert names(index.place) == ["embeddings-00000.safetensors", "images.csv", "index.json"]
    assert index.collection == collect(images)
    assert set(index.collection.labels) == {f"class {number}" for number in range(4)}
    torch.testing.assert_close(index.embeddings, Embed().files(index.collection.paths), rtol=0, atol=0)
    assert index.model == MODEL
    _, labels = np.unique(index.collection.labels, return_inverse=True)
    assert retrieval_scores(index.embeddings, torch.from_numpy(labels), ks=[1])["recall@1"] == 1


def test_shards_and_halves_change_nothing_but_the_rounding(images, monkeypatch):
    monkeypatch.setattr(building, "SHARD", 200)
    whole = build(builder(images), Embed())
    assert "embeddings-00001.safetensors" in names(whole.place)
    half = build(builder(images, "half", dtype="float16"), Embed())
    assert half.embeddings.dtype == torch.float16
    assert torch.equal(whole.embeddings.half(), half.embeddings)


@pytest.mark.parametrize("kill", [False, True])
def test_a_build_that_stops_in_the_middle_goes_on_behind_its_last_batch(images, kill):
    wanted = build(builder(images, "whole"), Embed()).embeddings
    if kill:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            try:
                build(builder(images), Embed(stop=12))
            finally:
                os._exit(9)  # without any clearing up: the lock stays, too
        os.waitpid(child, 0)
    else:
        with pytest.raises(KeyboardInterrupt):
            build(builder(images), Embed(stop=12))
    with pytest.raises(FileError, match="unfinished"):
        Index.open(images.parent / "index")
    (images.parent / "index/parts/.000000012.safetensors.part").write_bytes(b"half")
    embed = Embed()
    index = build(builder(images), embed)
    assert embed.seen == 20 - 12
    assert torch.equal(index.embeddings, wanted)
    assert names(index.place) == ["embeddings-00000.safetensors", "images.csv", "index.json"]


def test_batches_of_images_that_changed_meanwhile_are_embedded_again(images):
    with pytest.raises(KeyboardInterrupt):
        build(builder(images), Embed(stop=12))
    first = collect(images).paths[0]
    Image.new("RGB", (4, 4), (1, 2, 3)).save(first)
    part = images.parent / "index/parts/000000006.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    embed = Embed()
    index = build(builder(images), embed)
    assert embed.seen == 20
    assert index.embeddings[0].tolist() == [-99, -98, -97]


def test_a_directory_that_holds_something_else_is_refused(images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(builder(images), Embed(stop=12))
    other = replace(MODEL, adapter="b" * 64)
    for settings in ({"dtype": "float16"}, {"model": other}, {"batch_size": 5}):
        with pytest.raises(ConfigError, match=r"unfinished index, which was begun with other settings \("):
            build(replace(builder(images), **settings), Embed())
    with hold(tmp_path / "index/.lock", "it"), pytest.raises(InUseError):
        build(builder(images), Embed())
    build(builder(images), Embed())
    with pytest.raises(ConfigError, match="finished index"):
        builder(images)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a.txt").touch()
    with pytest.raises(ConfigError, match="not empty"):
        builder(images, "full")
    with pytest.raises(FileError, match="nothing can be written"):
        builder(images, "full/a.txt")


def test_values_that_cannot_work_are_refused(images):
    for settings, message in (
        ({"batch_size": 0}, "at least 1"),
        ({"dtype": "int8"}, "float16"),
        ({"kind": "lsh"}, "exact, ivf"),
        ({"kind": "ivf", "model": replace(MODEL, similarity={"name": "hyperbolic"})}, "hyperbolic distance"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(builder(images), **settings)
    with pytest.raises(DataError, match="not finite in float16"):
        build(builder(images, dtype="float16"), lambda paths: torch.full((len(paths), 2), 1e6))
    with pytest.raises(DataError, match=r"\.png are not finite\. "):
        build(builder(images, "other"), lambda paths: torch.full((len(paths), 2), torch.nan))


@pytest.mark.parametrize("name", ["images.csv", "embeddings-00000.safetensors", "index.json"])
def test_an_index_that_was_edited_is_refused(images, name):
    index = build(builder(images), Embed())
    path = index.place / name
    content = path.read_bytes()
    if name == "index.json":
        described = json.loads(content)
        described["model"]["adapter"] = "c" * 64
        path.write_text(json.dumps(described))
    else:
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(FileError, match="was changed after it was written"):
        Index.open(index.place)
    path.unlink()
    with pytest.raises(FileError, match=r"Embed the images again|is no index"):
        Index.open(index.place)


def test_neighbours_have_labels_and_leave_the_query_out(images):
    index = build(builder(images), Embed())
    queries = collect(images / "class 2/2.png")
    found = neighbours_of(index, queries, Embed().files(queries.paths), 4)[0]
    assert found.label == "class 2"
    assert found.query not in [hit.path for hit in found.hits]
    assert [hit.right for hit in found.hits] == [True] * 4
    assert [hit.score for hit in found.hits] == sorted((hit.score for hit in found.hits), reverse=True)
    assert len(neighbours_of(index, queries, Embed().files(queries.paths), 99)[0].hits) == 19
    with pytest.raises(ConfigError, match="at least 1"):
        neighbours_of(index, queries, Embed().files(queries.paths), 0)
    Image.new("RGB", (4, 4), (100, 90, 100)).save(found.hits[0].path)
    with pytest.raises(FileError, match=r"1 neighbour changed \(.*, so .* Embed them again"):
        neighbours_of(index, queries, Embed().files(queries.paths), 4)
    os.remove(found.hits[1].path)
    with pytest.raises(FileError, match=r"1 neighbour changed .* and 1 neighbour cannot be read any more \("):
        neighbours_of(index, queries, Embed().files(queries.paths), 4)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_indices_find_the_neighbours_of_a_small_set(images, kind):
    pytest.importorskip("faiss")
    index = build(builder(images, kind=kind), Embed())
    assert f"{kind}.faiss" in names(index.place)
    queries = collect(images)
    embeddings = Embed().files(queries.paths)
    fast, exact = (neighbours_of(index, queries, embeddings, 5, exact=exact) for exact in (False, True))
    assert [f.query not in {hit.path for hit in f.hits} for f in fast] == [True] * 20
    same = [len({hit.path for hit in a.hits} & {hit.path for hit in b.hits}) for a, b in zip(fast, exact, strict=True)]
    assert sum(same) >= 95


def test_an_approximate_index_gives_as_many_neighbours_as_were_asked_for(images, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(approximate, "LEAST", 1)  # 17 lists for 20 images
    monkeypatch.setattr(approximate, "LEAST_PROBED", 1)
    index = build(builder(images, kind="ivf"), Embed())
    queries = collect(images / "class 2")
    embeddings = Embed().files(queries.paths)
    exact = neighbours_of(index, queries, embeddings, 99, exact=True)
    assert [len(found.hits) for found in exact] == [19] * 5
    assert neighbours_of(index, queries, embeddings, 99) == exact


def test_without_faiss_the_extra_is_named(images, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"vispeft\[search\]"):
        builder(images, kind="ivf")
    assert approximate.KINDS[0] == "exact"


def test_names_and_labels_may_have_any_characters(images):
    odd = ["a\rb.png", "a\nb.png", 'a"b,c.png', " d\u2028.png"]
    for name in odd:
        Image.new("RGB", (4, 4)).save(images / name, format="PNG")
    (images / "list.json").write_text(json.dumps({name: f"{name}\r" for name in odd}))
    found = collect(images / "list.json")
    index = build(replace(builder(images), collection=found), Embed())
    assert Index.open(index.place).collection == found
    table = search_table(neighbours_of(index, found, Embed().files(found.paths), 1))
    rows = list(csv.reader(io.StringIO(table, newline="")))
    assert [row[0] for row in rows[1:]] == [str(images / name) for name in odd]


def test_an_image_that_is_listed_twice_is_embedded_once(images):
    path = str(collect(images).names[0])
    (images / "list.txt").write_text(f"{path}\t1\n./{path}\t1\n")
    assert (collect(images / "list.txt").names, collect(images / "list.txt").labels) == ((Path(path).name,), ("1",))
    (images / "list.txt").write_text(f"{path}\t1\n./{path}\t2\n")
    with pytest.raises(DataError, match="has two labels, '1' and '2'"):
        collect(images / "list.txt")


def test_collections_are_joined_as_they_are(images, tmp_path):
    one, other = collect(images / "class 1"), collect(images)
    joined = Collection.joined([one, other, one])
    assert joined.paths == [*one.paths, *other.paths, *one.paths]
    assert joined.labels == (*one.labels, *other.labels, *one.labels)


def test_lists_are_collected_with_their_labels(images):
    paths = sorted(path.relative_to(images) for path in images.rglob("*.png"))[:3]
    (images / "list.txt").write_text("".join(f"{path}\t{n}\n" for n, path in enumerate(paths)))
    (images / "list.json").write_text(json.dumps({str(path): n for n, path in enumerate(paths)}))
    for name in ("list.txt", "list.json"):
        found = collect(images / name)
        assert found.labels == ("0", "1", "2")
        assert found.paths == [images / path for path in paths]
    (images / "list.txt").write_text("nothing.png 3\n")
    with pytest.raises(DataError, match=r"do not exist: list.txt:1"):
        collect(images / "list.txt")


@pytest.mark.parametrize(
    "change",
    [
        {"shards": []},
        {"model": {"x": 1}},
        {"files": []},
        {"files": {"../other/images.csv": "0"}},
        {"shards": ["images.csv"]},
        {"root": 3},
        {"approximate": []},
    ],
    ids=str,
)
def test_an_index_of_another_content_is_refused(images, change):
    """Its digest fits, as anybody can write one."""
    index = build(builder(images), Embed())
    path = index.place / "index.json"
    described = {**json.loads(path.read_text()), **change}
    del described["digest"]
    path.write_text(json.dumps({**described, "digest": index_module._digest(described)}))
    with pytest.raises(FileError, match=r"Embed the images again|outside of itself"):
        Index.open(index.place)
