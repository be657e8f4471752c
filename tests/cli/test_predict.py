"""Predictions read each image once, go on after a kill, and lose a broken image's row alone."""

import csv
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from vispeft.cli import predict, prediction_table
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.data import reading
from vispeft.data.images import read_image
from vispeft.storage import pieces


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(11):
        grey = Image.fromarray((load_digits().images[index] * 255 / 16).round().astype(np.uint8))
        grey.resize((9 + index, 20)).convert("RGB").save(folder / f"{index:02}.png")
    return folder


@pytest.fixture
def read(monkeypatch):
    """Names of the files whose pixels were read in this process."""
    found = []

    def watched(file, *arguments, **settings):
        found.append(os.path.basename(str(file)))
        return read_image(file, *arguments, **settings)

    monkeypatch.setattr(reading, "read_image", watched)
    return found


def table(out):
    return (out / "predictions.csv").read_bytes()


def names(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*"))


def test_each_image_is_read_once_and_the_table_is_that_of_the_task_itself(finished, run_cli, images, tmp_path, read):
    result = run_cli("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4)
    assert (result.status, names(tmp_path / "out")) == (0, ["predictions.csv"]), result.err
    paths = sorted(images.iterdir())
    assert sorted(read) == [path.name for path in paths]
    predictor = load_task(Run.open(finished))[0].predictor()
    with torch.inference_mode():
        found = [row for at in (0, 4, 8) for row in predictor([read_image(path) for path in paths[at : at + 4]])]
    rows = [["path", *predictor.columns], *([str(p), *one.row] for p, one in zip(paths, found, strict=True))]
    assert list(csv.reader(table(tmp_path / "out").decode().splitlines())) == rows


def test_workers_change_nothing_but_the_process_that_reads(finished, run_cli, images, tmp_path, read):
    for workers in (0, 2):
        arguments = ("--batch_size", 3, "--workers", workers)
        result = run_cli("predict", finished, images, "--out", tmp_path / str(workers), *arguments)
        assert result.status == 0, result.err
    assert table(tmp_path / "0") == table(tmp_path / "2")
    assert len(read) == 11  # those of the first command alone
    assert "--workers is -1" in run_cli("predict", finished, images, "--out", tmp_path / "a", "--workers=-1").err


def test_broken_images_cost_their_own_rows(finished, run_cli, images, tmp_path):
    (images / "03.png").write_bytes(b"not an image")
    (images / "07.png").write_bytes((images / "07.png").read_bytes()[:60])
    result = run_cli("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4)
    assert result.status == 1
    assert "9 images predicted: " in result.out
    assert "2 images could not be read and left out:" in result.out
    rows = list(csv.DictReader(table(tmp_path / "out").decode().splitlines()))
    assert [row["path"] for row in rows] == [str(p) for p in sorted(images.iterdir()) if p.stem not in ("03", "07")]
    with (tmp_path / "out/left_out.csv").open(newline="") as file:
        left_out = list(csv.DictReader(file))
    assert [row["path"] for row in left_out] == [str(images / "03.png"), str(images / "07.png")]
    assert all("cannot be read as an image" in row["reason"] and row["reason"] in result.out for row in left_out)
    strict = run_cli("predict", finished, images, "--out", tmp_path / "strict", "--batch_size", 4, "--strict")
    assert strict.status == 2
    assert "03.png cannot be read as an image" in strict.err
    for path in images.iterdir():
        path.write_bytes(b"")
    assert run_cli("predict", finished, images, "--out", tmp_path / "none").status == 1
    assert len(table(tmp_path / "none").splitlines()) == 1


def killed(before, *argv):
    """Run `predict` in a forked process that is killed by SIGKILL before the piece of this number is written."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        write, count = pieces.Pieces.write, [0]

        def write_or_die(self, start, content):
            if count[0] == before:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            write(self, start, content)

        pieces.Pieces.write = write_or_die
        try:
            predict.main([str(argument) for argument in argv])
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("workers", [0, 1])
def test_a_killed_command_goes_on_behind_its_last_batch(finished, run_cli, images, tmp_path, read, workers):
    (images / "01.png").write_bytes(b"not an image")
    assert run_cli("predict", finished, images, "--out", tmp_path / "whole", "--batch_size", 4).status == 1
    again = ("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4, "--workers", workers)
    killed(2, *again[1:])
    assert not (tmp_path / "out/predictions.csv").exists()
    assert len(list((tmp_path / "out/unfinished/parts").glob("0*.json"))) == 2
    other = run_cli(*again[:5], "--batch_size", 3)
    assert "holds an unfinished table of predictions of another batch_size" in other.err
    read.clear()
    assert run_cli(*again).status == 1
    assert sorted(read) == ([] if workers else ["08.png", "09.png", "10.png"])
    assert names(tmp_path / "out") == names(tmp_path / "whole") == ["left_out.csv", "predictions.csv"]
    assert all(
        (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for name in names(tmp_path / "out")
    )
    assert "exists already" in run_cli(*again).err


def test_pieces_of_images_that_changed_meanwhile_are_predicted_again(finished, run_cli, images, tmp_path, read):
    again = ("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4)
    killed(2, *again[1:])
    Image.new("RGB", (30, 30), (250, 1, 1)).save(images / "05.png")
    part = tmp_path / "out/unfinished/parts/000000000.json"
    part.write_bytes(part.read_bytes()[:-9])
    assert run_cli(*again).status == 0
    assert len(read) == 11
    assert run_cli("predict", finished, images, "--out", tmp_path / "whole", "--batch_size", 4).status == 0
    assert table(tmp_path / "out") == table(tmp_path / "whole")


def test_what_a_kill_leaves_behind_the_table_is_removed(finished, run_cli, images, tmp_path, monkeypatch):
    arguments = ("predict", finished, images, "--out", tmp_path / "out")
    monkeypatch.setattr(pieces.Pieces, "clear", lambda self: None)
    assert run_cli(*arguments).status == 0
    assert "unfinished/plan.json" in names(tmp_path / "out")
    monkeypatch.undo()
    assert "exists already" in run_cli(*arguments).err
    assert names(tmp_path / "out") == ["predictions.csv"]


def test_pictures_of_a_killed_command_are_written_again(finished, run_cli, images, tmp_path, monkeypatch):
    from tests.cli.test_tools import Brightness
    from vispeft.tasks import Classification

    monkeypatch.setattr(Classification, "predictor", lambda task: Brightness())
    for place in ("whole", "out"):
        shutil.copytree(images, tmp_path / "new", dirs_exist_ok=True)
        arguments = (finished, tmp_path / "new", "--out", tmp_path / place, "--batch_size", 5, "--workers", 1)
        if place == "out":
            killed(1, *arguments)
            assert (tmp_path / "out/thumbnails/05.png").exists()
        assert run_cli("predict", *arguments).status == 0
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    assert (tmp_path / "out/brightness.csv").read_bytes() == (tmp_path / "whole/brightness.csv").read_bytes()
    assert prediction_table.UNFINISHED not in os.listdir(tmp_path / "out")
