"""Hostile checkpoints: read right, or refused with one of our errors, quickly, without a trace and without code.

``FUZZ_CASES=2000 pytest tests/fuzz`` tries more of them.
"""

import copy
import hashlib
import io
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch import seed_everything

import vispeft
from tests.tiny import TINY
from vispeft.errors import FileError, VispeftError
from vispeft.tasks import Classification
from vispeft.tasks.checkpoints import SEAL, STATE, SealedCheckpointIO, find_checkpoint, read_checkpoint

CASES = int(os.environ.get("FUZZ_CASES", "30"))
SECONDS = 2.0
"""Longest time a case may take, in seconds of this process."""
STARTED = []
"""Filled by code of a checkpoint, if it were run."""

cases = settings(
    max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return STARTED.append, (1,)


@pytest.fixture(scope="module")
def task():
    seed_everything(0)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 3}
    return Classification(method=vispeft.LinearProbe(), **settings)


@pytest.fixture(scope="module")
def content(task):
    """A small checkpoint from which a run can go on."""
    state = {name: tensor for name, tensor in task.state_dict().items() if name in task._changed()}
    best = {"file": "best-a.ckpt", "epoch": 0, "score": 0.5}
    own = {"finished": False, "best": best, "epochs": 1, "steps": 4, "seconds": 1.0, "processes": 1, "torch": "2"}
    own |= {"backbone": {}, "logged_steps": 4, "rows": [3], "batches": 2, "training": {"random": {}}}
    return {"state_dict": state, "epoch": 0, "global_step": 4, "loops": {}, STATE: own}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, content):
    """Checkpoints of a run; each case writes its own over `step-2.ckpt`."""
    place = tmp_path_factory.mktemp("checkpoints")
    for name in ("best-a", "step-1", "step-2"):
        SealedCheckpointIO().save_checkpoint(content, place / f"{name}.ckpt")
    return place


def sealed(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue() + SEAL + hashlib.sha256(buffer.getvalue()).hexdigest().encode()


def attempt(task, folder, data):
    """Give a file to every reader of checkpoints."""
    path = folder / "step-2.ckpt"
    path.write_bytes(data)
    before, start, names = {k: v.clone() for k, v in task.state_dict().items()}, time.process_time(), os.listdir(folder)
    read = None
    try:
        read = read_checkpoint(path)
        task.restore(path)
    except VispeftError:
        assert all(torch.equal(before[name], tensor) for name, tensor in task.state_dict().items())
    found = find_checkpoint(folder)
    assert found is not None
    assert found.path.name in ("step-1.ckpt", "step-2.ckpt")
    assert isinstance(found.finished, bool)
    assert time.process_time() - start < SECONDS
    assert os.listdir(folder) == names
    assert not STARTED
    return read


@cases
@given(
    place=st.floats(0, 1),
    change=st.sampled_from(["flip", "cut", "insert", "zero", "repeat"]),
    size=st.integers(1, 2000),
    value=st.integers(1, 255),
)
def test_changed_bytes_are_noticed(task, folder, content, place, change, size, value):
    whole = sealed({**content, "sealed": True})
    start = int(place * (len(whole) - 1))
    part = {
        "flip": bytes([whole[start] ^ value]) + whole[start + 1 :],
        "cut": b"",
        "insert": bytes([value]) * size + whole[start:],
        "zero": bytes(size) + whole[start + size :],
        "repeat": whole[start : start + size] + whole[start:],
    }[change]
    changed = whole[:start] + part
    found = attempt(task, folder, changed)
    assert found is None or changed == whole


odd = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.binary(max_size=4),
        st.sampled_from([torch.zeros(2), torch.ones(()), torch.zeros(1).expand(2**40), torch.zeros(2).to_sparse(), -1]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner, max_size=3),
    ),
    max_leaves=5,
)  # fmt: skip
places = st.sampled_from(
    [
        (), ("state_dict",), ("state_dict", "model.head.weight"), ("epoch",), ("average",), ("sealed",), (STATE,),
        (STATE, "best"), (STATE, "best", "file"), (STATE, "best", "epoch"), (STATE, "finished"), (STATE, "rows"),
        (STATE, "seconds"), (STATE, "backbone"), ("config",), ("config", "values"),
    ]
)  # fmt: skip


def replaced(content, place, value):
    if not place:
        return value
    changed = copy.copy(content)
    if value is ...:
        changed.pop(place[0], None)
    else:
        changed[place[0]] = replaced(content.get(place[0], {}), place[1:], value) if len(place) > 1 else value
    return changed


@cases
@given(place=places, value=st.one_of(odd, st.just(...)))
@example(place=(STATE, "best", "file"), value="../best-a.ckpt")
@example(place=(STATE, "best", "file"), value="a\0b")
@example(place=(STATE, "best", "file"), value="x" * 5000)
@example(place=("state_dict",), value={"model.head.weight": torch.zeros(1).expand(2**40)})
@example(place=("epoch",), value=...)
def test_entries_of_another_form_are_refused(task, folder, content, place, value):
    attempt(task, folder, sealed({} if value is ... and not place else replaced(content, place, value)))


@cases
@given(data=st.one_of(st.binary(max_size=300), st.binary(max_size=40).map(lambda data: data + SEAL + b"0" * 64)))
@example(data=b"")
@example(data=b"PK\5\6" + bytes(18))
@example(data=b"\x80\x02c__builtin__\neval\n(X\x01\0\0\0" + b"1tR.")
def test_bytes_that_are_no_checkpoint(task, folder, data):
    assert attempt(task, folder, data) is None


@pytest.mark.parametrize("seal", [True, False])
def test_no_code_is_run(task, folder, content, seal):
    for place in (("state_dict",), (STATE, "best"), ("extra",)):
        data = sealed(replaced(content, place, Code()))
        assert attempt(task, folder, data if seal else data[: data.rindex(SEAL)]) is None


def test_pipes_folders_and_devices_are_refused(folder):
    os.mkfifo(folder / "pipe")
    try:
        for path in (folder / "pipe", folder, "/dev/zero", folder / "none", folder / ("x" * 300), "a\0b"):
            with pytest.raises(FileError):
                read_checkpoint(path)
    finally:
        (folder / "pipe").unlink()
