"""Pictures of dense labels and predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tasks.dense_toy import TARGETS, squares
from vispeft.data.dense_targets import IGNORE, DenseTarget
from vispeft.errors import DataError
from vispeft.viz import dense_picture, task_strips


def test_each_kind_has_its_colours_and_stripes_without_a_label() -> None:
    mask = torch.tensor([[0, 1], [IGNORE, 1]])
    picture = dense_picture(TARGETS["parts"], mask)
    assert picture[:, 0, 1].tolist() == [255, 0, 0]
    assert picture[:, 1, 0].tolist() in ([128] * 3, [255] * 3)
    up = torch.tensor([0.0, 1.0, -1.0]).view(3, 1, 1)
    assert dense_picture(TARGETS["slope"], up).flatten().tolist() == [128, 255, 0]
    grey = dense_picture(DenseTarget(kind="values"), torch.tensor([[[2.0, 3.0, 9.0]]]), (2.0, 4.0))
    assert grey[0, 0].tolist() == [0, 128, 255]
    near, far = dense_picture(TARGETS["depth"], torch.tensor([[[1.0, 5.0]]]), (1.0, 5.0))[:, 0].T.tolist()
    assert sum(near) > sum(far)


def test_a_strip_has_two_rows_per_image_or_one_without_labels(tmp_path: Path) -> None:
    _, labels = squares(2, 16, 0)
    rows = [{task: values[index] for task, values in labels.items()} for index in range(2)]
    images = [torch.zeros(3, 16, 16, dtype=torch.uint8)] * 2
    both = Image.open(task_strips(images, rows, rows, TARGETS, tmp_path / "both.png"))
    alone = Image.open(task_strips(images, None, rows, TARGETS, tmp_path / "alone.png"))
    assert both.width == alone.width
    assert both.height > 1.6 * alone.height
    with pytest.raises(DataError, match="1 image and 2 predictions"):
        task_strips(images[:1], rows, rows, TARGETS, tmp_path / "x.png")
