import pytest
import torch
from safetensors.torch import load_file

import vispeft
from vispeft.errors import ConfigError

import timm  # isort: skip
from vispeft.methods.vqt import feature_scores, select_features


def tiny_vit():
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **small)


def train(run_cli, config, out, *more):
    result = run_cli("train", config, "--method", "vqt", "--out", out, *more)
    assert result.status == 0, result.err
    return result.out


def test_the_columns_a_classifier_uses_most_are_chosen():
    weight = torch.tensor([[3.0, 0.0, 1.0, 0.5], [4.0, 0.0, 1.0, 0.5]], requires_grad=True)
    assert torch.allclose(feature_scores(weight), torch.tensor([5.0, 0.0, 2**0.5, 0.5**0.5]))
    feature_scores(weight).sum().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad[:, 1].tolist() == [0, 0]
    assert select_features(weight, 0.5).tolist() == [0, 2]
    assert select_features(weight, 0.7).tolist() == [0, 2]  # int(4 * 0.7), as the public code rounds


def test_only_selected_features_reach_the_classifier():
    torch.manual_seed(0)
    images, model, part = torch.randn(2, 3, 32, 32), tiny_vit().eval(), tiny_vit().eval()
    part.load_state_dict(model.state_dict())
    whole, some = vispeft.attach(model, vispeft.VQT()), vispeft.attach(part, vispeft.VQT(keep=0.5))
    tensors = {**whole.state_dict(), **some.state_dict()}
    (key,) = (key for key in tensors if key.endswith(".selected"))
    chosen = tensors[key]
    queries = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("head/")}
    some.load_state_dict({**queries, key: chosen})
    seen = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(part.forward_head(part.forward_features(images), pre_logits=True), seen[:, chosen])
    assert len(chosen) == seen.shape[1] // 2


def test_the_penalty_needs_a_linear_classifier():
    model = tiny_vit()
    bank = vispeft.attach(model, vispeft.VQT(head_sparsity=1e-3))
    images = torch.randn(2, 3, 32, 32)
    assert bank.loss_terms((images,), model(images)) > 0
    model.reset_classifier(0)
    with pytest.raises(ConfigError, match="penalises the weight of a linear classifier, and adapter 'default' has no"):
        bank.loss_terms((images,), model(images))


@pytest.mark.slow
def test_the_four_steps(run_cli, config, tmp_path):
    first, second, last, chosen = (tmp_path / name for name in ("first", "second", "last", "chosen"))
    train(run_cli, config, first)
    said = train(run_cli, config, second, "--init", first, "--model.method.head_sparsity", "1e-4")
    assert "the classifier is a fresh one, because head_sparsity" in said
    result = run_cli("select_features", first, second, "--keep", "0.7", "--out", chosen)
    assert result.status == 0, result.err
    stored = load_file(chosen / "adapter.safetensors")
    (key,) = (key for key in stored if key.endswith(".selected"))
    weight = load_file(second / "adapter" / "head.safetensors")["head/weight"]
    assert torch.equal(stored[key], select_features(weight, 0.7))
    queries = load_file(first / "adapter" / "adapter.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in queries.items())
    train(run_cli, config, last, "--init", chosen, "--model.method.keep", "0.7")
    assert torch.equal(load_file(last / "adapter" / "adapter.safetensors")[key], stored[key])
    assert "is not overwritten" in run_cli("select_features", first, second, "--out", chosen).err
    assert "below 1 is needed" in run_cli("select_features", first, second, "--keep", "1", "--out", tmp_path / "x").err
    assert "nothing to select" in run_cli("select_features", last, second, "--out", tmp_path / "x").err


def test_a_run_of_another_method_is_refused(run_cli, finished, tmp_path):
    assert "is no run of VQT" in run_cli("select_features", finished, finished, "--out", tmp_path / "x").err
