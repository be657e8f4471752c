"""The page that says which method to try: its figures, what is marked as not measured, and whether its advice holds."""

from __future__ import annotations

import json
import sys

from tests.docs.test_docs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import method_choice

SHARES = {"lora": 0.0034, "ssf": 0.0024, "bone": 0.0155, "vptsp": None}


def write(folder, name, **facts):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts), encoding="utf-8")


def test_cells_are_means_and_say_how_many_seeds_there_were(tmp_path):
    for seed, test in enumerate((0.5, 0.6, 0.7)):
        write(tmp_path, f"fewshot/swin_tiny/lora-{seed}", method="lora", test=test, stored_bytes=2048)
    write(tmp_path, "fewshot/swin_tiny/lora-rate", method="lora", stored_bytes=2048)  # a rate that lost: not tested
    write(tmp_path, "earth/ssf", method="ssf", test={"miou": 0.25})
    write(tmp_path, "metric_learning/linear", row="linear", test={"recall@1": 0.5})
    whole, own = {"seconds": {"median": 2.0}, "saved_bytes": 100}, {"seconds": {"median": 1.0}, "saved_bytes": 30}
    write(tmp_path, "activations_vit_s", figures={"full fine-tuning": whole, "ssf": own})
    made = list(method_choice.lines(tmp_path, SHARES))
    assert made[0] == "## Which method?"
    assert "| [lora](lora.md) | - | - | 60.0 | - | - | 0.34 % | 2,048 | - | - |" in made
    assert "| [ssf](ssf.md) | - | - | - | 0.250 (1 seed) | - | 0.24 % | - | 0.50 | 0.30 |" in made
    assert any(line.startswith("Not measured on these data: [bone](bone.md), [vptsp](vptsp.md). ") for line in made)
    assert not any(line.startswith("| [bone]") for line in made)


def test_nothing_measured_is_no_error(tmp_path):
    made = "\n".join(method_choice.lines(tmp_path, SHARES))
    assert "Not measured on these data: [lora]" in made


def test_many_task_rows_are_compared_at_the_rate_that_was_chosen(tmp_path):
    better, worse = ("semseg/miou", "sal/miou", "edge/odsf"), ("normals/mean", "depth/rmse")
    for seed in range(3):
        decoders = dict.fromkeys((*better, *worse), 1.0)
        write(tmp_path, f"multitask/decoders-{seed}", data="scenes", row="decoders", lr=0.003, test=decoders)
        own = dict.fromkeys(better, 1.5) | dict.fromkeys(worse, 0.5)
        write(tmp_path, f"multitask/mtlora-{seed}", data="scenes", row="mtlora", lr=0.003, test=own)
    write(tmp_path, "multitask/mtlora-lost", data="scenes", row="mtlora", lr=0.001, test=dict.fromkeys(own, 9.0))
    assert abs(method_choice.Results(tmp_path).gain("mtlora") - 50) < 1e-9


def test_the_advice_holds_for_what_was_measured():
    found = method_choice.Results(ROOT / "benchmarks" / "results")

    def mean(values):
        return sum(values) / len(values) if values else 0.0

    frozen = [name for name in SHARES | dict.fromkeys(("adaptformer", "vpt", "linear_probe")) if name != "lora"]
    assert all(mean(found.fewshot("dinov2_vit_s14", "lora")) > mean(found.fewshot("dinov2_vit_s14", n)) for n in frozen)
    assert all(mean(found.recall("lora")) > mean(found.recall(name)) for name in frozen)
    assert all(mean(found.miou("ssf")) > mean(found.miou(n)) for n in (*frozen, "lora", "full") if n != "ssf")
    assert found.gain("mtlora") > 5 > 0
    kept = {name: found.cost(name)[1] for name in found.steps}
    assert sorted(kept, key=kept.get)[:3] == ["linear_probe", "vqt", "lst"]
