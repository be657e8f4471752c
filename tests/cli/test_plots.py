import pytest
import torch
from PIL import Image

from vispeft.errors import DataError, FileError
from vispeft.viz import confusion_matrix, learning_curves, read_history


def test_curves_from_a_log_and_from_values(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("epoch,step,train/loss,validation/loss\n0,4,,2.0\n0,4,3.0,\n1,9,,1.5\n1,9,2.0,\n")
    history = read_history(log)
    assert history == {"train/loss": [(0, 3.0), (1, 2.0)], "validation/loss": [(0, 2.0), (1, 1.5)]}
    one = learning_curves(log, tmp_path / "a.png", best_epoch=1)
    two = learning_curves(history, tmp_path / "b.png", best_epoch=1)
    assert one.read_bytes() == two.read_bytes()


def test_curves_without_values_are_refused(tmp_path):
    with pytest.raises(FileError, match="could not be read"):
        read_history(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text("step\n")
    with pytest.raises(FileError, match="no values"):
        read_history(tmp_path / "empty.csv")
    with pytest.raises(DataError, match="found lr"):
        learning_curves({"lr": [(0, 1.0)]}, tmp_path / "a.png")


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_matrices_of_any_size(tmp_path, classes):
    names = [f"class {index}" for index in range(classes)]
    path = confusion_matrix(torch.eye(classes, dtype=torch.long) * 3, names, tmp_path / "a.png")
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 200


def test_a_matrix_that_does_not_fit_its_names_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"shape \(2, 2\)"):
        confusion_matrix(torch.eye(2), ["a"], tmp_path / "a.png")
