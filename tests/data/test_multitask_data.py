import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from tests.data.published import Painter
from tests.data.published_tasks import box, make_nyud_mt, make_pascal_mt, write_parts
from tests.data.reading import names_of, ready
from vispeft.data import IGNORE, NyudMultiTaskData, PascalMultiTaskData
from vispeft.data.listed_tasks import ListedTasks
from vispeft.data.pascal_labels import NORMAL_CONTEXTS, PART_OF, PARTS
from vispeft.data.task_checks import task_figures
from vispeft.errors import ConfigError, DataError, UnknownNameError

NYUD = ("semseg", "depth", "normals", "edge")


@pytest.fixture(scope="module")
def pascal(tmp_path_factory):
    return make_pascal_mt(tmp_path_factory.mktemp("pascal"), Painter())


@pytest.fixture(scope="module")
def nyud(tmp_path_factory):
    return make_nyud_mt(tmp_path_factory.mktemp("nyud"), Painter())


@pytest.fixture
def copied(nyud, tmp_path):
    shutil.copytree(nyud, tmp_path / "nyud")
    return tmp_path / "nyud"


def made(cls, root, **settings):
    return cls(root=str(root), **settings)


def found(data):
    return {finding.code: finding for finding in data.report().findings if finding.level == "error"}


# ------------------------------------------------------------------ batches and descriptions


def test_batches_have_the_form_that_the_targets_describe(nyud):
    data = ready(made(NyudMultiTaskData, nyud, batch_size=2, num_workers=0))
    assert data.target == "tasks"
    assert tuple(data.targets) == NYUD
    assert [target.kind for target in data.targets.values()] == ["classes", "depth", "normals", "edge"]
    assert data.loss_weights == {"semseg": 1, "depth": 1, "normals": 10, "edge": 50}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert (images.shape, images.dtype) == ((2, 3, 8, 8), torch.float32)
        assert tuple(labels) == NYUD
        assert (labels["semseg"].shape, labels["semseg"].dtype) == ((2, 8, 8), torch.int64)
        for task, channels in (("depth", 1), ("normals", 3), ("edge", 1)):
            assert (labels[task].shape, labels[task].dtype) == ((2, channels, 8, 8), torch.float32)
        known = labels["normals"] != IGNORE
        assert torch.equal(known.all(1), known.any(1))
        torch.testing.assert_close(labels["normals"].norm(dim=1)[known.all(1)], torch.ones(int(known[:, 0].sum())))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [3, 2, 2]
    assert data.validation_chooses is False
    assert data.listing.repeated_by("validation") == "test"


def test_tasks_are_those_that_were_asked_for_or_those_of_a_model(nyud):
    data = made(NyudMultiTaskData, nyud, tasks=["depth", "semseg"])
    assert data.class_names == tuple(data.targets) == tuple(data.listing.splits["train"].labels) == ("depth", "semseg")
    assert data.num_classes == 2
    assert (data.targets["depth"].channels, data.targets["semseg"].channels) == (1, 40)
    assert data.match_classes(["edge", "depth"]).lines() == []
    assert data.class_names == tuple(data.listing.splits["train"].labels) == ("edge", "depth")
    with pytest.raises(DataError, match="no labels for sal; it knows semseg, depth"):
        data.match_classes(["depth", "sal"])
    with pytest.raises(DataError, match="match the tasks before"):
        ready(data).match_classes(["depth"])


def test_workers_give_the_same_batches_and_epochs_differ(nyud):
    data, again = (ready(made(NyudMultiTaskData, nyud, batch_size=3, num_workers=n, seed=4)) for n in (0, 1))
    for (images, labels), (others, their) in zip(data.train_dataloader(), again.train_dataloader(), strict=True):
        assert torch.equal(images, others)
        assert all(torch.equal(labels[task], their[task]) for task in NYUD)
    split = data.split("train")
    first, *later = (torch.stack([split[epoch, i][1]["depth"] for i in range(3)]) for epoch in range(3))
    assert not all(torch.equal(first, other) for other in later)
    assert list(data.identity()) == list(again.identity())
    assert list(data.identity()) != list(ready(made(NyudMultiTaskData, nyud, tasks=["depth"])).identity())


def test_tune_draws_the_validation_images_from_train(nyud):
    data = ready(made(NyudMultiTaskData, nyud, tasks=["depth"], protocol="tune", validation=0.3))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [2, 1, 2]
    assert data.validation_chooses
    split = data.split("validation")
    stem = split.source.name(0).split("/")[1][:4]
    assert split.labels["depth"].name(0) == f"depth/{stem}.npy"


# ------------------------------------------------------------------ NYUD


def test_labels_of_nyud_are_read_as_published(nyud):
    data = ready(made(NyudMultiTaskData, nyud, image_size=(10, 12)))
    split = data.split("test")
    labels = split[0][1]
    codes = torch.from_numpy(np.array(Image.open(nyud / "segmentation/0002.png"))).long()
    assert torch.equal(labels["semseg"], torch.where(codes == 0, IGNORE, codes - 1))
    depth = torch.from_numpy(np.load(nyud / "depth/0002.npy"))
    assert torch.equal(labels["depth"][0], torch.where(depth == 0, float(IGNORE), depth))
    normals = torch.from_numpy(np.load(nyud / "normals/0002.npy")).permute(2, 0, 1)
    assert bool((labels["normals"][:, :, 0] == IGNORE).all())
    torch.testing.assert_close(labels["normals"][:, :, 1:], normals[:, :, 1:])
    assert np.array_equal(labels["edge"][0].numpy(), np.load(nyud / "edge/0002.npy"))


def test_figures_of_every_task_are_known(nyud):
    listing = ready(made(NyudMultiTaskData, nyud)).listing
    figures = {task: task_figures(listing, task, "train") for task in NYUD}
    assert figures["depth"].share == pytest.approx(0.9)
    assert figures["normals"].share == pytest.approx(11 / 12)
    assert figures["semseg"].values == "40 of 40 classes"
    assert figures["edge"].values.startswith("0 and 1, ")
    assert figures["depth"].unlabelled == 0


# ------------------------------------------------------------------ PASCAL


def test_parts_are_those_of_people_and_later_ones_count(pascal):
    assert len(PART_OF) == 24
    data = ready(made(PascalMultiTaskData, pascal, tasks=["human_parts"], image_size=(10, 12)))
    split = data.split("test")
    assert names_of(split) == ["JPEGImages/2010_000002.jpg"]  # nobody is in the other one
    expected = np.zeros((10, 12), np.int64)
    for part, place in (
        ("head", box(0, 0, 2, 2)),
        ("torso", box(1, 0, 4, 4)),
        ("lower arm", box(4, 0, 6, 2) | box(5, 1, 7, 3)),
        ("upper leg", box(7, 0, 9, 2)),
        ("upper arm", box(0, 8, 2, 10)),
        ("lower leg", box(2, 8, 4, 10)),
    ):
        expected[place] = PARTS.index(part)
    assert np.array_equal(split[0][1]["human_parts"].numpy(), expected)


def test_without_people_all_parts_are_ignored(pascal):
    data = ready(made(PascalMultiTaskData, pascal, tasks=["human_parts", "sal"]))
    assert [len(data.split(name)) for name in ("train", "test")] == [4, 2]
    assert data.split("test")[0][1]["human_parts"].unique().tolist() == [IGNORE]
    facts = {finding.text: finding.places for finding in data.report().of("fact")}
    text = "human_parts: 1 mask in test without a labelled pixel (255 everywhere)"
    assert facts[text] == ("human_parts/2010_000001.mat",)
    assert not data.report().of("error")


def test_the_list_of_categories_says_who_is_there(pascal, tmp_path):
    root = make_pascal_mt(tmp_path, Painter(), cached=True)
    (root / "human_parts/2010_000001.mat").unlink()  # that of an image without people is not asked for
    data = made(PascalMultiTaskData, root, tasks=["human_parts"])
    assert names_of(data.listing.splits["test"]) == names_of(
        made(PascalMultiTaskData, pascal, tasks=["human_parts"]).listing.splits["test"]
    )
    (root / "ImageSets/Parts/val.txt").write_text("[1]")
    with pytest.raises(DataError, match="no JSON object"):
        made(PascalMultiTaskData, root, tasks=["human_parts"]).read()


def test_an_image_without_objects_has_no_parts(tmp_path):
    root = make_pascal_mt(tmp_path, Painter())
    write_parts(root / "human_parts/2010_000001.mat", [])
    write_parts(root / "human_parts/2010_000002.mat", [("person", 15, {})])
    labels = made(PascalMultiTaskData, root, tasks=["human_parts", "sal"]).listing.splits["test"].labels
    for index in (0, 1):
        label = labels["human_parts"].read(index)
        assert (label.shape, label.unique().tolist()) == ((1, 10, 12), [IGNORE])


def test_semantic_masks_come_from_voc_where_it_has_one(pascal):
    labels = made(PascalMultiTaskData, pascal, tasks=["semseg"]).listing.splits["train"].labels["semseg"]
    assert [labels.name(index).split("/")[1] for index in range(4)] == ["pascal-context", "VOC12"] * 2


def test_normals_are_kept_in_the_contexts_of_nyud(pascal):
    assert len(set(NORMAL_CONTEXTS)) == 170
    data = ready(made(PascalMultiTaskData, pascal, tasks=["normals", "sal"], image_size=(10, 12)))
    label = data.split("test")[0][1]["normals"]
    assert bool((label[:, :, 6:] == IGNORE).all())
    colours = np.asarray(Image.open(pascal / "normals_distill/2010_000001.png")).astype(np.float32)
    expected = torch.from_numpy(2 * colours / 255 - 1).permute(2, 0, 1)[:, :, :6]
    torch.testing.assert_close(label[:, :, :6], torch.nn.functional.normalize(expected, dim=0))
    shades = np.asarray(Image.open(pascal / "sal_distill/2010_000001.png"))
    assert np.array_equal(data.split("test")[0][1]["sal"][0].numpy(), shades > 127)


def test_edges_are_thin_lines_between_contexts(pascal, tmp_path):
    data = ready(made(PascalMultiTaskData, pascal, tasks=["edge"], image_size=(10, 12)))
    edges = data.split("test")[0][1]["edge"][0]
    assert edges.sum(1).max() == 1  # one pixel in a row, and none where thinning ends the line
    assert edges.sum() >= 8
    assert set(edges.nonzero()[:, 1].tolist()) <= {5, 6}


def test_a_missing_reader_of_matlab_files_is_named_at_once(pascal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"'edge', whose labels are MATLAB files, and scipy.*vispeft\[multitask\]"):
        made(PascalMultiTaskData, pascal, tasks=["semseg", "edge"])
    with pytest.raises(ConfigError, match="leave human_parts, normals out of tasks"):
        made(PascalMultiTaskData, pascal)
    made(PascalMultiTaskData, pascal, tasks=["semseg", "sal"])


# ------------------------------------------------------------------ refusals


def test_only_files_of_the_requested_tasks_are_asked_for(copied):
    for task in ("depth", "normals", "segmentation"):
        shutil.rmtree(copied / task)
    assert not found(made(NyudMultiTaskData, copied, tasks=["edge"]))
    data = made(NyudMultiTaskData, copied, tasks=["depth", "semseg", "edge"])
    texts = [finding.line() for finding in data.report().of("error")]
    assert any("depth: not one of 7 label files is there; leave depth out of tasks" in text for text in texts)
    assert any("semseg: not one of 7 label files is there" in text for text in texts)
    assert not any(text.startswith("edge") for text in texts)


@pytest.mark.parametrize("check", ["full", "fast"])
def test_labels_that_are_missing_or_empty_are_named(copied, check):
    (copied / "depth/0003.npy").unlink()
    (copied / "edge/0004.npy").write_bytes(b"")
    codes = found(made(NyudMultiTaskData, copied, tasks=["depth", "edge"], check=check))
    assert codes["missing-label"].places == ("depth/0003.npy",)
    assert codes["missing-label"].text.startswith("depth: 1 image without a label")
    assert codes["empty-label"].places == ("edge/0004.npy",)


@pytest.mark.parametrize(
    ("task", "values", "says"),
    [
        ("depth", np.ones((10, 12, 2)), "numbers (height, width) are needed"),
        ("depth", np.full((10, 12), -1.0), "metres from 0"),
        ("depth", np.full((10, 12), np.nan), "not finite"),
        ("depth", np.full((10, 12), "far"), "numbers (height, width) are needed"),
        ("normals", np.ones((10, 12, 3)), "vectors of length 1.73205"),
        ("normals", np.ones((10, 12)), "numbers (height, width, 3) are needed"),
        ("edge", np.full((10, 12), 0.5), "edges are 0 or 1"),
    ],
)
def test_labels_of_another_type_are_refused(copied, task, values, says):
    np.save(copied / task / "0003.npy", values)
    finding = found(made(NyudMultiTaskData, copied, tasks=[task]))["unsupported-label"]
    assert says in finding.line()
    with pytest.raises(DataError, match="cannot be read as a label"):
        made(NyudMultiTaskData, copied, tasks=[task]).listing.splits["train"].labels[task].read(1)


def test_every_image_needs_a_label_of_each_task(nyud):
    split = made(NyudMultiTaskData, nyud).listing.splits["train"]
    with pytest.raises(DataError, match="'depth' has 2 labels for 3 images"):
        ListedTasks(split.source, {"edge": split.labels["edge"], "depth": split.labels["depth"].take([0, 2])})


def test_labels_of_another_size_or_without_content_are_refused(copied):
    np.save(copied / "depth/0003.npy", np.ones((10, 11)))
    np.save(copied / "depth/0004.npy", np.zeros((10, 12)))
    (copied / "edge/0003.npy").write_text("no array")
    for path in (copied / "edge").glob("000[25].npy"):
        np.save(path, np.zeros((10, 12)))
    painter = Painter()
    painter.label(copied / "segmentation/0003.png", [0, 1, 200], (12, 10))
    data = made(NyudMultiTaskData, copied, tasks=["depth", "edge", "semseg"])
    codes = found(data)
    assert codes["label-size"].places == ("depth/0003.npy (11 x 10 for an image of 12 x 10)",)
    assert "edge: 1 image with a label that cannot be opened" in codes["broken-label"].text
    assert codes["never-one"].text.startswith("edge: no pixel of")
    assert "semseg: masks have values that stand for none of the 40 classes" in codes["mask-values"].text
    warnings = {finding.code: finding.places for finding in data.report().of("warning")}
    assert warnings["label-unlabelled"] == ("depth/0004.npy",)


def test_masks_of_the_wrong_type_are_refused(tmp_path):
    root, painter = make_pascal_mt(tmp_path, Painter()), Painter()
    painter.paint(root / "sal_distill/2008_000001.png", (12, 10))
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(root / "normals_distill/2008_000001.png")
    savemat(root / "human_parts/2008_000001.mat", {"other": 1})
    write_parts(root / "human_parts/2008_000002.mat", [("person", 15, {"tail": box(0, 0, 2, 2)})])
    (root / "pascal-context/trainval/2008_000002.mat").unlink()
    report = made(PascalMultiTaskData, root, tasks=["human_parts", "sal", "normals"]).report()
    lines = "\n".join(finding.line() for finding in report.of("error"))
    assert "its pixels are RGB, and this label is a grey image" in lines
    assert "three components, stored as RGB" in lines
    assert "no variable anno; found other" in lines
    assert 'a person has a part "tail"; known are hair, head' in lines
    assert "normals_distill/2008_000002.png (pascal-context/trainval/2008_000002.mat)" in lines


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tasks": []}, "one or more different tasks"),
        ({"tasks": ["depth", "depth"]}, "one or more different tasks"),
        ({"tasks": "depth"}, "a list of texts"),
        ({"crop_pct": 0.9}, "leave it out"),
        ({"augment": {"flip": 1}}, "TaskAugmentation"),
        ({"protocol": "best"}, "final and tune"),
    ],
)
def test_settings_that_cannot_work_are_refused(nyud, settings, says):
    with pytest.raises(ConfigError, match=says):
        made(NyudMultiTaskData, nyud, **settings)


def test_unknown_tasks_and_other_folders_are_refused(nyud, tmp_path):
    with pytest.raises(UnknownNameError, match=r"'dept'. Did you mean 'depth'"):
        made(NyudMultiTaskData, nyud, tasks=["dept"])
    with pytest.raises(DataError, match="no folder with JPEGImages, ImageSets/Context"):
        made(PascalMultiTaskData, nyud).read()
