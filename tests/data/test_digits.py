import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.datasets import load_digits

from vispeft.data import DigitsData, EpochSampler, Preprocessing
from vispeft.data.randomness import draw_seed
from vispeft.errors import ConfigError, DataError

SETTINGS = {"image_size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.fixture
def digits():
    data = DigitsData(**SETTINGS)
    data.setup()
    return data


def test_splits_are_whole_disjoint_and_stratified(digits):
    indices = digits._indices(torch.from_numpy(load_digits().target))
    everything = torch.cat(list(indices.values()))
    assert sorted(everything.tolist()) == list(range(1797))
    for name in ("train", "validation", "test"):
        counts = digits.split(name).targets.bincount()
        assert counts.max() - counts.min() <= 5


def test_two_folds_leave_images_to_train_on():
    data = DigitsData(folds=2, validation=0.5, image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3)
    data.setup()
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [449, 449, 899]


def test_split_does_not_depend_on_the_training_seed(digits):
    other = DigitsData(**SETTINGS, seed=7)
    other.setup()
    assert torch.equal(other.split("test").images, digits.split("test").images)
    resplit = DigitsData(**SETTINGS, split_seed=1)
    resplit.setup()
    assert not torch.equal(resplit.split("test").images, digits.split("test").images)


def test_batch_has_the_backbone_s_form(digits):
    images, labels = next(iter(digits.train_dataloader()))
    assert images.shape == (64, 3, 16, 16)
    assert images.dtype == torch.float32
    assert labels.shape == (64,)
    assert digits.input_size == (3, 16, 16)
    assert digits.num_classes == len(digits.class_names) == 10
    assert torch.equal(images[:, 0], images[:, 2])
    assert images.min() >= -1
    assert images.max() <= 1


def test_images_equal_the_same_transform_of_the_originals(digits):
    position = int(digits._indices(torch.from_numpy(load_digits().target))["test"][0])
    grey = torch.from_numpy(load_digits().images[position] * 255 / 16).round().to(torch.uint8)
    expected = digits.preprocessing.transform()(grey.expand(3, -1, -1))
    assert torch.equal(digits.split("test")[0][0], expected)


@pytest.mark.parametrize("augment", [False, True])
def test_epochs_differ_and_repeat(augment):
    def epoch(number, seed=0):
        data = DigitsData(**SETTINGS, augment=augment, seed=seed, batch_size=32, test=0.6, validation=0.38)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        torch.manual_seed(number)  # the global state must not matter
        return torch.cat([images for images, _ in loader])

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))
    assert not torch.equal(epoch(3), epoch(3, seed=1))


def test_augmentation_follows_seed_epoch_and_index_alone():
    data = DigitsData(**SETTINGS, augment=True, test=0.6, validation=0.3)
    data.setup()
    train = data.split("train")
    state = torch.get_rng_state()
    one, _ = train[(2, 5)]
    many, _ = train.__getitems__([(2, 4), (2, 5)])
    assert torch.equal(one, many[1])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, train[(3, 5)][0])
    assert torch.equal(data.split("test")[(2, 5)][0], data.split("test")[(3, 5)][0])


def test_workers_serve_the_same_batches():
    batches = []
    for workers in (0, 1):
        data = DigitsData(**SETTINGS, augment=True, num_workers=workers, test=0.6, validation=0.38)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(1)
        batches.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*batches)


def test_sampler_is_a_permutation_per_epoch():
    sampler = EpochSampler(50, seed=1)
    sampler.set_epoch(2)
    pairs = list(sampler)
    assert {epoch for epoch, _ in pairs} == {2}
    assert sorted(index for _, index in pairs) == list(range(50)) != [index for _, index in pairs]


def test_seeds_are_mixed():
    seeds = {draw_seed(seed, epoch, index) for seed in range(5) for epoch in range(20) for index in range(50)}
    assert len(seeds) == 5 * 20 * 50


def test_without_a_backbone_the_size_must_be_given():
    with pytest.raises(DataError, match="for_model"):
        DigitsData(mean=(0, 0, 0), std=(1, 1, 1)).setup()
    data = DigitsData()
    data.fit_to(Preprocessing(size=(24, 16), mean=(0, 0, 0), std=(1, 1, 1)))
    data.setup()
    assert data.split("test")[0][0].shape == (3, 24, 16)


def test_before_setup_there_is_no_split():
    with pytest.raises(DataError, match="setup"):
        DigitsData(**SETTINGS).train_dataloader()


def test_trainer_hands_the_backbone_s_preprocessing_over():
    class Module(torch.nn.Module):
        preprocessing = Preprocessing(size=(8, 8), mean=(0.1, 0.2, 0.3), std=(1, 1, 1))

    data = DigitsData(std=(2, 2, 2))
    data.trainer = Trainer(logger=False, enable_checkpointing=False)
    data.trainer.strategy._lightning_module = Module()
    assert data.preprocessing.mean == (0.1, 0.2, 0.3)
    assert data.preprocessing.std == (2, 2, 2)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"batch_size": 0}, ConfigError),
        ({"num_workers": -1}, ConfigError),
        ({"validation": 0.5, "test": 0.5}, ConfigError),
        ({"test": 0.001}, ConfigError),
        ({"split_seed": -1}, ConfigError),
        ({"image_size": 0}, DataError),
        ({"std": (0, 1, 1)}, DataError),
        ({"mean": (0.5,)}, DataError),
        ({"mean": (0.5, float("nan"), 0.5)}, DataError),
        ({"interpolation": "lanczos7"}, DataError),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, error):
    with pytest.raises(error):
        DigitsData(**settings)


def test_what_drop_last_leaves_is_counted_over_all_processes():
    data = DigitsData(batch_size=900, drop_last=True, **SETTINGS)
    data.processes = 2
    with pytest.raises(DataError, match="fewer than batch_size=900 of 2 processes, and drop_last"):
        data.setup()
    data.processes = None
    data.setup()
