import json
import math

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vispeft
from tests.tiny import TINY
from vispeft.cli.evaluation import measure
from vispeft.data import ImageData, MemorySplit
from vispeft.errors import ConfigError, DataError, FileError
from vispeft.tasks import Classification, MultiLabel, Regression
from vispeft.tasks.classification import balanced_weights, fit_temperature, soft_cross_entropy
from vispeft.tasks.multilabel import PresentMeanAveragePrecision, balanced_pos_weights
from vispeft.tasks.supervised import train_targets

SIZES = {"train": 96, "validation": 48, "test": 48}


class Marks(ImageData):
    """Noise in which the brightness of three corners is what is asked for, in one of three ways."""

    def __init__(self, target="class", **settings):
        super().__init__(batch_size=16, image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3, **settings)
        self.target = target

    @property
    def class_names(self):
        return ("left", "right", "below")

    def load(self, preprocessing):
        generator = torch.Generator().manual_seed(0)
        splits = {}
        for name, count in SIZES.items():
            images = torch.randint(0, 60, (count, 3, 16, 16), generator=generator).to(torch.uint8)
            light = torch.randint(0, 190, (count, 3), generator=generator)
            for corner, (rows, columns) in enumerate(
                [(slice(8), slice(8)), (slice(8), slice(8, 16)), (slice(8, 16), slice(16))]
            ):
                images[:, :, rows, columns] += light[:, corner, None, None, None].to(torch.uint8)
            targets = {
                "class": light.argmax(1),
                "multilabel": (light > 95).float(),
                "regression": 1000 + 3.0 * light,
            }
            splits[name] = MemorySplit(images, targets[self.target], preprocessing)
        return splits


def make(task=Classification, method=None, **settings):
    seed_everything(0)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 3, "lr": 3e-2, **settings}
    return task(method=method or vispeft.SSF(), **settings)


def fit(task, epochs=8):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    run = Trainer(max_epochs=epochs, enable_checkpointing=False, accelerator="cpu", **quiet)
    data = Marks(task.target)
    run.fit(task, datamodule=data)
    return run, data


def outputs(task, data, split):
    batch = data.split(split).batch([(0, index) for index in range(SIZES[split])])
    with torch.inference_mode():
        return task.eval()(batch[0]), batch[1]


def test_multilabel_metrics_equal_scikit_learn_s(tmp_path):
    task = make(MultiLabel, pos_weights="balanced")
    run, data = fit(task)
    targets = data.split("train").targets
    assert torch.allclose(task._weights, (1 - targets).sum(0) / targets.sum(0))
    measured = measure(run, task, data)
    scores, wanted = outputs(task, data, "test")
    expected = [average_precision_score(wanted[:, label], scores[:, label]) for label in range(3)]
    assert measured.metrics["test"]["mean_average_precision"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert measured.metrics["test"]["f1"] == pytest.approx(f1_score(wanted, scores > 0, average="macro"), abs=1e-5)
    assert list(measured.details["test_average_precision_per_class"].values()) == pytest.approx(expected, abs=1e-5)
    assert measured.metrics["test"]["mean_average_precision"] > 0.75  # the corners are found
    assert task.row(torch.tensor([0.9, 0.1, 0.5]), data.class_names) == [
        "left;below",
        "0.900000",
        "0.100000",
        "0.500000",
    ]
    measured.draw(task, data.class_names, tmp_path)
    assert (tmp_path / "average_precision.png").stat().st_size > 5000


def test_a_label_no_image_has_is_left_out(tmp_path, recwarn):
    scores = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(60).reshape(20, 3) % 4 == 0).long()
    targets[:, 1] = 0
    metric = PresentMeanAveragePrecision(3)
    metric.update(scores[:12].sigmoid(), targets[:12])
    metric.update(scores[12:].sigmoid(), targets[12:])
    expected = [average_precision_score(targets[:, label], scores[:, label]) for label in (0, 2)]
    assert float(metric.compute()) == pytest.approx(sum(expected) / 2, abs=1e-5)
    task = make(MultiLabel)
    listed = task.summary(scores, targets, "abc")["test_average_precision_per_class"]
    assert listed == {"a": pytest.approx(expected[0], abs=1e-5), "b": None, "c": pytest.approx(expected[1], abs=1e-5)}
    task.draw(scores, targets, "abc", tmp_path)
    assert not [warning for warning in recwarn if "positive" in str(warning.message)]


@pytest.mark.parametrize("loss", ["mse", "l1"])
def test_regression_speaks_the_targets_unit(tmp_path, loss):
    task = make(Regression, loss=loss)
    run, data = fit(task, epochs=16)
    targets = data.split("train").targets.double()
    assert torch.allclose(task.mean.double(), targets.mean(0))
    assert torch.allclose(task.deviation.double(), targets.std(0, correction=0))
    measured = measure(run, task, data)
    scores, wanted = outputs(task, data, "test")
    values = scores.double() * targets.std(0, correction=0) + targets.mean(0)
    standard = (wanted - targets.mean(0)) / targets.std(0, correction=0)
    expected = (F.mse_loss if loss == "mse" else F.l1_loss)(scores.double(), standard)
    assert measured.metrics["test"]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert measured.metrics["test"]["mae"] == pytest.approx(mean_absolute_error(wanted, values), rel=1e-4)
    assert measured.metrics["test"]["r2"] == pytest.approx(r2_score(wanted, values), abs=1e-4)
    assert measured.metrics["test"]["r2"] > 0.2  # the corners are found
    rows = measured.details["test_per_target"]
    assert [row["r2"] for row in rows.values()] == pytest.approx(
        r2_score(wanted, values, multioutput="raw_values"), abs=1e-4
    )
    measured.draw(task, data.class_names, tmp_path)
    assert (tmp_path / "predicted.png").stat().st_size > 5000

    task.bank.annotate(output=task.output())
    task.bank.save(tmp_path / "adapter")
    again = make(Regression)
    again.load_adapter(tmp_path / "adapter")
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(again.eval().predict_step(images, 0), task.eval().predict_step(images, 0))


def test_a_classifier_s_file_is_no_regression(tmp_path):
    task = make()
    task.bank.save(tmp_path / "adapter")
    with pytest.raises(FileError, match="does not say how its outputs become 3 values"):
        make(Regression).load_adapter(tmp_path / "adapter")


def test_soft_targets_train_and_whole_ones_cost_the_same(tmp_path):
    scores, labels = torch.randn(7, 3), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    weights = torch.tensor([1.0, 3.0, 0.5])
    for weight in (None, weights):
        expected = F.cross_entropy(scores, labels, weight, label_smoothing=0.1)
        assert torch.allclose(soft_cross_entropy(scores, F.one_hot(labels).float(), weight, 0.1), expected)
    task = make()
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0]])
    loss = task.training_loss(scores[:2], shares)
    assert loss == pytest.approx(-float((shares * scores[:2].log_softmax(1)).sum()) / 2)
    assert task.for_metrics(scores[:2], shares)[1].tolist() == [0, 2]


def test_class_weights_come_from_the_training_images():
    task = make(class_weights="balanced")
    data = Marks()
    data.setup()
    task.check_data(data)
    counts = data.split("train").targets.bincount()
    assert torch.allclose(task._weights * counts, torch.full((3,), SIZES["train"] / 3))
    scores, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 2])
    assert torch.allclose(task.training_loss(scores, labels), F.cross_entropy(scores, labels, task._weights))
    assert torch.equal(make(class_weights=[1, 2.5, 1])._weights, torch.tensor([1, 2.5, 1]))
    with pytest.raises(DataError, match="1 of 3 classes have no training image, first class 1"):
        balanced_weights(torch.tensor([0, 2]), 3)
    with pytest.raises(DataError, match="1 of 2 labels are on all or on none"):
        balanced_pos_weights(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 2)


def test_scores_that_look_like_probabilities_are_none():
    task = make()
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(200, 3, generator=generator), torch.randint(3, (200,), generator=generator)
    metrics = task.make_metrics("test")
    metrics.update(*task.for_metrics(scores, labels))
    found = metrics.compute()
    assert float(found["test/calibration_error"]) == pytest.approx(
        _calibration_error(scores.softmax(1), labels), abs=1e-5
    )
    assert float(found["test/accuracy"]) == pytest.approx(float((scores.argmax(1) == labels).float().mean()))


def test_the_temperature_is_the_one_that_was_used():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 5, generator=generator) * 2
    labels = torch.multinomial(true.softmax(1), 1, generator=generator).squeeze(1)
    assert fit_temperature(true, labels) == pytest.approx(1, abs=0.05)
    assert fit_temperature(true * 3, labels) == pytest.approx(3 * fit_temperature(true, labels), rel=1e-6)
    assert fit_temperature(true, true.argmax(1)) == pytest.approx(1 / 20)  # never wrong: as sure as allowed
    temperature = torch.tensor(fit_temperature(true * 3, labels), requires_grad=True)
    F.cross_entropy(true * 3 / temperature, labels).backward()
    assert abs(temperature.grad) < 1e-6


def test_calibration_is_measured_stored_and_used(tmp_path):
    task = make()
    run, data = fit(task)
    measured = measure(run, task, data)
    scores, labels = outputs(task, data, "test")
    assert task.temperature == measured.details["temperature"] != 1
    errors = measured.details["test_calibration_error"]
    # The metric takes logarithms of probabilities in batches: the same up to rounding in float32.
    assert errors["before"] == pytest.approx(measured.metrics["test"]["calibration_error"], abs=1e-6)
    assert errors["before"] == pytest.approx(_calibration_error(scores.softmax(1), labels), abs=1e-5)
    assert errors["after"] == pytest.approx(
        _calibration_error((scores / task.temperature).softmax(1), labels), abs=1e-5
    )
    assert set(measured.details["validation_calibration_error"]) == {"before", "after"}
    measured.draw(task, data.class_names, tmp_path)
    assert (tmp_path / "reliability.png").stat().st_size > 5000
    task.bank.annotate(output=task.output())
    task.bank.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter.json").read_text())["output"]["temperature"] == task.temperature
    again = make()
    again.load_adapter(tmp_path / "adapter")
    with torch.inference_mode():
        batch = data.split("test").batch([(0, 0)])
        assert torch.allclose(
            again.eval().predict_step(batch, 0), (scores[:1] / task.temperature).softmax(1), atol=1e-6
        )


def test_images_that_were_trained_on_calibrate_nothing():
    task = make()
    run, data = fit(task, epochs=1)
    data.validation_chooses = False
    measured = measure(run, task, data)
    assert task.temperature == 1
    assert "temperature" not in measured.details
    errors = measured.details["test_calibration_error"]
    assert errors["before"] == errors["after"]


def _calibration_error(probabilities, labels, bins=15):
    """The formula of Guo et al. (ICML 2017), bin by bin."""
    sure, predicted = probabilities.max(1)
    total = 0.0
    for low in range(bins):
        inside = (sure > low / bins) & (sure <= (low + 1) / bins)
        if inside.any():
            right = (predicted == labels)[inside].float().mean()
            total += float(inside.float().mean() * (right - sure[inside].mean()).abs())
    return total


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        (Classification, "regression", "kind 'regression', and Classification needs 'class'. Use the task Regression"),
        (MultiLabel, "class", "Use the task Classification"),
        (Regression, "multilabel", "Use the task MultiLabel"),
    ],
)
def test_task_and_data_must_agree(task, target, message):
    with pytest.raises(DataError, match=message):
        make(task).check_data(Marks(target))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([[1.0, 2.0, math.nan], [3.0, 4.0, 5.0]]), "1 of 2 training targets are not finite"),
        (torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 5.0]]), "Target 1 is 2 on all training images"),
        (torch.tensor([1.0, 2.0]), "Each image has 1 targets, and the model gives 3"),
    ],
)
def test_targets_that_cannot_be_learnt_are_refused(targets, message):
    with pytest.raises(DataError, match=message):
        make(Regression).take_targets(targets)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (Classification, {"class_weights": [1.0, 2.0]}),
        (Classification, {"class_weights": "even"}),
        (Classification, {"class_weights": [1.0, 2.0, 0.0]}),
        (MultiLabel, {"pos_weights": [1.0]}),
        (MultiLabel, {"num_classes": 0}),
        (Regression, {"num_classes": 0}),
    ],
)
def test_wrong_settings_are_refused(task, settings):
    with pytest.raises(ConfigError):
        make(task, **settings)


class Plain(LightningDataModule):
    """A data module of a user, which knows nothing of ours."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(7, 3, 16, 16), torch.tensor([0, 1, 2, 0, 0, 1, 2])), batch_size=2)


def test_targets_of_any_data_module_are_found():
    assert train_targets(Plain()).tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert train_targets(object()) is None
    assert train_targets(Marks()) is None  # not set up yet
    task = make(class_weights="balanced")
    task.check_data(Plain())
    assert torch.allclose(task._weights, 7 / (3 * torch.tensor([3.0, 2.0, 2.0])))
