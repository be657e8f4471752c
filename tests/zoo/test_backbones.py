"""The backbones that ship: what they are, that they have learned something, and what their cards say."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

import vispeft
from vispeft.zoo import list_zoo_backbones, zoo_folder

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["swin_tiny", "vit_tiny"]


def test_they_are_these():
    assert list_zoo_backbones() == NAMES


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def result(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"pretrain_{name}.json").read_text(encoding="utf-8"))


def test_shape_and_size(name):
    model = vispeft.create_model(f"zoo:{name}")
    assert (zoo_folder() / "backbones" / name / "model.safetensors").stat().st_size < 8_000_000
    assert model.num_classes == 10
    assert model.pretrained_cfg["input_size"][0] == 3
    if name == "vit_tiny":
        assert (model.embed_dim, len(model.blocks), model.num_prefix_tokens) == (192, 8, 1)
    else:
        assert (model.embed_dim, [len(stage.blocks) for stage in model.layers]) == (32, [2, 2, 6, 2])


@pytest.mark.parametrize("side", [96, 128])
def test_images_of_other_sizes(name, side):
    model = vispeft.create_model(f"zoo:{name}", num_classes=0, flexible_size=True).eval()
    with torch.inference_mode():
        maps = model.forward_intermediates(torch.randn(1, 3, side, side), indices=1, intermediates_only=True)
    assert maps[0].shape[-1] == side // (4 if name == "vit_tiny" else 32)
    assert torch.isfinite(maps[0]).all()


def test_few_digits_are_learned_faster_than_from_random_weights(name):
    digits = load_digits()
    side = vispeft.create_model(f"zoo:{name}").pretrained_cfg["input_size"][-1]
    order = np.random.default_rng(0).permutation(len(digits.target))
    fit = np.concatenate([order[digits.target[order] == digit][:5] for digit in range(10)])
    test = np.setdiff1d(order[:230], fit)[:200]
    images = torch.from_numpy(digits.images[np.concatenate([fit, test])] / 8 - 1).float()[:, None]
    images = F.interpolate(images, size=(side, side), mode="bicubic").clamp(-1, 1).expand(-1, 3, -1, -1)

    def accuracy(pretrained: bool) -> float:
        torch.manual_seed(0)
        model = vispeft.create_model(f"zoo:{name}", pretrained=pretrained).eval()
        with torch.inference_mode():
            x = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
        return probe.fit(x[:50], digits.target[fit]).score(x[50:], digits.target[test])

    assert accuracy(pretrained=True) >= accuracy(pretrained=False) + 0.1


def test_every_measure_is_better_than_at_random_weights(name):
    measured = result(name)["measured"]
    learned, random = measured["pretrained"], measured["random"]
    assert learned["digits_few"]["test"] >= random["digits_few"]["test"] + 0.1
    for key in ("digits_own_probe", "digits_probe", "digits_few", "fashion_probe", "earth_probe"):
        assert learned[key]["test"] > random[key]["test"], key
    assert learned["emoji_recall"] > random["emoji_recall"]


def test_the_card_is_made_from_what_was_measured(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pretrain_eval

    card = (zoo_folder() / "backbones" / name / "CARD.md").read_text(encoding="utf-8")
    assert card == pretrain_eval.card(result(name))
    assert sys.modules["pretrain_eval"].__file__ == str(ROOT / "benchmarks" / "pretrain_eval.py")
