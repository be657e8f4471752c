"""Conversion of the pretrained backbones; the files themselves are tested where somebody has made them."""

import json

import assets
import numpy as np
import pytest
import torch

import vispeft

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")


def in_8_bits() -> onnx.ModelProto:
    """A linear layer as the CLIP graph has it: activations quantised on the fly, a matrix of 8 bits."""
    from onnx import TensorProto, helper, numpy_helper

    matrix = np.array([[127, -3], [5, 64], [-20, 1]], dtype=np.int8)
    constants = {
        "W_quantized": matrix,
        "W_scale": np.array([0.01, 0.5], np.float32),
        "W_zero_point": np.zeros(2, np.int8),
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x_q", "x_scale", "x_zero"], "/x_QuantizeLinear"),
        helper.make_node("Mul", ["x_scale", "W_scale"], ["scales"], "/fc/MatMul_quant_scales_mul"),
        helper.make_node("MatMulInteger", ["x_q", "W_quantized", "x_zero", "W_zero_point"], ["n"], "/fc/MatMul_quant"),
        helper.make_node("Cast", ["n"], ["cast"], "/fc/MatMul_output_quantized_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["cast", "scales"], ["y"], "/fc/MatMul_quant_output_scale_mul"),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def output(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_a_graph_of_8_bits_becomes_one_of_floats():
    model = in_8_bits()
    matrix = assets.linear_weights(model.graph, assets.initialisers(model.graph))["/fc"]
    assert np.allclose(matrix, np.array([[1.27, -1.5], [0.05, 32], [-0.2, 0.5]]))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    rounded = output(model, x)
    assets.in_floats(model)
    onnx.checker.check_model(model)
    assert np.abs(output(model, x) - x @ matrix).max() < 1e-5
    assert 1e-4 < np.abs(rounded - x @ matrix).max() < 1  # what rounding the activations costs


def test_a_zero_point_is_refused():
    model = in_8_bits()
    values = {**assets.initialisers(model.graph), "W_zero_point": np.ones(2, np.int8)}
    with pytest.raises(SystemExit, match="zero point"):
        assets.linear_weights(model.graph, values)


def test_another_file_is_refused():
    with pytest.raises(SystemExit, match="another file"):
        assets.check_digest(b"content", "0" * 64, "some.onnx")
    assets.check_digest(b"content", assets.digest(b"content"), "some.onnx")


def test_positions_keep_the_class_token_and_their_size_when_it_fits():
    positions = torch.randn(1, 17, 8)
    assert assets.plain_positions(positions, 17) is positions
    larger = assets.plain_positions(positions, 65)
    assert larger.shape == (1, 65, 8)
    assert torch.equal(larger[:, 0], positions[:, 0])


def test_a_missing_file_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"benchmarks/assets\.py clip_vit_b16"):
        assets.weights("clip_vit_b16")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(assets.ASSETS))
def test_a_converted_backbone_is_what_its_description_says(name):
    path = assets.FOLDER / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path.name} has not been made: python benchmarks/assets.py {name}")
    asset, facts = assets.ASSETS[name], json.loads(path.with_suffix(".json").read_text())
    assert facts["weights_sha256"] == assets.digest(path.read_bytes())
    assert facts["sha256"] == asset.sha256
    assert facts["error"] <= asset.tolerance
    model = vispeft.create_model(asset.architecture, weights=path, num_classes=10, img_size=112 if "14" in name else 64)
    bank = vispeft.attach(model, vispeft.SSF())
    assert bank.report().trainable > 0
