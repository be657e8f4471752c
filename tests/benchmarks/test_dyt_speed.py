"""The benchmark of DyT's time lets the share of tokens pass that it names, and makes the page from its record."""

import dyt_speed
import method_pages
import pytest
import timm
import torch

import vispeft


@pytest.mark.slow
def test_the_named_share_passes():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=24, depth=3, num_heads=2).eval()
    bank = vispeft.attach(model, vispeft.DyT(bottleneck=4), name="dyt", verify=False)
    images = torch.randn(4, 3, 64, 64)
    for share in (0.25, 0.75):
        biases = dyt_speed.settle(bank, images, share)
        assert len(biases) == 3
        dyt_speed.choose(bank, biases)
        for kept in model.run(images).passed.values():
            assert float(kept.detach().float().mean()) == pytest.approx(share, abs=0.02)
    costs = []
    with torch.inference_mode():
        for bias in (-100.0, 100.0):
            dyt_speed.choose(bank, [torch.full((1,), bias)] * 3)
            costs.append(dyt_speed.operations(lambda: model(images)))
    # 16 patches and not the class token skip 3 MLPs of 4 images, each of 8 D^2 multiplications and as many additions.
    assert costs[1] - costs[0] == 16 * 3 * 4 * 2 * 8 * 24**2


def test_the_pages_are_made_from_the_record(tmp_path, monkeypatch):
    row = {"images_per_second": 5.0, "throughput": 1.25}
    counts = {"passed": 0.501, "operations_of_frozen": 0.7}
    rows = {"frozen": row, "lora": {**row, "throughput": 0.9}, "dyt, 0.5 pass": {**row, **counts}}
    found = {"model": "vit", "batch": 8, "bottleneck": 16, "threads": 1, "rows": rows}
    lines = dyt_speed.table(found)
    assert "| lora |  |  | 5.00 | 0.90 |" in lines
    assert "| dyt, 0.5 pass | 0.50 | 0.70 | 5.00 | 1.25 |" in lines
    monkeypatch.setattr(method_pages, "RESULTS", tmp_path)
    assert list(method_pages.speed("dyt")) == []
    (tmp_path / "dyt_speed.json").write_text(method_pages.json.dumps(found))
    assert list(method_pages.speed("lora")) == []
    (_, line) = method_pages.speed("dyt")
    assert "1.25 of the frozen model's throughput" in line
    assert "LoRA 0.90" in line
