import colorsys

import pytest
import torch
from torchvision import tv_tensors

from vispeft.data import Preprocessing
from vispeft.data.joint import EvaluationPair, MaskAugmentation, MaskCrop, PhotometricDistortion, Rescale, TrainPair
from vispeft.data.masks import IGNORE
from vispeft.data.randomness import seeded
from vispeft.errors import ConfigError, DataError

PLAIN = Preprocessing(size=(16, 24), mean=(0.5, 0.25, 0.75), std=(0.5, 0.5, 0.5), interpolation="bilinear")
GEOMETRY = {"photometric": False, "cat_max_ratio": 1.0}


def pair(height=40, width=60):
    """An image whose colours say which class is where: 25 times the class in every channel."""
    mask = torch.arange(10).repeat_interleave(height // 10)[:, None].expand(height, width).contiguous().to(torch.uint8)
    return (mask * 25).expand(3, -1, -1).contiguous(), mask


def grey(images):
    """Undo the normalisation of the first channel and give 25ths."""
    return (images[0] * 0.5 + 0.5) * 255 / 25


def test_crops_have_the_size_and_image_and_mask_stay_together():
    image, mask = pair()
    prepare = TrainPair(PLAIN, MaskAugmentation(scale=(0.5, 3.0), **GEOMETRY))
    padded = 0
    for index in range(20):
        with seeded(0, 0, index):
            out, labels = prepare(image, mask)
        assert out.shape == (3, 16, 24)
        assert labels.shape == (16, 24)
        assert (out.dtype, labels.dtype, type(out), type(labels)) == (
            torch.float32,
            torch.int64,
            torch.Tensor,
            torch.Tensor,
        )
        known = labels != IGNORE
        # Colours are blended at the borders of classes alone, and by less than a class.
        assert (grey(out) - labels)[known].abs().max() < 1
        assert ((grey(out) - labels)[known].abs() < 0.05).float().mean() > 0.5
        padded += int((~known).any())
    assert padded == 0


def test_what_is_missing_is_filled_with_the_mean_colour_and_ignored():
    image, mask = pair(20, 60)
    out, labels = TrainPair(PLAIN, MaskAugmentation(scale=(0.5, 0.5), flip=0.0, **GEOMETRY))(image, mask)
    assert bool((labels[:10] != IGNORE).all())
    assert bool((labels[10:] == IGNORE).all())
    assert bool((out[:, 10:] == 0).all())


def test_masks_are_not_moved_against_images():
    # Four equal rows: their middle stays where it is at any size, up to rounding.
    image, mask = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8)
    image[:, 2:], mask[2:] = 200, 1
    for size in ((2, 2), (6, 6), (8, 8), (14, 14)):
        seen, labels = Rescale("bilinear", size=size)(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert torch.equal(seen[0] > 100, labels == 1)


def test_short_side_comes_before_the_factor():
    image, mask = pair(40, 60)
    out, labels = Rescale("bilinear", short_side=20, factors=(2.0, 2.0))(tv_tensors.Image(image), tv_tensors.Mask(mask))
    assert out.shape[-2:] == labels.shape == (40, 60)
    prepare = EvaluationPair(PLAIN, whole=True, short_side=20)
    out, labels = prepare(image, mask)
    assert (out.shape, labels.shape) == ((3, 20, 30), (40, 60))
    assert EvaluationPair(PLAIN, whole=True)(image, mask)[0].shape == (3, 40, 60)
    out, labels = EvaluationPair(PLAIN)(image, mask)
    assert torch.equal(out, PLAIN.transform()(image))
    assert torch.equal(labels, mask.long())


def test_without_augmentation_the_whole_image_is_seen():
    image, mask = pair()
    out, labels = TrainPair(PLAIN, None)(image, mask)
    assert torch.equal(out, PLAIN.transform()(image))
    assert labels.shape == (16, 24)
    assert labels.unique().tolist() == list(range(10))


def test_windows_full_of_one_class_are_drawn_again():
    mask = torch.zeros(100, 100, dtype=torch.uint8)
    mask[:30, :30] = 1
    mask[60:] = IGNORE  # counts for nothing

    def fullness(ratio):
        shares = []
        for index in range(200):
            with seeded(index):
                _, window = MaskCrop((40, 40), ratio)(tv_tensors.Image(torch.zeros(3, 100, 100)), tv_tensors.Mask(mask))
            known = window[window != IGNORE]
            shares.append(float(torch.bincount(known.long()).max() / len(known)) if len(known) else 1.0)
        return sum(share < 0.75 for share in shares) / len(shares)

    assert fullness(0.75) > 1.5 * fullness(1.0) > 0
    with seeded(0):  # one class only: a window is taken all the same
        _, window = MaskCrop((40, 40), 0.75)(
            tv_tensors.Image(torch.zeros(3, 50, 50)), tv_tensors.Mask(mask[30:60, 30:])
        )
    assert window.shape == (30, 40)


def by_hand(pixel, changes):
    """The same changes of one colour, through the standard library's HSV."""
    red, green, blue = (value / 255 for value in pixel)
    for name, value in changes.items():
        hue, saturation, light = colorsys.rgb_to_hsv(red, green, blue)
        if name == "brightness":
            red, green, blue = (min(1, max(0, part + value / 255)) for part in (red, green, blue))
        elif name == "contrast":
            red, green, blue = (min(1, part * value) for part in (red, green, blue))
        elif name == "saturation":
            red, green, blue = colorsys.hsv_to_rgb(hue, min(1, saturation * value), light)
        else:
            red, green, blue = colorsys.hsv_to_rgb((hue + value) % 1, saturation, light)
    return torch.tensor([red, green, blue]) * 255


def test_photometric_distortion_is_that_of_hsv():
    distort = PhotometricDistortion()
    image = torch.randint(0, 256, (3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = set()
    for index in range(40):
        with seeded(1, index):
            changes = distort.make_params([])["changes"]
        with seeded(1, index):
            out, mask = distort(tv_tensors.Image(image), tv_tensors.Mask(image[0]))
        assert torch.equal(mask, image[0])
        seen.add(tuple(changes))
        expected = torch.stack([by_hand(pixel, changes) for pixel in image.flatten(1).T.tolist()], 1).view(3, 6, 6)
        assert (out.float() - expected).abs().max() <= 1
    assert ("brightness", "contrast", "saturation", "hue") in seen
    assert ("brightness", "saturation", "hue", "contrast") in seen


def test_grey_and_black_stay_so_when_saturation_changes():
    flat = torch.tensor([0, 7, 255], dtype=torch.uint8).expand(3, 1, 3)
    out = PhotometricDistortion().transform(tv_tensors.Image(flat), {"changes": {"saturation": 1.5}})
    assert torch.equal(out, flat)


def test_the_same_seed_gives_the_same_crop():
    image, mask = pair()
    prepare = TrainPair(PLAIN, MaskAugmentation())

    def make(*numbers):
        with seeded(*numbers):
            return prepare(image, mask)

    assert all(torch.equal(a, b) for a, b in zip(make(0, 1, 2), make(0, 1, 2), strict=True))
    assert not torch.equal(make(0, 1, 2)[0], make(0, 1, 3)[0])


@pytest.mark.parametrize(
    "fields", [{"crop_size": 0}, {"scale": (2.0, 1.0)}, {"scale": (0, 1)}, {"cat_max_ratio": 0}, {"flip": 1.5}]
)
def test_settings_that_cannot_work_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        MaskAugmentation(**fields)


def test_a_line_of_pixels_is_not_enlarged_to_gigabytes():
    line = torch.zeros(3, 1, 1_000_000, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"of 1 x 1000000 pixels would be resized to 224 x 224000000"):
        Rescale("bilinear", short_side=224)(tv_tensors.Image(line))


def test_a_large_tile_grows_as_its_factors_say():
    """It was refused for more pixels than files may have, at a random step."""
    tile = torch.empty(3, 6000, 6000, device="meta")
    assert Rescale("bilinear", factors=(2.0, 2.0)).make_params([tile]) == {"size": [12000, 12000]}
