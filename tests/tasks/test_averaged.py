"""Schedule-free optimisers: measured and kept at the average, stopped and gone on with."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import vispeft
from tests.tasks.test_resume import Killed
from tests.tiny import TINY
from vispeft.data import DigitsData
from vispeft.errors import ConfigError
from vispeft.tasks import Classification
from vispeft.tasks.checkpoints import Cadence, RunCheckpoints, SealedCheckpointIO, find_checkpoint, read_checkpoint

pytest.importorskip("schedulefree", reason="needs schedulefree")
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree", "timm.optim.lion"]


class Stop(Callback):
    def __init__(self, step):
        self.step, self.modes = step, []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise Killed

    def on_validation_end(self, trainer, *_):
        self.modes.append([group.get("train_mode") for group in trainer.optimizers[0].param_groups])


def fit(folder, name, stop=None):
    torch.manual_seed(0)
    task = Classification(
        backbone="vit_tiny_patch16_224", backbone_args=TINY, method=vispeft.SSF(), num_classes=10, lr=1e-2,
        optimizer=name,
    )  # fmt: skip
    kept = RunCheckpoints(folder, monitor=task.monitor, cadence=Cadence(every_n_steps=2))
    stopped = Stop(stop)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[stopped, kept], plugins=[SealedCheckpointIO()],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    found = find_checkpoint(folder)
    data = DigitsData(batch_size=72, validation=0.05, test=0.75)
    trainer.fit(task, datamodule=data, ckpt_path=None if found is None else str(found.path))
    return task, kept, stopped


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_training_ends_as_one_in_one_go(name, tmp_path):
    whole, kept, seen = fit(tmp_path / "whole", name)
    if "schedulefree" in name:
        assert seen.modes == [[False] * len(seen.modes[0])] * 2
        best = read_checkpoint(kept.best_model_path)["state_dict"]
        if kept.best["epoch"] == 1:
            state = dict(whole.named_parameters())
            assert all(torch.equal(value, state[key]) for key, value in best.items() if key in state)
    with pytest.raises(Killed):
        fit(tmp_path / "stopped", name, stop=7)
    again, _, _ = fit(tmp_path / "stopped", name)
    for (key, one), (_, other) in zip(whole.trainable_parameters(), again.trainable_parameters(), strict=True):
        assert torch.equal(one, other), key


def test_settings_that_it_replaces_are_refused():
    for settings, told in (({"ema": 0.9}, r"ema=0\.9 was given"), ({"final_lr": 1e-6}, "final_lr=1e-06 was given")):
        with pytest.raises(ConfigError, match=told):
            Classification(
                backbone="vit_tiny_patch16_224", backbone_args=TINY, method=vispeft.SSF(), num_classes=10,
                optimizer=NAMES[0], **settings,
            )  # fmt: skip
