import pytest
import timm
import torch
from lightning.pytorch import Trainer, seed_everything
from timm.optim import param_groups_layer_decay

import vispeft
from tests.tiny import TINY
from vispeft.data import DigitsData
from vispeft.errors import ConfigError
from vispeft.tasks import Classification
from vispeft.tasks.layer_decay import decay_by_layer

DATA = {"batch_size": 72, "validation": 0.05, "test": 0.75}
"""Five steps an epoch."""

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**settings):
    seed_everything(0)
    settings = {"method": vispeft.SSF(), "num_classes": 10, "lr": 1e-2, **settings}
    return Classification(backbone="vit_tiny_patch16_224", backbone_args=TINY, **settings)


class Watched(Classification):
    """Keeps the classifier's bias after each step, and the one that is validated."""

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.steps = getattr(self, "steps", [self.bank.head().bias.detach().clone()])

    def on_train_batch_end(self, *_):
        self.steps.append(self.bank.head().bias.detach().clone())

    def on_validation_epoch_start(self):
        self.validated = self.bank.head().bias.detach().clone()


def fit(task, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(max_epochs=2, enable_model_summary=False, **quiet, **settings).fit(task, datamodule=DigitsData(**DATA))
    return task


def test_the_average_is_that_of_the_steps_and_is_validated_and_left_in_the_model():
    seed_everything(0)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 10}
    task = fit(Watched(method=vispeft.SSF(), lr=1e-2, ema=0.3, **settings))
    expected = task.steps[0]
    for number, bias in enumerate(task.steps[1:], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * bias
    assert len(task.steps) == 11
    assert torch.allclose(task.validated, expected, atol=1e-7)
    assert torch.equal(task.bank.head().bias, task.validated)
    assert not torch.allclose(task.steps[-1], task.validated, atol=1e-5)


def test_batches_that_are_summed_count_as_one_step():
    seed_everything(0)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 10}
    task = fit(Watched(method=vispeft.SSF(), lr=1e-2, ema=0.3, **settings), accumulate_grad_batches=2)
    steps = [task.steps[0]]
    for bias in task.steps[1:]:  # after each batch; only every other one makes a step
        steps += [] if torch.equal(bias, steps[-1]) else [bias]
    assert (len(task.steps), len(steps)) == (11, 7)
    expected = steps[0]
    for number, bias in enumerate(steps[1:], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * bias
    assert torch.allclose(task.validated, expected, atol=1e-7)


def test_without_an_average_the_last_step_is_left_in_the_model():
    seed_everything(0)
    settings = {"backbone": "vit_tiny_patch16_224", "backbone_args": TINY, "num_classes": 10}
    task = fit(Watched(method=vispeft.SSF(), lr=1e-2, **settings))
    assert torch.equal(task.bank.head().bias, task.steps[-1])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_layers_learn_at_the_rates_timm_gives_them(name):
    small = {"depth": 3} if name.startswith("vit") else {"depths": (1, 2, 1, 1)}
    plain = timm.create_model(name, num_classes=3, **small)
    names = {id(parameter): key for key, parameter in plain.named_parameters()}
    expected = {}
    exempt = plain.no_weight_decay()
    for group in param_groups_layer_decay(plain, 0.05, no_weight_decay_list=exempt, layer_decay=0.7):
        for parameter in group["params"]:
            expected[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    bank = vispeft.attach(plain, vispeft.Full(), verify=False)
    place = bank.view.head_path
    groups = decay_by_layer(plain, bank.parameter_groups(1.0, 0.05), 0.7)
    own = {id(parameter): key for key, parameter in plain.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            key = own[id(parameter)].replace("adapters.default.full.", "").replace("adapter_heads.default", place)
            found[key] = (group["lr"], group["weight_decay"])
    assert found.keys() == expected.keys()
    for key, (rate, decay) in expected.items():
        assert found[key] == (pytest.approx(rate), decay), key
    assert len({group["name"] for group in groups}) == len(groups)


def test_layer_decay_needs_layers_that_train():
    with pytest.raises(ConfigError, match="ssf does not train the backbone's layers"):
        make(layer_decay=0.7)
    task = make(method=vispeft.Full(), layer_decay=0.7)
    fit(task, limit_train_batches=1)


def test_a_bfloat16_base_trains_float32_adapters_that_fit_the_float32_base(tmp_path):
    task = fit(make(base_dtype="bfloat16"), limit_train_batches=2)
    trained = dict(task.bank.trainable_parameters())
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    frozen = {p.dtype for n, p in task.model.named_parameters() if n not in trained and "adapter_heads" not in n}
    assert frozen == {torch.bfloat16}
    task.bank.verify()
    task.bank.save(tmp_path)
    plain = make(method=vispeft.LinearProbe())
    plain.load_adapter(tmp_path)
    images = torch.randn(4, 3, 16, 16)
    assert torch.allclose(plain.eval()(images), task.eval()(images).float(), atol=0.05)
    task.load_adapter(tmp_path)


@pytest.mark.parametrize("settings", [{"ema": 1.0}, {"ema": -0.1}, {"layer_decay": 0.0}, {"layer_decay": 1.1}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        make(**settings)
