"""The comparison of trainings with and without a start from the probe: images, and the table."""

import head_start
import torch


def test_images_are_drawn_apart_and_as_many_as_are_asked_for():
    sets = head_start.read_digits()
    assert len(sets["test"][1]) == 360
    assert len(sets["train"][1]) == 1797 - 360
    trial = head_start.Trial(data="digits", shots=8, seed=1, method="ssf", start=True)
    images = torch.arange(len(sets["train"][1]), dtype=torch.int32)
    numbers = images.view(-1, 1, 1, 1)
    data = head_start.Shots((numbers, sets["train"][1]), (numbers[:360], sets["test"][1]), trial)

    class Whole:
        def resize(self):
            return lambda images: images

        def normalise(self):
            return None

    parts = data.load(Whole())
    assert {name: torch.bincount(part.targets).unique().tolist() for name, part in parts.items() if name != "test"} == {
        "train": [8],
        "validation": [10],
    }
    chosen = {name: set(parts[name].images.flatten().tolist()) for name in ("train", "validation")}
    assert not chosen["train"] & chosen["validation"]


def facts(method, start, test, validation=0.9, best=1, seed=0):
    return {
        "data": "digits",
        "shots": 8,
        "seed": seed,
        "method": method,
        "start": start,
        "test": test,
        "validation": validation,
        "best_epoch": best,
    }


def test_the_table_has_means_and_names_runs_below_the_probe():
    probes = [facts("probe", True, 0.8, 0.9, seed=seed) for seed in range(3)]
    runs = [facts("lora", True, 0.8 + seed / 10, 0.9, best=0, seed=seed) for seed in range(3)]
    lines = list(head_start.table_lines([*probes, *runs, facts("vpt", True, 0.7, 0.85)]))
    (row,) = [line for line in lines if line.startswith("| digits | 8 |")]
    cells = [cell.strip() for cell in row.split("|")[3:-1]]
    assert cells == ["80.0", *["not yet run"] * 3, "90.0", "not yet run", "70.0 (1 of 3 seeds)", *["not yet run"] * 2]
    said = "\n".join(lines)
    assert "3 of 4 runs from the probe end at the probe" in said
    assert "3 of 4 keep epoch 0" in said
    assert "* Below: vpt, digits, 8 images a class, seed 0: 85.0 against 90.0 %." in said
    assert len(list(head_start.trials())) == len({trial.stem for trial in head_start.trials()}) == 162
