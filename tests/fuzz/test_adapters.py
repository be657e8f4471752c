"""Hostile adapter directories: loaded with finite values, or refused with one of our errors and without a trace.

``FUZZ_CASES=2000 pytest tests/fuzz`` tries more of them.
"""

import itertools
import os
import resource
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import vispeft
from tests.conformance.cells import METHODS, Cell, move
from tests.core.edits import edit, edit_tensors, same, state_of
from vispeft.errors import VispeftError

CASES = int(os.environ.get("FUZZ_CASES", "36"))
SECONDS = 2.0
"""Longest time a case may take."""
GROWTH = 200 * 2**10
"""Kibibytes that all cases together may add to the largest size of the process."""
NAMES = (
    "lora",
    "ssf",
    "vpt",
    "lora_2bit",
    "vqt_weighted",
    "fact",
    "compacter_full",
    "lst",
    "sparse",
    "mask",
    "sparse_lt",
)
OWN = {"sparse_lt": vispeft.Sparse(budget=0.05, schedule="lt")}
"""Methods whose files say how many entries there are."""
FILES = ("adapter.json", "adapter.safetensors", "head.safetensors")

cases = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
numbers = itertools.count()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One adapter of each method, with notes."""
    folders = {}
    for name in NAMES:
        cell = Cell("lora" if name in OWN else name, "vit")
        bank = vispeft.attach(cell.model(), OWN.get(name) or METHODS[name], verify=False)
        move(bank, "default")
        bank.annotate(class_names=list("abcde"), output={"target": "class", "temperature": 1.5}, metrics={"loss": 0.5})
        folders[name] = tmp_path_factory.mktemp("saved") / name
        bank.save(folders[name])
    return folders


@pytest.fixture(scope="module")
def model():
    """A model with an adapter of its own."""
    model = Cell("ssf", "vit").model().eval()
    vispeft.attach(model, vispeft.SSF(), name="own", verify=False)
    return model


@pytest.fixture
def attempt(saved, model, tmp_path):
    """Change a copy of a saved adapter and load it."""

    def run(name, change):
        folder = tmp_path / str(next(numbers)) / "adapter"
        shutil.copytree(saved[name], folder)
        change(folder)
        files = sorted(path.name for path in folder.iterdir())
        before, size = state_of(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        bank, says = vispeft.AdapterBank.of(model), ""
        try:
            bank.load(folder, "other")
        except VispeftError as error:
            says = str(error)
        else:
            assert all(torch.isfinite(tensor).all() for tensor in bank.state_dict("other").values())
            with torch.no_grad():
                model(Cell("ssf", "vit").images())
            bank.detach("other")
            bank.set_active("own")
        assert says.isprintable()
        assert time.process_time() - start < SECONDS
        assert same(before, state_of(model))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size < GROWTH
        assert sorted(path.name for path in folder.iterdir()) == files
        shutil.rmtree(folder.parent)

    return run


# ------------------------------------------------------------------ bytes


@cases
@given(
    name=st.sampled_from(NAMES),
    file=st.sampled_from(FILES),
    place=st.floats(0, 1, exclude_max=True),
    kind=st.sampled_from(["flip", "cut", "add", "zero", "gone"]),
)
def test_bytes(attempt, name, file, place, kind):
    def change(folder):
        path = folder / file
        content = bytearray(path.read_bytes())
        index = int(place * len(content))
        if kind == "gone":
            path.unlink()
            return
        if kind == "flip":
            content[index] ^= 1 << index % 8
        elif kind == "zero":
            content[index : index + 64] = bytes(len(content[index : index + 64]))
        path.write_bytes({"cut": content[:index], "add": content + b"\0" * index}.get(kind, content))

    attempt(name, change)


# ------------------------------------------------------------------ the description

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([7, 2**31, 2**63, 10**6, 10**7, 10**18, 10**30, -(10**12)]),
    st.sampled_from([0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf"), 1e-320]),
    st.sampled_from(
        ["", "a", "\x1b[2J", "\u202eabc", "../../x", "lora", "attn.qkv", "float32", "raw", "sparse", "x" * 5000]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
odd = st.recursive(
    plain,
    lambda inside: st.one_of(st.lists(inside, max_size=4), st.dictionaries(st.text(max_size=4), inside, max_size=3)),
)


def places(value, path=()):
    """Every place in a JSON value; of long mappings and lists, the first ones."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items)[:12]:
        yield from places(inside, (*path, key))


@cases
@given(name=st.sampled_from(NAMES), place=st.floats(0, 1, exclude_max=True), value=odd, kind=st.sampled_from("psadn"))
def test_descriptions(attempt, name, place, value, kind):
    """One value is another one, gone, twice there, or in a deeper place."""

    def change_header(header):
        found = list(places(header))[1:]
        *parents, leaf = found[int(place * len(found))]
        inside = header
        for key in parents:
            inside = inside[key]
        before = inside[leaf]
        if kind == "d":
            del inside[leaf]
        elif kind == "a" and isinstance(before, list):
            before.append(value)
        elif kind == "a" and isinstance(before, dict):
            before["added"] = value
        elif kind == "n":
            inside[leaf] = [before]
        elif kind == "s" and isinstance(before, int) and not isinstance(before, bool):
            inside[leaf] = before * 10**6 + 1
        else:
            inside[leaf] = value

    attempt(name, lambda folder: edit(folder, change_header))


@cases
@given(name=st.sampled_from(NAMES), data=st.data())
def test_fields_of_the_method(attempt, saved, name, data):
    """The fields decide about the units that are made, so about memory and time."""
    fields = (OWN.get(name) or METHODS[name]).file_method().to_dict()["fields"]
    field = data.draw(st.sampled_from(sorted(fields)))
    value = data.draw(st.one_of(odd, st.integers(0, 10**9), st.floats()))
    attempt(name, lambda folder: edit(folder, lambda header: header["method"]["fields"].update({field: value})))


# ------------------------------------------------------------------ tensors

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@cases
@given(
    name=st.sampled_from(NAMES),
    file=st.sampled_from(FILES[1:]),
    place=st.floats(0, 1, exclude_max=True),
    kind=st.sampled_from(["gone", "more", "shape", "dtype", "value", "bytes", "empty", "swap"]),
    number=st.sampled_from([float("nan"), float("inf"), 1e38, -1e38, 0.0]),
    dtype=st.sampled_from(DTYPES),
    told=st.booleans(),
)
def test_tensors(attempt, name, file, place, kind, number, dtype, told):
    """Digests are right; where `told` is set, the description names the new shapes and dtypes as well."""

    def change(tensors):
        keys = sorted(tensors)
        key = keys[int(place * len(keys))]
        tensor = tensors[key]
        if kind == "gone":
            del tensors[key]
        elif kind == "more":
            tensors[f"{key}.more"] = tensor.clone()
        elif kind == "shape":
            tensors[key] = torch.cat([tensor, tensor]) if tensor.ndim else tensor.reshape(1)
        elif kind == "dtype":
            tensors[key] = tensor.to(dtype)
        elif kind == "value" and tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[int(place * tensor.numel())] = number
        elif kind == "bytes":
            tensors[key] = torch.full_like(tensor, 255 if tensor.dtype == torch.uint8 else 3)
        elif kind == "empty":
            tensors[key] = tensor.new_empty(0)
        else:
            other = keys[0]
            tensors[key], tensors[other] = tensors[other].clone(), tensor.clone()

    def describe(folder):
        found = load_file(folder / file)

        def tell(header):
            for key, tensor in found.items():
                entry = {"codec": "raw", "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
                old = header["tensors"].get(key)
                if key.startswith("head/"):
                    header["head"][key.removeprefix("head/")] = list(tensor.shape)
                elif old is None or old["codec"] == "raw":
                    header["tensors"][key] = entry
            for key in [key for key in header["tensors"] if file == FILES[1] and key not in found]:
                del header["tensors"][key]

        edit(folder, tell)

    def both(folder):
        edit_tensors(folder, file, change)
        if told:
            describe(folder)

    attempt(name, both)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_whole_is_loaded(saved, name):
    model = Cell("lora", "vit").model()
    assert vispeft.load(model, saved[name]).notes()["class_names"] == list("abcde")
