"""Processes killed just before a file operation: readers find whole files, and the same command ends as it should."""

import pytest
from kills import JOBS, Scene, prepare

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
JOB = {job.name: job for job in JOBS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def further(folders, tmp_path_factory):
    return Scene(JOB["more"], tmp_path_factory.mktemp("further"), folders[1])


def moment(scene, operation):
    """Return the number of the first file operation of that text."""
    return str(next(number for number, found in enumerate(scene.ended.operations) if found.startswith(operation)))


@pytest.mark.parametrize(
    "operation",
    [
        "os.rename done/.config.yaml.part",
        "os.remove done/checkpoints/step-",
        "os.rename done/adapter/.adapter.json.part",
    ],
)
def test_a_run_that_goes_on_killed_while_it_replaces_files(further, operation):
    trial = further.trial(moment(further, operation))
    assert trial.killed
    assert trial.unreadable == trial.unequal == []


def test_features_killed_before_their_folder_has_its_name(folders, tmp_path):
    scene = Scene(JOB["cache"], tmp_path, folders[0])
    trial = scene.trial(moment(scene, "os.rename kept/.part-"))
    assert trial.killed
    assert trial.unreadable == trial.unequal == []


@pytest.mark.parametrize("operation", ["os.rename out/unfinished/parts/.000000002", "os.rename out/.predictions.csv"])
def test_predictions_killed_before_a_piece_and_before_the_table(folders, tmp_path, operation):
    scene = Scene(JOB["predict"], tmp_path, folders[1])
    trial = scene.trial(moment(scene, operation))
    assert trial.killed
    assert trial.unreadable == trial.unequal == []


def test_an_unreadable_file_and_a_leftover_would_be_seen(folders, tmp_path, monkeypatch):
    scene = Scene(JOB["merge"], tmp_path, folders[1])
    assert scene.ended.operations[0] == "open .out.safetensors.lock"
    monkeypatch.setattr("vispeft.interop.staging._undo", lambda path: None)
    trial = scene.trial(moment(scene, "os.rename"))
    assert trial.unequal
