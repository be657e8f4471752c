"""Hostile zoos, each made from one number: an index, or a folder of which one file was changed.

The number is the seed of Python's generator, so a case that fails can be made again from it alone.
"""

import dataclasses
import hashlib
import json
import random
import shutil
import struct
from pathlib import Path

import yaml

from vispeft.cli.zoo import zoo_table
from vispeft.cli.zoo_trust import check_config
from vispeft.zoo.index import FILES, INDEX, describe_file, index_bytes, parse_index, read_index

ODD = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**9, 10**30, -(10**12)),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf")),
    *("", "a", "../../x", "/etc/passwd", "\x1b[2J", "\u202eabc", "zoo:vit_tiny", "hf-hub:a/b", "os.system", "x" * 5000),
    *([], {}, [[]], [0] * 2000, {"class_path": "os.system", "init_args": {"command": "touch MARKER"}}),
)
"""Values that stand where others are expected."""
TEXTS = (
    b"",
    b"null",
    b"[]",
    b"{}",
    b"[" * 50_000,
    b'{"a":' * 20_000,
    b'{"schema": 1, "schema": 2, "adapters": {}}',
    b'{"schema": NaN, "adapters": {}}',
    b'{"schema": ' + b"9" * 10_000 + b', "adapters": {}}',
    b"\xff\xfe\x00",
    b'{"schema": 1, "adapters": {"\\ud800": {}}, "digest": ""}',
    b"&a [*a, *a]\n" * 100,
    b"model: !!python/object/apply:os.system ['touch MARKER']\n",
)
"""Contents of a whole file."""


def places(value, path=()):
    """List every place in plain values; of long mappings and lists, the first ones."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items)[:20]:
        yield from places(inside, (*path, key))


def change_value(value, rng):
    """Replace, remove, rename or add one value at a place; the values are changed in place."""
    found = list(places(value))[1:]
    *parents, leaf = rng.choice(found)
    inside = value
    for key in parents:
        inside = inside[key]
    kind = rng.randrange(5)
    if kind == 0:
        del inside[leaf]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(["../../evil", "a" * 2000, "", "\x00", "weights", "root"])] = inside.pop(leaf)
    elif kind == 2 and isinstance(inside[leaf], dict):
        inside[leaf]["added"] = rng.choice(ODD)
    elif kind == 3 and isinstance(inside[leaf], int):
        inside[leaf] = inside[leaf] * 10**6 + 1
    else:
        inside[leaf] = rng.choice(ODD)


def change_bytes(content, rng):
    """Flip, cut, repeat or zero bytes."""
    changed = bytearray(content)
    place = rng.randrange(len(changed)) if changed else 0
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(changed[:place])
    if kind == 1:
        return bytes(changed[:place] + changed[place // 2 : place] + changed[place:])
    if kind == 2:
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    elif kind == 3:
        return rng.choice(TEXTS)
    elif changed:
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def hostile_index(content, seed):
    """Change an index.

    Args:
        content: Bytes of a right one.
        seed: Number of the case.
    """
    rng = random.Random(seed)
    if rng.random() < 0.4:
        return change_bytes(content, rng)
    index = json.loads(content)
    change_value(index, rng)
    try:
        if isinstance(index.get("adapters"), dict) and rng.random() < 0.7:  # with the digest it would have
            rest = {key: value for key, value in index.items() if key != "digest"}
            text = json.dumps(rest, indent=1, ensure_ascii=False) + "\n"
            index = {**rest, "digest": hashlib.sha256(text.encode()).hexdigest()}
        return (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode(errors="surrogatepass")
    except (TypeError, ValueError):
        return content[:-1]


def hostile_tensors(content, rng):
    """Change the header of a safetensors file, or its numbers."""
    length = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([2**63, 2**40, length + 1, 0]).to_bytes(8, "little") + content[8:]
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    if kind == 1:
        header[rng.choice(["../../x", "x" * 3000, "\x00", "head/weight"])] = header.pop(name)
    elif kind == 2:
        header[name]["shape"] = rng.choice([[2**40], [-1], [0], [1] * 100, [2**63, 2**63], "x"])
    elif kind == 3:
        header[name]["dtype"] = rng.choice(["F64", "I8", "BOOL", "F4", "x", None])
    elif kind == 4:
        header[name]["data_offsets"] = rng.choice([[0, 2**50], [5, 1], [0, 0], [-4, 4], []])
    elif len(body) >= 2:
        place = 2 * rng.randrange(len(body) // 2)
        body[place : place + 2] = struct.pack("<e", rng.choice([float("nan"), float("inf"), -float("inf"), 65504.0]))
    text = json.dumps(header)
    if rng.random() < 0.1:
        text = text[:-1] + f', "{name}": {json.dumps(header.get(name))}}}'
    return len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(body)


def hostile_json(content, rng):
    """Change a value of adapter.json or metrics.json; the digest inside fits again."""
    value = json.loads(content)
    change_value(value, rng)
    if isinstance(value, dict) and "digest" in value:
        value["digest"] = ""
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        value["digest"] = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return json.dumps(value, indent=1, ensure_ascii=False).encode(errors="surrogatepass")


def hostile_config(content, rng):
    """Change a value of a config, most often of its model."""
    tree = yaml.safe_load(content)
    change_value(tree["model"] if rng.random() < 0.7 else tree, rng)
    return yaml.safe_dump(tree).encode(errors="backslashreplace")


def hostile_zoo(whole, place, seed):
    """Write a zoo of which one file was changed, most often with the digests it would then have.

    Args:
        whole: A right zoo with one adapter.
        place: Where the changed one is written; what is there is removed.
        seed: Number of the case.
    """
    rng = random.Random(seed)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    (name,) = read_index(whole)
    file = rng.choice(FILES)
    path = place / name / file
    content = path.read_bytes()
    special = {
        "adapter.json": hostile_json,
        "metrics.json": hostile_json,
        "config.yaml": hostile_config,
        "adapter.safetensors": hostile_tensors,
        "head.safetensors": hostile_tensors,
    }
    change = special[file] if file in special and rng.random() < 0.75 else change_bytes
    path.write_bytes(change(content, rng))
    if rng.random() < 0.85:
        _relist(place, name, rng)


def _relist(zoo: Path, name: str, rng: random.Random) -> None:
    """Write the digests of the files as they are into description and index."""
    folder = zoo / name
    if rng.random() < 0.8:
        _describe(folder)
    entry = read_index(zoo)[name]
    files = {file: describe_file(folder / file) for file in entry.files}
    (zoo / INDEX).write_bytes(index_bytes({name: dataclasses.replace(entry, files=files)}))


def _describe(folder: Path) -> None:
    """Write the digests of the tensor files into adapter.json, where it can be read."""
    try:
        header = json.loads((folder / "adapter.json").read_bytes())
        files = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in header["files"]}
        header = {**header, "files": files, "digest": ""}
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        header["digest"] = hashlib.sha256(text.encode()).hexdigest()
        (folder / "adapter.json").write_bytes(json.dumps(header, indent=1, ensure_ascii=False).encode())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return


def flipped(content, count, seed):
    """Yield contents with one byte changed, at places that are drawn.

    Args:
        content: The right content.
        count: How many.
        seed: Seed of the places.
    """
    rng = random.Random(seed)
    for _ in range(count):
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        yield bytes(changed)


def read_changed(path, content, seed):
    """Read an index after it was changed, and make the table of `vispeft zoo list` of it."""
    return zoo_table(parse_index(path, hostile_index(content, seed)))


def config_changed(folder, header, content, seed):
    """Write a config that was changed, and check it as that of a pulled adapter.

    Args:
        folder: The adapter's folder; its config is replaced.
        header: Content of its description.
        content: Bytes of the right config.
        seed: Number of the case.
    """
    (folder / "config.yaml").write_bytes(hostile_config(content, random.Random(seed)))
    check_config(folder / "config.yaml", header)
