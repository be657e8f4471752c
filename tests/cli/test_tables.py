"""Printed tables of figures: they fit into a terminal of 80 columns, whole names and all."""

import pytest
from rich.console import Console

from vispeft.adapters.report import Report
from vispeft.cli.evaluation import metrics_table
from vispeft.cli.folds import folds_table

RETRIEVAL = ("recall@1", "recall@2", "recall@4", "recall@8", "map@r", "r_precision", "mrr")


def printed(table):
    """Print a table at 80 columns, and return its lines."""
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


@pytest.mark.parametrize("labels", [("validation", "test"), ("measured now", "metrics.json")])
def test_many_figures_become_rows(labels):
    rows = {label: {name: n / 10 for n, name in enumerate(RETRIEVAL)} for label in labels}
    lines = printed(metrics_table(rows))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [[name.replace("_", " "), *[f"{n / 10:.4f}"] * 2] for n, name in enumerate(RETRIEVAL)]
    assert all(label in lines[1] for label in labels)


def test_few_figures_and_many_classes_stay_as_they_are():
    few = {"validation": {"miou": 0.5, "macc": None}, "test": {"miou": 0.25, "macc": 0.75}}
    assert metrics_table(few).row_count == 2
    many = {f"class {n}": {"intersection_over_union": 0.5, "f1": 0.5} for n in range(50)}
    assert metrics_table(many).row_count == 50


def test_figures_of_folds_become_rows_too():
    rows = [dict.fromkeys(RETRIEVAL, 0.5)] * 4
    lines = printed(folds_table({"per_fold": rows, "mean": rows[0], "std": dict.fromkeys(RETRIEVAL, 0.0)}))
    assert "test split of each run" in lines[0]
    assert sum("r precision" in line and "0.5000" in line for line in lines) == 1
    assert all(word in lines[2] for word in ("fold 1", "fold 4", "mean", "deviation"))
    few = {"per_fold": [{"accuracy": 0.5}] * 4, "mean": {"accuracy": 0.5}, "std": {"accuracy": 0.0}}
    assert folds_table(few).rows[3].end_section


@pytest.mark.parametrize(
    ("parts", "shown", "hidden"),
    [
        ({}, ("head", "stored bytes", "of them for the head"), ("decoder", "embedding head")),
        ({"decoder": 7}, ("decoder", "stored bytes, without decoder"), ("head", "of them for the head")),
        (
            {"decoder": 7, "criterion": 9},
            ("embedding head", "criterion (not stored)", "stored bytes, without embedding head"),
            ("decoder", "of them for the head"),
        ),
    ],
)
def test_the_table_of_parameters_names_what_lies_behind_the_backbone(parts, shown, hidden):
    counts = {"trainable": 4, "trainable_head": 2, "backbone": 100, "stored_bytes": 24, "stored_bytes_head": 8}
    report = Report(adapter="default", method="ssf", family="vit", by_role={"norm1": 4}, **counts, **parts)
    names = [line.split("│")[1].strip() for line in printed(report) if line.startswith("│")]
    assert set(shown) <= set(names)
    assert not set(hidden) & set(names)
