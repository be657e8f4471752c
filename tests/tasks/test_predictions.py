"""Predictors: how tasks predict image files."""

import numpy as np
import pytest
import torch
from PIL import Image

import vispeft
from tests.tiny import TINY
from vispeft.data.dense_targets import DenseTarget
from vispeft.errors import ConfigError, DataError
from vispeft.tasks import AdapterTask, Inference
from vispeft.tasks.predictions import MaskPredictor, ScorePredictor
from vispeft.tasks.task_predictions import TaskPredictor

NOTES = {
    "preprocessing": {
        "input_size": [3, 16, 16],
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "interpolation": "bilinear",
        "crop_pct": None,
    },
    "output": {"palette": [[0, 0, 0], [255, 0, 0]], "evaluation": "whole"},
}


def test_scores_of_images_of_any_size_become_rows():
    images = [torch.full((3, *size), value, dtype=torch.uint8) for size, value in (((16, 16), 0), ((30, 9), 255))]
    predictor = ScorePredictor(
        lambda batch: batch.mean(dim=(2, 3)), lambda values: [f"{v:.2f}" for v in values], ["r", "g", "b"], NOTES
    )
    assert [prediction.row for prediction in predictor(images)] == [["0.00"] * 3, ["1.00"] * 3]
    assert predictor.columns == ["r", "g", "b"]
    assert not predictor(images)[0].pictures


def masks(inference=None):
    def predict(batch, size):
        assert tuple(batch.shape[-2:]) == size  # whole images keep their size
        return (batch[:, 0] > 0.5).long()

    return MaskPredictor(predict, inference or Inference(), ["ground", "square"], NOTES)


def test_a_mask_becomes_areas_an_index_image_and_an_overlay():
    image = torch.zeros(3, 6, 8, dtype=torch.uint8)
    image[:, :2, :3] = 255
    (prediction,) = masks()([image])
    assert prediction.row == ["42", "6"]
    assert set(prediction.pictures) == set(MaskPredictor.folders)
    index = prediction.pictures["masks"]
    assert (index.mode, index.size, index.getpalette()[:6]) == ("P", (8, 6), [0, 0, 0, 255, 0, 0])
    assert prediction.pictures["overlays"].size == (8, 6)
    assert MaskPredictor.at_once == 1


def test_images_smaller_than_the_window_are_found_before_the_first_is_predicted(tmp_path):
    paths = [tmp_path / f"{side}.png" for side in (20, 40)]
    for path, side in zip(paths, (20, 40), strict=True):
        Image.new("RGB", (50, side)).save(path)
    masks().check(paths)
    with pytest.raises(DataError, match=r"1 of 2 images is smaller than the sliding window of 32 .*20\.png"):
        masks(Inference(mode="slide", window=32, stride=16)).check(paths)


def test_a_task_that_does_not_say_how_it_predicts_is_told_so():
    task = AdapterTask(backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=2, method=vispeft.BitFit())
    with pytest.raises(ConfigError, match="AdapterTask does not say how images are predicted"):
        task.predictor()
    assert task.class_names() == ["0", "1"]


def test_depth_is_written_in_millimetres_where_16_bits_hold_it():
    depth = torch.tensor([[-1.0, 0.0, 0.0004], [0.0006, 1.2344, 65.535], [65.5356, 1e9, 2.0]])

    def outputs(images, size):
        return {"depth": depth.expand(1, 1, *size)}

    predictor = TaskPredictor(outputs, {"depth": DenseTarget(kind="depth")}, NOTES)
    assert predictor.folders == ("depth", "depth_mm", "strips")
    (found,) = predictor([torch.zeros(3, 3, 3, dtype=torch.uint8)])
    whole = np.asarray(found.pictures["depth_mm"])
    assert whole.dtype == np.uint16
    assert whole.tolist() == [[0, 0, 0], [1, 1234, 65535], [0, 0, 2000]]
