"""``vispeft export --adapters as-inputs``: one backbone for several runs, and inputs for a run that comes later."""

import json
import shutil

import pytest
import torch

from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.interop.adapter_inputs import InputLayout, read_inputs
from vispeft.interop.export import onnx_layout, onnx_session

AS_INPUTS = ("--adapters", "as-inputs")


@pytest.mark.slow
def test_one_backbone_for_runs(finished, run_cli, tmp_path):
    pytest.importorskip("onnxruntime")
    other = tmp_path / "runs" / "other"
    shutil.copytree(finished, other)
    out = tmp_path / "backbone.onnx"
    found = run_cli("export", finished, other, *AS_INPUTS, "--classes", 12, "--rank", 2, "--out", out)
    assert found.status == 0, found.err
    layout = InputLayout.from_dict(onnx_layout(out)["adapter_inputs"])
    assert (layout.classes, layout.rank) == (12, 2)
    (file,) = tmp_path.glob("backbone.runs-other.safetensors")
    images = torch.randn(3, 3, 16, 16)
    arrays, notes = read_inputs(file, layout)
    (scores,) = onnx_session(out).run(None, {"images": images.numpy(), **arrays})
    assert notes["class_names"] == list("0123456789")
    with torch.no_grad():
        wanted = load_task(Run.open(finished))[0](images)
    assert torch.allclose(torch.from_numpy(scores)[:, :10], wanted, atol=1e-4 * float(wanted.abs().max()))
    later = run_cli("export", other, *AS_INPUTS, "--into", out, "--out", tmp_path / "later.safetensors")
    assert later.status == 0, later.err
    assert json.dumps(sorted(read_inputs(tmp_path / "later.safetensors", layout)[0])) == json.dumps(sorted(arrays))


def test_refused_options(finished, run_cli, tmp_path):
    out = tmp_path / "backbone.onnx"
    for given, said in (
        ((finished, finished, "--out", out), "2 runs were given"),
        ((finished, "--rank", 2, "--out", out), "--rank was given, which belongs to"),
        ((finished, *AS_INPUTS, "--batch", 2, "--out", out), "--batch was given with"),
        ((finished, *AS_INPUTS, "--rank", 0, "--out", out), "--rank is 0"),
        ((finished, *AS_INPUTS, "--format", "export", "--out", out), "writes ONNX files"),
        ((finished, *AS_INPUTS, "--out", tmp_path / "backbone.pt2"), "ends in .onnx"),
        ((finished, *AS_INPUTS, "--into", out, "--out", out), "ends in .safetensors"),
    ):
        found = run_cli("export", *given)
        assert found.status == 2, given
        assert said in found.err
    assert not list(tmp_path.iterdir())
