"""Tensors of decoders are called and shaped as in mmsegmentation 1.2.2, and give the same scores."""

import importlib
import re
import sys
import types

import pytest
import torch

from vispeft.heads import decoder

IN, CLASSES, WIDTH = (4, 6, 8, 10), 3, 12
PYRAMID = ((16, 24), (8, 12), (4, 6), (2, 3))


def conv_module(path, out, width, side=1):
    """List the tensors of an mmcv ConvModule with BatchNorm."""
    norm = {f"{path}.bn.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {f"{path}.conv.weight": (out, width, side, side), **norm, f"{path}.bn.num_batches_tracked": ()}


CLASSIFIER = {"conv_seg.weight": (CLASSES, WIDTH, 1, 1), "conv_seg.bias": (CLASSES,)}

TABLE = {
    "fcn": {
        **CLASSIFIER,
        **conv_module("convs.0", WIDTH, 10, 3),
        **conv_module("convs.1", WIDTH, WIDTH, 3),
        **conv_module("conv_cat", WIDTH, 10 + WIDTH, 3),
    },
    "segformer": {
        **CLASSIFIER,
        **{k: v for i, width in enumerate(IN) for k, v in conv_module(f"convs.{i}", WIDTH, width).items()},
        **conv_module("fusion_conv", WIDTH, 4 * WIDTH),
    },
    "uper": {
        **CLASSIFIER,
        **{k: v for i in range(4) for k, v in conv_module(f"psp_modules.{i}.1", WIDTH, 10).items()},
        **conv_module("bottleneck", WIDTH, 10 + 4 * WIDTH, 3),
        **{k: v for i, width in enumerate(IN[:3]) for k, v in conv_module(f"lateral_convs.{i}", WIDTH, width).items()},
        **{k: v for i in range(3) for k, v in conv_module(f"fpn_convs.{i}", WIDTH, WIDTH, 3).items()},
        **conv_module("fpn_bottleneck", WIDTH, 4 * WIDTH, 3),
    },
}

TYPES = {
    "fcn": {"type": "FCNHead", "in_channels": IN[-1], "in_index": 3},
    "segformer": {"type": "SegformerHead", "in_channels": list(IN), "in_index": [0, 1, 2, 3]},
    "uper": {"type": "UPerHead", "in_channels": list(IN), "in_index": [0, 1, 2, 3]},
    "dpt": {
        "type": "DPTHead",
        "in_channels": [8] * 4,
        "embed_dims": 8,
        "post_process_channels": [4, 6, 8, 10],
        "in_index": [0, 1, 2, 3],
        "input_transform": "multiple_select",
    },
}


@pytest.fixture(scope="module")
def models():
    """Give mmseg's registry of models; mmcv-lite lacks the compiled module that importing mmseg asks for."""
    pytest.importorskip("mmseg")
    compiled = types.ModuleType("mmcv._ext")
    compiled.__getattr__ = lambda name: None
    works = "mmcv.ops" in sys.modules or importlib.util.find_spec("mmcv._ext") is not None
    with pytest.MonkeyPatch.context() as patch:
        if not works:
            patch.setitem(sys.modules, "mmcv._ext", compiled)
        importlib.import_module("mmcv.ops")
    importlib.import_module("mmseg.models")
    return importlib.import_module("mmseg.registry").MODELS


def randomize(module):
    """Draw all tensors, running statistics included, so that none is left at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(values + 0.5 if name.endswith("running_var") else (values - 0.5) / 2)


def inputs(sizes, channels):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


@pytest.mark.parametrize("name", sorted(TABLE))
def test_tensors_are_called_and_shaped_as_in_mmsegmentation(name):
    found = {key: tuple(t.shape) for key, t in decoder(name, IN, CLASSES, channels=WIDTH).state_dict().items()}
    assert found == TABLE[name]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", sorted(TABLE))
def test_scores_and_gradients_equal_those_of_mmsegmentation(models, name, train):
    theirs = models.build({**TYPES[name], "channels": WIDTH, "num_classes": CLASSES, "norm_cfg": {"type": "BN"}})
    ours = decoder(name, IN, CLASSES, channels=WIDTH)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    maps, again = inputs(PYRAMID, IN), inputs(PYRAMID, IN)
    scores = []
    for head, levels in ((ours, maps), (theirs, again)):
        head.train(train)
        torch.manual_seed(2)  # which channels are dropped
        scores.append(head([level.requires_grad_() for level in levels]))
        scores[-1].square().sum().backward()
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)
    read = [(a.grad, b.grad) for a, b in zip(maps, again, strict=True) if b.grad is not None]
    for a, b in [*read, *((p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))]:
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def test_dpt_equals_mmsegmentation_where_halving_is_exact(models):
    theirs = models.build({**TYPES["dpt"], "channels": WIDTH, "num_classes": CLASSES, "norm_cfg": {"type": "BN"}})
    ours = decoder("dpt", (8,) * 4, CLASSES, channels=WIDTH, reassembled=(4, 6, 8, 10))
    randomize(theirs)
    names = {key: official_dpt(key) for key in ours.state_dict()}
    assert set(names.values()) == set(theirs.state_dict())
    ours.load_state_dict({key: theirs.state_dict()[there] for key, there in names.items()})
    maps = inputs(((4, 6),) * 4, (8,) * 4)
    pairs = [(level, level.mean((2, 3))) for level in maps]  # mmseg's class token, which readout "ignore" leaves out
    torch.testing.assert_close(ours.eval()(maps), theirs.eval()(pairs), atol=1e-5, rtol=1e-5)


def official_dpt(key):
    """Translate our name of a tensor: mmseg wraps its convolutions, all but those that rescale."""
    for ours, theirs in (
        (r"^(projects|resize_layers)", r"reassemble_blocks.\1"),
        (r"((?:projects|convs)\.\d|fusion_blocks\.\d\.project)\.", r"\1.conv."),
        (r"unit(\d)\.conv(\d)\.", r"unit\1.conv\2.conv."),
        (r"unit(\d)\.bn(\d)\.", r"unit\1.conv\2.bn."),
    ):
        key = re.sub(ours, theirs, key)
    return key
