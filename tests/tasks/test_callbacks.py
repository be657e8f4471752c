from types import SimpleNamespace

import torch

from vispeft.tasks import PlainProgress, progress_bar
from vispeft.tasks.callbacks import NarrowProgress


def test_progress_fits_the_place_it_is_shown():
    assert isinstance(progress_bar(terminal=True), NarrowProgress)
    assert isinstance(progress_bar(terminal=False), PlainProgress)


def test_a_line_per_epoch():
    lines = []
    progress = PlainProgress(lines.append)
    metrics = {"train/loss": torch.tensor(0.5), "validation/accuracy": torch.tensor(0.25), "lr": torch.tensor(1.0)}
    trainer = SimpleNamespace(current_epoch=1, max_epochs=3, callback_metrics=metrics)
    progress.on_train_epoch_start(trainer)
    progress.on_train_epoch_end(trainer, None)
    assert lines[0].startswith("epoch 2/3  train/loss 0.5000  validation/accuracy 0.2500  ")
    progress.disable()
    progress.on_train_epoch_end(trainer, None)
    assert len(lines) == 1


def test_the_figure_shown_is_the_one_that_chooses():
    metrics = {"train/loss": torch.tensor(0.5), "validation/mean_average_precision": torch.tensor(0.25)}
    trainer = SimpleNamespace(current_epoch=0, max_epochs=3, callback_metrics=metrics)
    task = SimpleNamespace(monitor="validation/mean_average_precision")
    assert NarrowProgress().get_metrics(trainer, task) == {"mAP": 0.25}
    assert NarrowProgress().get_metrics(SimpleNamespace(callback_metrics={}), task) == {}
    lines = []
    PlainProgress(lines.append).on_train_epoch_end(trainer, task)
    assert lines[0].startswith("epoch 1/3  train/loss 0.5000  validation/mean_average_precision 0.2500  ")
