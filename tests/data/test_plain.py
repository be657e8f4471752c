"""Training images without their augmentation, in their fixed order."""

import numpy as np
import pytest
import torch
from PIL import Image

import vispeft
from tests.tiny import TINY
from vispeft.data import Augmentation, ImageFolderData, ScenesData
from vispeft.data.base import has_plain


@pytest.fixture(scope="module")
def model():
    return vispeft.create_model("vit_tiny_patch16_224", num_classes=2, **TINY)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for kind in ("one", "two"):
        (root / kind).mkdir()
        for number in range(6):
            Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8)).save(root / kind / f"{number}.png")
    return root


def images(loader):
    parts = [(batch[0], batch[1]) for batch in loader]
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])


@pytest.mark.parametrize(
    "augment",
    [
        Augmentation(crop="resized", flip=0.5, erase=0.5, mixup=0.8),
        Augmentation(crop="resized", flip=0.5, erase=0.5, on_device=True),
    ],
    ids=["mixed", "on the device"],
)
def test_plain_images_are_those_of_data_without_augmentation(model, photos, augment):
    settings = {"root": str(photos), "batch_size": 2, "validation": 0.2, "test": 0.2}
    data = ImageFolderData.for_model(model, augment=augment, drop_last=True, **settings)
    bare = ImageFolderData.for_model(model, augment=None, **settings)
    assert has_plain(data.split("train"))
    for name in ("train", "validation", "test"):
        found, wanted = images(data.plain_dataloader(name)), images(bare.plain_dataloader(name))
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert len(found[1]) == len(data.split(name)), "no batch is left out"
    before = data.split("train").batch([(0, 0), (0, 1)])
    list(data.plain_dataloader("train"))
    again = data.split("train").batch([(0, 0), (0, 1)])
    assert torch.equal(before[0], again[0]), "the split itself goes on with its augmentation"


def test_plain_masks_are_prepared_as_for_an_evaluation(model):
    data = ScenesData.for_model(model, images=9, scene_size=24, batch_size=2)
    loader = data.plain_dataloader("train")
    found, masks = images(loader)
    assert masks.shape[1:] == (24, 24), "masks keep their size"
    again, _ = images(data.plain_dataloader("train"))
    assert torch.equal(found, again)
    first = data.split("train").plain()
    assert torch.equal(first.batch([(0, 0)])[0], first.batch([(7, 0)])[0])
    assert not torch.equal(data.split("train").batch([(0, 0)])[0], data.split("train").batch([(7, 0)])[0])
