import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.published import Painter
from vispeft.data import Augmentation, ImageFolderData, Preprocessing
from vispeft.data.augmentation import TrainTransform
from vispeft.data.randomness import seeded
from vispeft.errors import ConfigError, DataError

BACKBONE = Preprocessing(size=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))
EVERYTHING = Augmentation(
    crop="resized", flip=0.5, rand_augment="rand-m9-n2-mstd0.5", erase=0.5, mixup=0.8, cutmix=1.0, mix_probability=0.9
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place, painter = tmp_path_factory.mktemp("photos"), Painter()
    for name in "abc":
        for number in range(12):
            painter.paint(place / name / f"{number}.png", (24, 20))
    return place


def ready(root, **settings):
    data = ImageFolderData(root=str(root), **{"batch_size": 6, "drop_last": True, **settings})
    data.fit_to(BACKBONE)
    data.setup()
    return data


def epoch(data, number):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([targets for _, targets in batches])


def test_everything_is_a_function_of_seed_epoch_and_index(root):
    first = epoch(ready(root, augment=EVERYTHING), 2)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    for workers in (0, 2):
        again = epoch(ready(root, augment=EVERYTHING, num_workers=workers), 2)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], epoch(ready(root, augment=EVERYTHING), 3)[0])
    assert not torch.equal(first[0], epoch(ready(root, augment=EVERYTHING, seed=1), 2)[0])


def test_a_batch_in_the_middle_of_an_epoch_is_the_same_alone(root):
    train = ready(root, augment=EVERYTHING).split("train")
    batch = [(4, 3), (4, 17), (4, 0), (4, 9)]
    alone = train.__getitems__(batch)
    train.__getitems__([(4, 5), (4, 6)])
    again = train.__getitems__(batch)
    assert torch.equal(alone[0], again[0])
    assert torch.equal(alone[1], again[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_in_the_middle_as_if_it_had_not_stopped(root, workers):
    whole = list(ready(root, augment=EVERYTHING, num_workers=workers).train_dataloader())
    data = ready(root, augment=EVERYTHING, num_workers=workers)
    data.load_state_dict({**data.order_facts(), "epoch": 0, "batches": 2})
    rest = list(data.train_dataloader())
    assert len(rest) == len(whole) - 2 > 0
    for (images, targets), (expected, shares) in zip(rest, whole[2:], strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(targets, shares)


def test_the_global_generators_are_left_as_they_were(root):
    data = ready(root, augment=EVERYTHING)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    epoch(data, 0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2][1], np.random.get_state()[1])  # noqa: NPY002


def test_mixed_targets_are_shares_that_sum_to_one(root):
    data = ready(root, augment=Augmentation(mixup=1.0))
    images, targets = epoch(data, 0)
    assert targets.shape == (len(images), 3)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(len(images)))
    assert ((targets > 0).sum(1) == 2).any()
    # A mixed image is the same mixture of two plain ones.
    plain = ready(root).split("train")
    batch = [(0, 0), (0, 15)]
    mixed, shares = data.split("train").__getitems__(batch)
    one, two = plain.__getitems__(batch)[0]
    share = shares[0, plain[(0, 0)][1]]
    assert torch.allclose(mixed[0], share * one + (1 - share) * two, atol=1e-6)


def test_validation_and_test_images_are_not_augmented(root):
    data, plain = ready(root, augment=EVERYTHING), ready(root)
    for name in ("validation", "test"):
        assert torch.equal(data.split(name)[0][0], plain.split(name)[0][0])
        assert data.split(name)[0][1].ndim == 0


def test_each_step_does_what_it_says():
    image = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = BACKBONE.transform()(image)

    def made(**fields):
        with seeded(0):
            return TrainTransform(BACKBONE, Augmentation(**fields))(image.clone())

    assert torch.equal(made(), plain)
    assert torch.equal(made(flip=1.0), plain.flip(2))
    erased = made(erase=1.0)
    assert 0.02 <= (erased != plain).any(0).float().mean() <= 0.5
    assert not torch.equal(made(rand_augment="rand-m9-n3"), plain)
    assert made(crop="resized", crop_area=(0.2, 0.3)).shape == (3, 16, 16)
    assert torch.equal(made(crop="resized", crop_area=(0.2, 0.3)), made(crop="resized", crop_area=(0.2, 0.3)))


def test_the_middle_is_cut_out_of_a_proportional_image():
    image = torch.arange(40 * 20).remainder(251).to(torch.uint8).reshape(1, 20, 40).expand(3, -1, -1)
    half = Preprocessing(size=(10, 10), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.5)
    assert torch.equal(half.resize()(image), image[:, 5:15, 15:25])
    assert Preprocessing.from_dict(half.to_dict()) == half
    assert "crop_pct" not in BACKBONE.to_dict()
    wide = Preprocessing(size=(8, 32), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0)
    assert wide.resize()(image).shape == (3, 8, 32)
    pillow = Image.fromarray(image[0].numpy()).resize((32, 16), Image.Resampling.BICUBIC)
    whole = wide.scale()(image)[0].int()
    assert (whole - torch.from_numpy(np.array(pillow)).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"flip": 1.5}, "probability"),
        ({"mixup": -1}, "from 0"),
        ({"crop": "some"}, "choices"),
        ({"crop_area": (0.5, 0.2)}, "two shares"),
        ({"rand_augment": "strong"}, "begins with rand"),
        ({"rand_augment": "rand-q9"}, "not understood"),
    ],
)
def test_wrong_settings_are_refused_at_once(fields, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**fields)


def test_what_does_not_go_together_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match="drop_last: true"):
        ready(root, augment=Augmentation(mixup=1.0), drop_last=False)
    with pytest.raises(ConfigError, match="even batch_size"):
        ready(root, augment=Augmentation(cutmix=1.0), batch_size=5)
    with pytest.raises(ConfigError, match="crop_pct"):
        ready(root, augment=Augmentation(crop="random"))
    with pytest.raises(DataError, match="Make batch_size smaller"):
        ready(root, batch_size=64)


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)])
def test_a_line_of_pixels_is_cut_before_it_is_enlarged(shape):
    """Enlarged whole to cover the window, it asked for gigabytes."""
    preprocessing = Preprocessing(size=(14, 14), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=0.875)
    line = torch.arange(100_000).remainder(251).to(torch.uint8).view(1, *shape).expand(3, -1, -1)
    before = line.stride()
    out = preprocessing.resize()(line)
    assert out.shape == (3, 14, 14)
    assert out.float().mean() == pytest.approx(float(line[0].flatten()[50_000]), abs=2)
    assert preprocessing.scale()(line).shape[1:].numel() <= 16 * 17 * 17
    assert line.stride() == before
