"""Class embeddings in place of a trained classifier, measured and predicted: of a run, and of a config's backbone."""

import csv
import re

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import vispeft
from tests.tiny import CONFIG, TINY
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import Run
from vispeft.cli.zero_shot import classified, config_without_adapter
from vispeft.data import DigitsData
from vispeft.errors import ConfigError
from vispeft.storage.class_embeddings import ClassEmbeddings
from vispeft.tasks import Classification, MultiLabel

NAMES = tuple("9876543210")


def embeddings(path, names=NAMES, width=32):
    generator = torch.Generator().manual_seed(3)
    unit = nn.functional.normalize(torch.randn(len(names), 6, generator=generator), dim=-1)
    classes = ClassEmbeddings(unit, names, 20.0, torch.randn(6, width, generator=generator), "random")
    classes.save(path)
    return classes


def task_of(method, classes=3, cls=Classification):
    torch.manual_seed(0)
    return cls(backbone="vit_tiny_patch16_224", backbone_args=TINY, num_classes=classes, method=method)


@torch.no_grad()
def test_an_adapter_is_scored_by_class_embeddings(tmp_path):
    task, images = task_of(vispeft.LoRA(rank=2)).eval(), torch.randn(4, 3, 16, 16)
    classes = embeddings(tmp_path / "c.safetensors")
    task.bank.annotate(class_names=list("abc"), output={"target": "class", "temperature": 3.0, "reading": {}})
    task.temperature = 3.0
    features = features_of(task, images)
    task.classify_by(classes)
    torch.testing.assert_close(task(images), classes.scores(features), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(task.predict_step(images, 0), task(images).softmax(1))
    assert (task.num_classes, task.class_names(), task.temperature) == (10, list(NAMES), 1.0)
    assert task.bank.notes()["output"] == {"target": "class", "temperature": 1.0, "reading": {}}
    task.validation_metrics.update(task(images).log_softmax(1), torch.tensor([9, 9, 9, 9]))
    assert set(task.validation_metrics.compute()) >= {"validation/accuracy", "validation/top5_accuracy"}


@torch.no_grad()
def test_of_mmrl_both_features_score_classes_that_it_knows(tmp_path):
    seen = embeddings(tmp_path / "seen.safetensors", NAMES[:3])
    method = vispeft.MMRL(classes=str(tmp_path / "seen.safetensors"), first_block=1, token_dim=16, read_rank=2)
    task, images = task_of(method).eval(), torch.randn(4, 3, 16, 16)
    task.bank.annotate(class_names=seen.class_names)
    before = task(images)
    task.classify_by(seen.ordered(NAMES[1:3]))
    torch.testing.assert_close(task(images), before[:, 1:3])
    new = embeddings(tmp_path / "new.safetensors", NAMES[:5])
    task.classify_by(new)  # two of them are new: the class token alone
    result = task.model.run(images)
    own = task.model.forward_head(task.model.features(result), pre_logits=True).chunk(2, dim=1)[0]
    torch.testing.assert_close(task(images), 20.0 * own @ new.embeddings.T, rtol=1e-5, atol=1e-5)


def test_other_features_are_refused(tmp_path):
    classes = embeddings(tmp_path / "c.safetensors", width=24)
    with pytest.raises(ConfigError, match="for 24 features, and the classifier of lora takes 32"):
        task_of(vispeft.LoRA(rank=2)).classify_by(classes)
    classes = embeddings(tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match="the classifier of vqt takes"):
        task_of(vispeft.VQT(num_queries=1)).classify_by(classes)


@torch.no_grad()
def features_of(task, images):
    return task.model.forward_head(task.model.forward_features(images), pre_logits=True)


def accuracy(text):
    """Read the accuracy that was measured now, in the first column of figures."""
    (line,) = (line for line in text.splitlines() if re.match(r"\W*accuracy ", line))
    return float(re.findall(r"\d\.\d{4}", line)[0])


@pytest.mark.slow
def test_a_config_and_a_run_are_measured_by_class_embeddings(finished, run_cli, tmp_path):
    path = tmp_path / "classes.safetensors"
    classes = embeddings(path).ordered(NAMES[::-1])
    (tmp_path / "plain.yaml").write_text(CONFIG)
    task = config_without_adapter(str(tmp_path / "plain.yaml"), []).model
    data = DigitsData.for_model(task.model, batch_size=256)
    images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))

    found = run_cli("evaluate", tmp_path / "plain.yaml", "--classes", path, "--data.batch_size=128")
    assert found.status == 0, found.err
    wanted = (classes.scores(features_of(task, images)).argmax(1) == labels).float().mean()
    assert accuracy(found.out) == pytest.approx(float(wanted), abs=1e-4)
    assert "by class embeddings" in found.out
    assert "metrics.json" not in found.out

    found = run_cli("evaluate", finished, "--classes", path)
    assert found.status == 0, found.err
    task, _ = load_task(Run.open(finished))
    wanted = (classes.scores(features_of(task, images)).argmax(1) == labels).float().mean()
    assert accuracy(found.out) == pytest.approx(float(wanted), abs=1e-4)

    found = run_cli("evaluate", finished, "--classes", path, "--model.lr=1")
    assert found.status == 2
    embeddings(path, NAMES[:4])
    found = run_cli("evaluate", finished, "--classes", path)
    assert found.status == 2
    assert "have no embedding in the file" in found.err


@pytest.mark.slow
def test_images_are_predicted_by_class_embeddings(finished, run_cli, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number}.png")
    path = tmp_path / "classes.safetensors"
    embeddings(path, ("owl", "wren"))
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG)))
    for name, source in (("run", finished), ("config", tmp_path / "plain.yaml")):
        found = run_cli("predict", source, folder, "--classes", path, "--out", tmp_path / name)
        assert found.status == 0, found.err
        with (tmp_path / name / "predictions.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 4
        assert {row[1] for row in rows[1:]} <= {"owl", "wren"}
    found = run_cli("predict", tmp_path / "plain.yaml", folder, "--out", tmp_path / "without")
    assert found.status == 2  # a config needs class embeddings


def test_another_task_is_refused(tmp_path):
    classes = embeddings(tmp_path / "c.safetensors")
    with pytest.raises(ConfigError, match="task MultiLabel"):
        classified(task_of(vispeft.LoRA(rank=2), cls=MultiLabel), classes)
