"""Pictures of masks."""

import pytest
import torch
from PIL import Image

from vispeft.data.masks import IGNORE
from vispeft.errors import DataError
from vispeft.viz import colour_mask, overlay_grid
from vispeft.viz.overlays import OPACITY, UNLABELLED, class_legend, lay_over

PALETTE = ((0, 0, 0), (200, 0, 0), (0, 150, 50))
NAMES = ("ground", "roof", "tree")


def test_colours_are_those_of_the_classes():
    mask = torch.tensor([[0, 1, 2], [IGNORE, 2, 0]])
    painted = colour_mask(mask, PALETTE)
    assert painted.dtype == torch.uint8
    assert painted.shape == (3, 2, 3)
    for row in range(2):
        for column in range(3):
            index = int(mask[row, column])
            assert tuple(painted[:, row, column].tolist()) == (UNLABELLED if index == IGNORE else PALETTE[index])
    assert torch.equal(colour_mask(mask.to(torch.uint8), PALETTE), painted)


def test_overlays_blend_colours_and_stripe_what_has_no_label():
    image = torch.randint(0, 256, (3, 30, 20), dtype=torch.uint8)
    mask = torch.randint(0, 3, (30, 20))
    blended = lay_over(image, mask, PALETTE)
    expected = (1 - OPACITY) * image + OPACITY * torch.tensor(PALETTE)[mask].permute(2, 0, 1)
    assert (blended - expected).abs().max() <= 0.5001
    mask[:10] = IGNORE
    striped = lay_over(image, mask, PALETTE)
    assert torch.equal(striped[:, 10:], blended[:, 10:])
    left = (striped[:, :10] == image[:, :10]).all(0)
    assert 0.3 < float(left.float().mean()) < 0.7


def test_the_legend_names_what_occurs():
    masks = [torch.tensor([[2, 2, 1]]), torch.tensor([[2, IGNORE]])]
    assert [entry.get_label() for entry in class_legend(masks, PALETTE, NAMES)] == ["tree", "roof", "no label"]
    many = class_legend([torch.arange(150)[None]], [(0, 0, 0)] * 150, [str(index) for index in range(150)])
    assert many[-1].get_label() == "and 86 more"


@pytest.mark.parametrize("palette", [PALETTE, None])
def test_pictures_of_images_of_several_sizes(tmp_path, palette):
    sizes = [(24, 32), (40, 16)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    masks = [torch.randint(0, 3, size) for size in sizes]
    labels = [torch.where(torch.rand(mask.shape) < 0.2, IGNORE, mask) for mask in masks]
    path = overlay_grid(images, labels, masks, palette, NAMES, tmp_path / "overlays.png")
    with Image.open(path) as picture:
        picture.load()
        assert picture.width > 900
        assert picture.height > picture.width
    again = overlay_grid(images, labels, masks, palette, NAMES, tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes()


def test_what_does_not_fit_is_refused(tmp_path):
    images, masks = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8, dtype=torch.long)
    path = tmp_path / "a.png"
    with pytest.raises(DataError, match="the value 3"):
        overlay_grid(images, masks + 3, masks, PALETTE, NAMES, path)
    with pytest.raises(DataError, match="uint8"):
        overlay_grid(images.float(), masks, masks, PALETTE, NAMES, path)
    with pytest.raises(DataError, match=r"shape \(4, 8\)"):
        overlay_grid(images, masks[:, :4], masks, PALETTE, NAMES, path)
    with pytest.raises(DataError, match="1 image, 0 labels"):
        overlay_grid(images, [], masks, PALETTE, NAMES, path)
    with pytest.raises(DataError, match="3 colours and 2"):
        overlay_grid(images, masks, masks, PALETTE, NAMES[:2], path)
    with pytest.raises(DataError, match="height, width"):
        colour_mask(masks, PALETTE)
    assert not path.exists()
