"""Values that are not finite in validation and test are said, and decide about nothing."""

import json
import logging

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

import vispeft
from tests.tiny import TINY
from vispeft.cli.evaluation import class_table, measure, metrics_table
from vispeft.cli.runs import write_json
from vispeft.data import DigitsData
from vispeft.data.masks import IGNORE
from vispeft.errors import ConfigError
from vispeft.tasks import Classification, Segmentation
from vispeft.tasks.checkpoints import RunCheckpoints
from vispeft.tasks.classification import fit_temperature
from vispeft.tasks.inference import Inference
from vispeft.tasks.predictions import ScorePredictor

NAN = float("nan")


def make(task=Classification, **settings):
    seed_everything(0)
    given = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "method": vispeft.SSF(), "num_classes": 10}
    return task(**{**given, **settings})


class Breaking(Classification):
    """Gives the first images of every batch no finite score."""

    broken = 3

    def forward(self, images):
        scores = super().forward(images)
        if not self.training:
            scores = scores.clone()
            scores[: self.broken] = NAN
        return scores


def plain_loss_of_the_others(task, data, broken):
    """The mean loss of the test images that do not break, of two batches of 180."""
    images, labels = data.split("test").batch([(0, index) for index in range(360)])
    with torch.inference_mode():
        scores = Classification.forward(task.eval(), images)
    kept = torch.arange(360) % 180 >= broken
    return float(torch.nn.functional.cross_entropy(scores[kept].float(), labels[kept]))


def test_the_temperature_is_that_of_the_finite_scores():
    scores, labels = torch.randn(40, 4), torch.arange(40) % 4
    broken = torch.cat([scores, torch.full((3, 4), NAN), torch.full((2, 4), float("inf"))])
    assert fit_temperature(broken, torch.cat([labels, labels[:5]])) == fit_temperature(scores, labels)
    assert fit_temperature(torch.full((3, 4), NAN), torch.zeros(3, dtype=torch.long)) == 1.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("broken", [3, 10_000])
def test_images_without_finite_outputs_are_counted_and_left_out(broken, caplog, tmp_path):
    task, data = make(Breaking), DigitsData(batch_size=180)
    task.broken = broken
    names = [str(index) for index in range(10)]
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    with caplog.at_level(logging.WARNING, logger="vispeft"):
        measured = measure(trainer, task, data)
    figures = measured.metrics["test"]
    if broken > 1000:
        assert set(figures.values()) == {None}
        assert "temperature" not in measured.details
        assert task.temperature == 1.0
        assert "360 of 360 images of the test split are not finite" in caplog.text
    else:
        counts = task.test_confusion.compute()
        assert counts.sum() == 360 - 2 * broken
        assert figures["accuracy"] == pytest.approx(float(counts.trace() / counts.sum()))
        assert figures["loss"] == pytest.approx(plain_loss_of_the_others(task, data, broken), rel=1e-5)
        assert "6 of 360 images of the test split are not finite" in caplog.text
    measured.draw(task, names, tmp_path)
    assert (tmp_path / "confusion_matrix.png").exists() == (broken < 1000)


def test_an_epoch_without_a_number_is_never_the_best(tmp_path, caplog):
    checkpoints = RunCheckpoints(tmp_path, monitor="validation/miou")
    kept = []
    for epoch, score in enumerate([NAN, float("inf"), 0.2, NAN, 0.1, float("inf"), 0.3]):
        if checkpoints._better(score, epoch):
            checkpoints.best = {"file": "", "epoch": epoch, "score": score}
        kept.append(checkpoints.best and checkpoints.best["epoch"])
    assert kept == [None, None, 2, 2, 2, 2, 6]
    assert caplog.text.count("which decides nothing") == 4


def test_scores_of_an_epoch_with_broken_outputs_do_not_choose_it(tmp_path):
    task = make(Breaking)
    checkpoints = RunCheckpoints(tmp_path, monitor=task.monitor)
    trainer = Trainer(
        max_epochs=2, limit_train_batches=1, logger=False, callbacks=[checkpoints], enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(task, datamodule=DigitsData(batch_size=256))
    assert checkpoints.best["epoch"] == 1
    assert checkpoints.best["score"] != checkpoints.best["score"]


def test_a_class_without_test_images_has_no_accuracy():
    task = make(num_classes=3)
    task.test_confusion.update(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1]))
    listed = task.summary(torch.randn(3, 3), torch.tensor([0, 1, 1]), "abc")["test_accuracy_per_class"]
    assert listed == {"a": 1.0, "b": 0.0, "c": None}


def test_files_of_figures_are_strict_json(tmp_path):
    write_json(tmp_path / "a.json", {"a": NAN, "b": [1.0, (float("inf"), {"c": -float("inf")})], "d": "NaN"})
    values = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values == {"a": None, "b": [1.0, [None, {"c": None}]], "d": "NaN"}
    task = make()
    task.bank.annotate(metrics={"validation/miou": NAN})
    task.save_adapter(tmp_path / "adapter")
    header = json.loads((tmp_path / "adapter/adapter.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert header["metrics"] == {"validation/miou": None}
    with pytest.raises(ConfigError, match=r"output\.deviation\[0\] is None; a finite number"):
        task.bank.annotate(output={"deviation": [float("inf")]})


def test_predictions_without_finite_outputs_have_empty_cells():
    task = make()
    notes = {"preprocessing": task.preprocessing.to_dict()}
    values = torch.tensor([[0.2, 0.8], [NAN, 0.5]])
    predictor = ScorePredictor(lambda images: values, lambda row: [str(int(row.argmax()))], ["class"], notes)
    first, second = predictor([torch.zeros(3, 16, 16, dtype=torch.uint8)] * 2)
    assert (first.row, first.finite, second.row, second.finite) == (["1"], True, [""], False)


def test_masks_without_finite_scores_hold_no_class():
    task = make(Segmentation, num_classes=2, backbone_args={**TINY, "img_size": 16}, decoder="linear").eval()
    images = torch.zeros(2, 3, 16, 16)
    images[1, 0, 0, 0] = float("inf")
    found = task.predict(images)
    assert (found[1] == IGNORE).all()
    assert (found[0] < 2).all()
    task.validation_step((images, torch.zeros(2, 16, 16, dtype=torch.long)), 0)
    assert task.scores["validation"].confusion.sum() == 16 * 16
    assert (task.outputs_seen.images, task.outputs_seen.broken) == (4, 2)


def test_a_class_that_is_predicted_and_nowhere_labelled_is_drawn(tmp_path):
    task = make(Segmentation, num_classes=3, backbone_args={**TINY, "img_size": 16}, decoder="linear").eval()
    scores = task.scores["test"]
    scores.update(torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[1, 1], [1, 1]]]))
    details = task.details("test", {}, ["ground", "red", "green"])
    assert details["test_iou_per_class"] == {"ground": 0.0, "red": 0.75, "green": None}
    assert details["test_acc_per_class"] == {"ground": None, "red": 0.75, "green": None}
    task.draw_results({}, ["ground", "red", "green"], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"iou_per_class.png", "confusion_matrix.png"}
    assert class_table(details).row_count == 3
    assert metrics_table({"test": {"miou": None, "macc": 0.75}}).row_count == 1


def test_the_table_at_the_start_shows_the_decoder():
    task = make(Segmentation, num_classes=3, backbone_args={**TINY, "img_size": 16}, decoder="linear")
    count = sum(p.numel() for p in task.decoder.parameters())
    assert task.report().decoder == count > 0
    assert f"{count:,}" in str(task.report()).split("decoder")[1].splitlines()[0]
    assert "head" in str(make().report())


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_a_split_without_labels_has_no_figures(absent, monkeypatch):
    task = make(Segmentation, num_classes=2, backbone_args={**TINY, "img_size": 16}, decoder="linear", absent=absent)
    logged = {}
    monkeypatch.setattr(task, "log_dict", logged.update)
    task.scores["validation"].update(torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), IGNORE))
    task.on_validation_epoch_end()
    assert len(logged) == 4
    assert all(value != value for value in logged.values())


def test_windows_and_stride_stand_in_the_file():
    slide = Inference(mode="slide", window=16, stride=8)
    task = make(Segmentation, num_classes=2, backbone_args={**TINY, "img_size": 16}, decoder="linear", inference=slide)
    expected = {"mode": "slide", "window": 16, "stride": 8, "flip": False, "scales": [1.0]}
    assert task.output()["inference"] == expected
    assert "window" not in Inference().to_dict()
