"""Predictions read each image once, go on after a kill, and lose a broken image's row alone."""

import csv
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.test_tools import Brightness
from vispeft.cli import predict, prediction_table
from vispeft.cli.evaluate import load_task
from vispeft.cli.reading import goes_on
from vispeft.cli.runs import Run
from vispeft.cli.stopping import Stopped
from vispeft.data import reading
from vispeft.data.images import read_image
from vispeft.storage import pieces
from vispeft.storage.disk import _Staged
from vispeft.tasks import Classification


@pytest.fixture(scope="module")
def loaded(finished):
    return load_task(Run.open(finished))


@pytest.fixture(autouse=True)
def _loaded_once(loaded, monkeypatch):
    """Spare each command the loading of the run, which tests of the commands do."""
    monkeypatch.setattr(predict, "load_task", lambda run: loaded)


@pytest.fixture
def images(tmp_path):
    folder, random = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for index in range(11):
        pixels = random.integers(0, 256, (20, 9 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
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


def contents(out):
    return {name: (out / name).read_bytes() for name in names(out) if (out / name).is_file()}


def test_each_image_is_read_once_and_the_table_is_that_of_the_task_itself(
    finished, loaded, run_cli, images, tmp_path, read
):
    result = run_cli("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4)
    assert (result.status, names(tmp_path / "out")) == (0, ["predictions.csv"]), result.err
    paths = sorted(images.iterdir())
    assert sorted(read) == [path.name for path in paths]
    predictor = loaded[0].predictor()
    with torch.inference_mode():
        found = [row for at in (0, 4, 8) for row in predictor([read_image(path) for path in paths[at : at + 4]])]
    rows = [["path", *predictor.columns], *([str(p), *one.row] for p, one in zip(paths, found, strict=True))]
    assert list(csv.reader(table(tmp_path / "out").decode().splitlines())) == rows


def test_workers_change_nothing_but_the_process_that_reads(finished, run_cli, images, tmp_path, read):
    for workers in (0, 2):
        arguments = ("--batch_size", 6, "--workers", workers)
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


def test_strict_stops_at_the_first_broken_image_and_nothing_has_to_be_cleared_up(finished, run_cli, images, tmp_path):
    (images / "03.png").write_bytes(b"not an image")
    strict = ("predict", finished, images, "--out", tmp_path / "strict", "--batch_size", 4, "--strict")
    result = run_cli(*strict)
    assert result.status == 2
    assert "03.png cannot be read as an image" in result.err
    (images / "03.png").unlink()
    assert run_cli(*strict).status == 0
    assert (len(table(tmp_path / "strict").splitlines()), names(tmp_path / "strict")) == (11, ["predictions.csv"])


def test_where_no_image_can_be_read_the_table_has_its_head_alone(finished, run_cli, images, tmp_path):
    for path in images.iterdir():
        path.write_bytes(b"")
    assert run_cli("predict", finished, images, "--out", tmp_path / "none").status == 1
    assert len(table(tmp_path / "none").splitlines()) == 1


def test_names_of_any_characters_stand_in_the_table_and_none_is_a_formula(
    finished, run_cli, images, tmp_path, monkeypatch
):
    odd = ["=1+1.png", "@a b.png", "-\u00fc \u6f22.png", "+,'\"\n.png", "x\r.png"]
    for index, name in enumerate(odd):
        (images / f"{index:02}.png").rename(images / name)
    (images / "=broken.png").write_bytes(b"not an image")
    monkeypatch.chdir(images)
    assert run_cli("predict", finished, ".", "--out", tmp_path / "out").status == 1
    for name in ("predictions.csv", "left_out.csv"):
        with (tmp_path / "out" / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
        wanted = {path.name for path in images.iterdir() if (path.name == "=broken.png") == (name == "left_out.csv")}
        assert {os.path.normpath(row[0]) for row in rows} == wanted


def killed(owner, name, dies, *argv):
    """Run `predict` in a forked process that ends by SIGKILL inside of a method.

    Args:
        owner: The method's class.
        name: The method.
        dies: Function of its arguments that says whether the process ends before it.
        argv: Arguments of `predict`.
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        method = getattr(owner, name)

        def watched(*arguments):
            if dies(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments)

        setattr(owner, name, watched)
        try:
            predict.main([str(argument) for argument in argv])
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_before(start, *argv):
    """Run `predict` in a forked process that is killed before the piece of this first image is written."""
    killed(pieces.Pieces, "write", lambda self, at, content: at == start, *argv)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_command_goes_on_behind_its_last_batch(finished, run_cli, images, tmp_path, read, workers):
    (images / "01.png").write_bytes(b"not an image")
    assert run_cli("predict", finished, images, "--out", tmp_path / "whole", "--batch_size", 4).status == 1
    again = ("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4, "--workers", workers)
    killed_before(8, *again[1:])
    assert not (tmp_path / "out/predictions.csv").exists()
    assert len(list((tmp_path / "out/unfinished/parts").glob("0*.json"))) == 2
    other = run_cli(*again[:5], "--batch_size", 3)
    assert "holds an unfinished table of predictions, which was begun with other settings (batch_size)" in other.err
    assert "01.png cannot be read" in run_cli(*again, "--strict").err
    read.clear()
    assert run_cli(*again).status == 1
    # The batch with the broken image is tried again, the next one is kept.
    expected = [] if workers else [f"{number:02}.png" for number in (0, 1, 2, 3, 8, 9, 10)]
    assert sorted(read) == expected
    assert names(tmp_path / "out") == ["left_out.csv", "predictions.csv"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert "exists already" in run_cli(*again).err


def test_pieces_of_images_that_changed_meanwhile_are_predicted_again(finished, run_cli, images, tmp_path, read):
    again = ("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4)
    killed_before(8, *again[1:])
    Image.new("RGB", (30, 30), (250, 1, 1)).save(images / "05.png")
    part = tmp_path / "out/unfinished/parts/000000000.json"
    part.write_bytes(part.read_bytes()[:-9])
    assert run_cli(*again).status == 0
    assert len(read) == 11
    assert run_cli("predict", finished, images, "--out", tmp_path / "whole", "--batch_size", 4).status == 0
    assert table(tmp_path / "out") == table(tmp_path / "whole")


@pytest.mark.parametrize("repaired", [False, True])
def test_a_command_killed_between_its_two_tables_goes_on(finished, run_cli, images, tmp_path, repaired):
    good = (images / "05.png").read_bytes()
    (images / "05.png").write_bytes(b"not an image")

    def between(staged):
        if staged.files[-1].name != "predictions.csv":
            return False
        os.replace(tmp_path / "out/.left_out.csv.part", tmp_path / "out/left_out.csv")
        return True

    again = ("predict", finished, images, "--out", tmp_path / "out", "--batch_size", 4)
    killed(_Staged, "rename", between, *again[1:])
    assert (tmp_path / "out/left_out.csv").exists()
    assert not (tmp_path / "out/predictions.csv").exists()
    if repaired:
        (images / "05.png").write_bytes(good)
    assert run_cli(*again).status == (0 if repaired else 1)
    assert names(tmp_path / "out") == [*([] if repaired else ["left_out.csv"]), "predictions.csv"]
    assert len(table(tmp_path / "out").splitlines()) == 1 + (11 if repaired else 10)


def test_what_a_kill_leaves_behind_the_table_is_removed(finished, run_cli, images, tmp_path, monkeypatch):
    arguments = ("predict", finished, images, "--out", tmp_path / "out")
    monkeypatch.setattr(pieces.Pieces, "clear", lambda self: None)
    assert run_cli(*arguments).status == 0
    assert "unfinished/plan.json" in names(tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(predict, "load_task", lambda run: load_task(Run.open(finished)))
    assert "exists already" in run_cli(*arguments).err
    assert names(tmp_path / "out") == ["predictions.csv"]


def test_pictures_of_a_killed_command_are_written_again(finished, run_cli, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "predictor", lambda task: Brightness())
    arguments = (finished, images, "--out", tmp_path / "out", "--batch_size", 5)
    killed_before(4, *arguments)
    assert (tmp_path / "out/thumbnails/05.png").exists()
    (images / "05.png").write_bytes(b"not an image any more")
    assert run_cli("predict", *arguments).status == 1
    assert run_cli("predict", finished, images, "--out", tmp_path / "whole", "--batch_size", 5).status == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "out/thumbnails").iterdir())) == 10
    assert prediction_table.UNFINISHED not in os.listdir(tmp_path / "out")


def test_raw_images_of_workers_reach_a_predictor_of_ones_own(finished, run_cli, images, tmp_path, monkeypatch):
    monkeypatch.setattr(Classification, "predictor", lambda task: Brightness())
    shutil.copy(images / "00.png", images / "again.png")
    for workers in (0, 1):
        arguments = ("--out", tmp_path / str(workers), "--batch_size", 8, "--workers", workers)
        assert run_cli("predict", finished, images, *arguments).status == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "1")
    rows = list(csv.reader((tmp_path / "0/brightness.csv").read_text().splitlines()))
    assert rows[1][1] == rows[12][1]  # of equal files


def test_a_stop_says_how_to_go_on():
    with pytest.raises(Stopped) as stopped, goes_on():
        raise Stopped(signal.SIGTERM)
    assert str(stopped.value) == "Stopped by SIGTERM. The same command goes on behind the last batch."
