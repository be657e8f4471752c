"""Numbers of batches stay whole numbers on their way from the command line to the trainer."""

from typing import get_args, get_type_hints

import pytest
from lightning.pytorch import Trainer

from vispeft.cli.main import main
from vispeft.cli.trainer_settings import TrainerSettings


def takes_both(hint):
    return {int, float} <= set(get_args(hint))


def test_whole_numbers_come_first_wherever_shares_are_taken_too():
    named = {name for name, hint in get_type_hints(Trainer.__init__).items() if takes_both(hint)}
    named -= {"gradient_clip_val"}  # 1 and 1.0 are the same bound
    hints = get_type_hints(TrainerSettings.__init__)
    assert {"limit_val_batches", "val_check_interval", "overfit_batches"} <= named <= set(hints)
    assert {name for name in named if get_args(hints[name])[0] is not int} == set()


@pytest.mark.parametrize(("given", "taken"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5)])
def test_one_batch_is_not_all_of_them(capsys, given, taken):
    with pytest.raises(SystemExit):
        main(["train", "classification/digits_ssf", "--trainer.limit_val_batches", given, "--print_config"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "limit_val_batches" in line)
    assert line.split(": ")[1] == repr(taken)
