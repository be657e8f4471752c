"""Augmentation of whole batches behind the workers, here on the CPU."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from vispeft.data import Augmentation, ImageFolderData, Preprocessing, read_image
from vispeft.data.device_augmentation import AREA, DeviceAugmentation, UnfinishedBatch
from vispeft.errors import ConfigError

SMALL = Preprocessing(size=(12, 16), mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    random, place = np.random.default_rng(0), tmp_path_factory.mktemp("photos")
    for number in range(24):
        folder = place / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (14, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return place


def data_of(root, **settings):
    augment = Augmentation(**{"on_device": True, **settings.pop("augment", {})})
    data = ImageFolderData(root=str(root), batch_size=4, drop_last=True, augment=augment, **settings)
    data.fit_to(SMALL)
    data.setup()
    return data


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [data.augment_on_device(batch) for batch in loader]


def test_a_flip_and_nothing_else_gives_the_mirrored_preprocessing(root):
    data = data_of(root, augment={"flip": 1.0})
    split = data.split("train")
    raw = split.batch([(0, index) for index in range(4)])
    assert isinstance(raw, UnfinishedBatch)
    assert raw.images.dtype == torch.uint8
    images, targets = data.on_after_batch_transfer(raw, 0)  # what a trainer calls
    for index, image in enumerate(images):
        plain = SMALL.transform()(read_image(split.source.paths[index]))
        torch.testing.assert_close(image, plain.flip(-1), rtol=0, atol=0)
    assert torch.equal(targets, split.targets[:4])
    evaluated = next(iter(data.val_dataloader()))
    assert data.augment_on_device(evaluated) is evaluated


def test_batches_depend_on_seed_epoch_and_index_alone(root):
    settings = {"augment": {"crop": "resized", "flip": 0.5, "erase": 0.5, "mixup": 0.8}}
    first, again, workers, later, other = (
        epoch(data_of(root, **settings, **more), number)
        for more, number in (({}, 0), ({}, 0), ({"num_workers": 1}, 0), ({}, 1), ({"seed": 1}, 0))
    )
    for one, two, three in zip(first, again, workers, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[0], three[0])
        assert torch.equal(one[1], three[1])
    assert first[0][1].shape == (4, 2)  # shares of both classes
    assert not torch.equal(first[0][0], later[0][0])
    assert not torch.equal(first[0][0], other[0][0])


class Kept(LightningModule):
    """Keeps the batches that a trainer gives it."""

    def __init__(self):
        super().__init__()
        self.weight, self.trained, self.validated = torch.nn.Parameter(torch.zeros(())), [], []

    def training_step(self, batch):
        self.trained.append(batch)
        return self.weight * 0.0

    def validation_step(self, batch):
        self.validated.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainer_augments_training_batches_and_no_others(root, tmp_path):
    settings = {"augment": {"crop": "resized", "flip": 0.5, "erase": 0.5, "mixup": 0.8}}
    kept, quiet = Kept(), ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(kept, datamodule=data_of(root, **settings))
    wanted = data_of(root, **settings)
    expected = {"trained": epoch(wanted), "validated": [*wanted.val_dataloader()]}
    for name, batches in expected.items():
        for one, two in zip(getattr(kept, name), batches, strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])


def test_later_batches_need_no_number_from_the_processor(root, monkeypatch):
    data = data_of(root, augment={"flip": 0.5, "erase": 0.5, "mixup": 0.8})
    first, second = (data.split("train").batch([(0, at + index) for index in range(4)]) for at in (0, 4))
    data.augment_on_device(first)

    def refused(*arguments, **settings):
        raise AssertionError("a copy to the device, which waits for all of its work")

    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, refused)
    images, _ = data.augment_on_device(second)
    assert images.dtype == torch.float32


def test_erased_rectangles_hold_noise_of_the_asked_size():
    steps = DeviceAugmentation(SMALL, Augmentation(erase=1.0, flip=0.3, on_device=True))
    torch.manual_seed(0)
    drawn = [steps.draw() for _ in range(300)]
    boxes = torch.tensor([box for _, box in drawn])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert (boxes[:, 2:] <= torch.tensor(SMALL.size)).all()
    share = sides.prod(1) / (12 * 16)
    assert share.max() <= AREA[1] + 0.06  # sides are rounded to whole pixels
    assert abs(share.mean() - sum(AREA) / 2) < 0.05
    assert abs(sum(flip for flip, _ in drawn) / 300 - 0.3) < 0.08
    images = torch.full((300, 3, *SMALL.size), 128, dtype=torch.uint8)
    batch = UnfinishedBatch(images, torch.zeros(300), torch.zeros(300, dtype=torch.bool), boxes, (0, 7))
    found, _ = steps.finish(batch)
    changed = (found != SMALL.normalise()(images)).any(1)
    assert torch.equal(changed.sum((1, 2)), sides.prod(1))
    noise = found[changed[:, None].expand_as(found)]
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02


def test_what_works_on_single_images_alone_is_refused(root):
    with pytest.raises(ConfigError, match="rand_augment works on single images"):
        data_of(root, augment={"rand_augment": "rand-m9-n2"})
    with pytest.raises(ConfigError, match="crop='random'"):
        data_of(root, augment={"crop": "random"})
