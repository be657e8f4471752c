"""What tests of the plug-in share. They are skipped where mmsegmentation is not installed, so it is imported inside."""

import importlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

import vispeft


@pytest.fixture(autouse=True)
def _no_earlier_run():
    """Forget what mmengine keeps of a run under the second it began in, which an earlier test may share."""
    if importlib.util.find_spec("mmengine") is not None:
        from mmengine.logging import MessageHub, MMLogger
        from mmengine.visualization import Visualizer

        for kept in (MessageHub, MMLogger, Visualizer):
            kept._instance_dict.clear()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Rectangles of two colours on noise, with a border nobody labelled."""
    root, random = tmp_path_factory.mktemp("toy"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for folder in ("images", "masks"):
            (root / folder / split).mkdir(parents=True)
        for index in range(count):
            image = random.integers(0, 60, (64, 96, 3), dtype=np.uint8)
            mask = np.zeros((64, 96), dtype=np.uint8)
            for label, colour in ((1, 0), (2, 2)):
                top, left = random.integers(0, 32), random.integers(0, 64)
                image[top : top + 30, left : left + 30, colour] = 220
                mask[top : top + 30, left : left + 30] = label
            mask[:2] = 255
            Image.fromarray(image).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files with the weights of each backbone, in place of pretrained ones."""
    from tests.mmseg.toy import BACKBONES

    folder, files = tmp_path_factory.mktemp("weights"), {}
    for name, backbone in BACKBONES.items():
        model = vispeft.create_model(backbone["model"], pretrained=False, num_classes=0, **backbone["model_args"])
        files[name] = folder / f"{name}.safetensors"
        save_file(model.state_dict(), files[name])
    return files


@pytest.fixture(scope="session", params=["swin", "vit"])
def trained(request, toy, weights, tmp_path_factory):
    """A run of two iterations; tests must not change it."""
    importlib.import_module("vispeft.mmseg")
    from mmengine.runner import Runner

    from tests.mmseg.toy import make_config

    place = tmp_path_factory.mktemp(f"run_{request.param}")
    config = make_config(request.param, toy, weights, place)
    runner = Runner.from_cfg(config)
    before = {name: tensor.clone() for name, tensor in runner.model.state_dict().items()}
    runner.train()
    return SimpleNamespace(
        family=request.param, place=place, model=runner.model.eval(), before=before, config=place / "toy.py"
    )
