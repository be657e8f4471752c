"""Data for metric learning: splits of whole classes, batches of a few images per class, roles, bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.published import Painter
from tests.data.reading import names_of, ready
from vispeft.data import Augmentation, ImageListData, MetricFolderData, MetricListData
from vispeft.data.listing import ListedSplit
from vispeft.data.metric_listing import BOTH, ListedRoles
from vispeft.data.randomness import seeded
from vispeft.data.sources import FileSource
from vispeft.errors import ConfigError, DataError

CLASSES, IMAGES = 12, 4
SMALL = {"batch_size": 4, "images_per_class": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place, painter = tmp_path_factory.mktemp("classes"), Painter()
    for name in range(CLASSES):
        for number in range(IMAGES):
            painter.paint(place / f"c{name}/{number}.png", (9, 7))
    return place


def folder(root, **settings):
    return MetricFolderData(root=str(root), **{**SMALL, **settings})


def lists(root, **lines):
    for name, found in lines.items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in found))
    given = {f"{name}_list": str(root / f"{name}.txt") for name in lines}
    return MetricListData(**given, root=str(root), **SMALL)


def classes_of(data, split):
    listed = data.listing.splits[split]
    return {data.label_names[label] for label in listed.targets.tolist()}


def codes(data, level="error"):
    return {finding.code: finding.line(99) for finding in data.report().of(level)}


# ------------------------------------------------------------------ splits


def test_splits_are_of_whole_classes_and_the_training_classes_come_first(root):
    data = ready(folder(root, validation=0.3, test=0.5))
    parts = {name: classes_of(data, name) for name in ("train", "validation", "test")}
    assert [len(parts[name]) for name in parts] == [4, 2, 6]
    assert set.union(*parts.values()) == {f"c{name}" for name in range(CLASSES)}
    assert set(data.class_names) == parts["train"]
    assert data.num_classes == 4
    assert sorted(set(data.train_labels)) == [0, 1, 2, 3]
    assert len(data.train_labels) == 4 * IMAGES
    assert data.listing.splits["validation"].targets.unique().tolist() == [4, 5]
    for name, split in data.listing.splits.items():  # the table of classes belongs to the images
        for image, label in zip(names_of(split), split.targets.tolist(), strict=True):
            assert image.startswith(f"{data.label_names[label]}/"), name


def test_another_seed_draws_other_classes_and_the_same_seed_the_same(root):
    drawn = [classes_of(folder(root, split_seed=seed), "test") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_without_validation_classes_the_last_epoch_is_the_result(root):
    data = ready(folder(root, validation=None))
    assert not data.validation_chooses
    assert data.num_classes == 6
    assert names_of(data.listing.splits["validation"]) == names_of(data.listing.splits["test"])
    assert "the last is the result" in codes(data, "fact")["chosen-epoch"]
    assert [data.listing.repeated_by(name) for name in ("validation", "test")] == ["test", None]
    assert folder(root).validation_chooses
    assert folder(root).listing.repeated_by("validation") is None


def test_folds_of_mlrc_are_quarters_of_the_training_classes_in_their_order(root):
    found = [folder(root, protocol="mlrc", test=1 / 3, fold=fold) for fold in range(4)]
    tested = classes_of(found[0], "test")
    assert all(classes_of(data, "test") == tested for data in found)
    order = [f"c{name}" for name in range(CLASSES) if f"c{name}" not in tested]
    assert [classes_of(data, "validation") for data in found] == [set(order[at : at + 2]) for at in range(0, 8, 2)]
    for data in found:
        assert data.validation_chooses
        assert classes_of(data, "train") == set(order) - classes_of(data, "validation")


def test_given_splits_are_kept_and_joined_where_a_protocol_draws_its_own(root):
    lines = {
        "train": [f"c{name}/{n}.png {name}" for name in range(4) for n in range(IMAGES)],
        "validation": [f"c{name}/{n}.png {name}" for name in (6, 7) for n in range(IMAGES)],
        "test": [f"c{name}/{n}.png {name}" for name in (9, 10) for n in range(IMAGES)],
    }
    data = lists(root, **lines)
    assert [classes_of(data, name) for name in data.listing.splits] == [{"0", "1", "2", "3"}, {"6", "7"}, {"9", "10"}]
    data.validation, data._listing = None, None
    assert classes_of(data, "train") == {"0", "1", "2", "3", "6", "7"}


# ------------------------------------------------------------------ batches


def test_batches_have_as_many_images_of_each_class_and_repeat_exactly(root):
    with seeded(3):  # of numpy's global generator, from which the library's sampler draws
        state = np.random.get_state()[1].tolist()  # noqa: NPY002
        batches = [labels.tolist() for _, labels in ready(folder(root, validation=0.3)).train_dataloader()]
        assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert len(batches) == 4 * IMAGES // 4
    for labels in batches:
        assert labels[0] == labels[1] != labels[2] == labels[3]
    with seeded(4):
        again = [labels.tolist() for _, labels in ready(folder(root, validation=0.3)).train_dataloader()]
    assert again == batches
    data = ready(folder(root, validation=0.3))
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    assert [labels.tolist() for _, labels in loader] != batches


def test_an_order_goes_on_where_it_stopped(root):
    def whole(**settings):
        loader = ready(folder(root, validation=0.3, **settings)).train_dataloader()
        loader.sampler.set_epoch(2)
        return list(loader)

    data = ready(folder(root, validation=0.3))
    data._position = (2, 3)
    rest = list(data.train_dataloader())
    for (images, labels), (expected, wanted) in zip(rest, whole()[3:], strict=True):
        assert torch.equal(labels, wanted)
        assert torch.equal(images, expected)
    assert torch.equal(whole(num_workers=1)[0][0], whole()[0][0])
    changed = ready(folder(root, validation=0.3, images_per_class=1))
    with pytest.raises(DataError, match="images_per_class was 2 and is 1"):
        changed.check_same({**data.order_facts()})


def test_an_image_drawn_twice_in_an_epoch_is_augmented_twice(tmp_path):
    painter = Painter()
    for name in ("a", "b", "c", "d"):
        painter.paint(tmp_path / f"{name}/1.png", (40, 40))
        painter.paint(tmp_path / f"{name}/2.png", (40, 40))
    data = ready(folder(tmp_path, validation=None, batch_size=4, images_per_class=2))
    loader = data.train_dataloader()
    drawn = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        drawn += [image for images, _ in loader for image in images]
    assert all(not torch.equal(one, other) for one, other in zip(drawn, drawn[4:], strict=False))
    numbers = [number for epoch in range(3) for number, _ in loader.sampler.order(epoch)]
    assert numbers == list(range(len(drawn)))


def test_images_are_cropped_and_flipped_for_training_and_centred_for_evaluation(root):
    data = ready(folder(root))
    assert data.augment == Augmentation(crop="resized", flip=0.5)
    image, label, role = data.split("test")[0]
    assert image.shape == (3, 8, 8)
    source = data.listing.splits["test"].source
    ratio = max(9 / 7, 9 / 9)  # 8 / 0.875 rounds down to 9
    size = (9, max(9, int(9 * ratio)))
    pixels = Image.fromarray(source.read(0).permute(1, 2, 0).numpy()).resize((size[1], size[0]), Image.BICUBIC)
    left = round((size[1] - 8) / 2)
    expected = torch.from_numpy(np.asarray(pixels)[0:8, left : left + 8].copy()).permute(2, 0, 1) / 127.5 - 1
    assert (image - expected).abs().max() < 0.05
    assert (label.dtype, role.item()) == (torch.int64, 0)


def test_roles_of_queries_and_gallery_and_one_table_of_classes(root):
    data = ready(
        lists(
            root,
            train=[f"c{name}/{n}.png {name}" for name in range(4) for n in range(IMAGES)],
            query=[f"c{name}/0.png {name}" for name in (11, 8)],
            gallery=[f"c{name}/{n}.png {name}" for name in (8, 11) for n in (1, 2)],
        )
    )
    batches = list(data.test_dataloader())
    labels, roles = (torch.cat([batch[index] for batch in batches]) for index in (1, 2))
    assert [data.label_names[label] for label in labels.tolist()] == ["11", "8", "8", "8", "11", "11"]
    assert roles.tolist() == [1, 1, 2, 2, 2, 2]
    assert min(labels.tolist()) >= data.num_classes
    (images, labels, roles) = next(iter(data.val_dataloader()))
    assert roles.tolist() == [0] * len(labels)
    assert images.dtype == torch.float32


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"protocol": "mine"}, "the choices are literature and mlrc"),
        ({"folds": 4}, "set protocol too"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"batch_size": 5}, "batch_size must be a multiple of images_per_class"),
        ({"batch_size": 2}, "at least twice it"),
        ({"images_per_class": 0}, "multiple of images_per_class"),
        ({"augment": Augmentation(mixup=0.2)}, "mixup and cutmix"),
        ({"protocol": "mlrc", "fold": 4}, "0 to 3"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(root, settings, text):
    with pytest.raises(ConfigError, match=text):
        folder(root, **settings)


def test_a_batch_needs_enough_classes_and_images(root):
    data = folder(root, batch_size=12)
    text = (
        "batch_size=12 with images_per_class=2 takes 6 classes, and there are 5 training classes; make batch_size 10 "
        "or less."
    )
    assert codes(data, "warning")["batch-size"] == text
    assert "batch-size" not in codes(folder(root, batch_size=10), "warning")
    with pytest.raises(ConfigError, match=f"MetricFolderData: {text}"):
        ready(data)


def test_a_batch_needs_images_where_classes_are_small(tmp_path):
    painter = Painter()
    for name in range(6):
        painter.paint(tmp_path / f"c{name}/0.png")
    data = folder(tmp_path, batch_size=8, images_per_class=4, validation=None)
    assert codes(data, "warning")["batch-size"].endswith(
        "there are 3 training images, fewer than a batch; give more training images."
    )


def test_a_split_of_one_class_measures_nothing_and_is_a_warning(root):
    found = codes(folder(root), "warning")
    assert "validation has one class only, so each neighbour is right" in found["one-class-in-validation"]
    assert "set validation to a larger share of the classes, or to null" in found["one-class-in-validation"]
    assert "one-class-in-test" not in found
    assert "one-class-in-validation" not in codes(folder(root, validation=0.3), "warning")
    found = codes(folder(root, validation=None, test=0.1), "warning")
    assert found["one-class-in-test"].startswith("test has one class only, so each neighbour is right")


def test_every_fault_is_named_at_once(root):
    data = lists(
        root,
        train=[*(f"c{name}/{n}.png {name}" for name in range(4) for n in range(IMAGES)), "c4/0.png 4"],
        validation=[f"c5/{n}.png 5" for n in range(2)],
        query=["c3/0.png 3", "c6/0.png 6", "c7/0.png 7"],
        gallery=["c6/1.png 6"],
    )
    found = codes(data)
    assert found["shared-classes"].startswith("Classes in both train and test")
    assert found["shared-classes"].endswith(": 3.")
    assert found["few-images"].endswith("or leave the classes out: 4 (1).")
    assert "2 queries of test whose class is not in the gallery" in found["query-without-gallery"]
    assert found["query-without-gallery"].endswith(": 3, 7.")
    assert "same-file-in-two-splits" in found
    with pytest.raises(DataError, match="Classes in both"):
        ready(data)


def test_one_class_is_refused(tmp_path, root):
    painter = Painter()
    for number in range(4):
        painter.paint(tmp_path / f"only/{number}.png")
    with pytest.raises(DataError, match="1 class, too few to hold out whole classes"):
        ready(folder(tmp_path))
    data = lists(root, train=[f"c1/{n}.png 1" for n in range(4)], test=[f"c2/{n}.png 2" for n in range(4)])
    data.validation = None
    assert codes(data)["one-class"].endswith(": 1.")
    with pytest.raises(DataError, match="one class only"):
        _ = data.num_classes


def test_a_split_in_which_nothing_can_be_found_is_refused(root):
    train = [f"c{name}/{n}.png {name}" for name in range(4) for n in range(IMAGES)]
    data = lists(root, train=train, test=["c6/0.png 6", "c7/0.png 7"])
    assert "No image of test has another one of its class" in codes(data)["no-pairs"]
    data = lists(root, train=train, test=["c6/0.png 6", "c7/0.png 7", "c7/1.png 7"])
    assert codes(data) == {}
    assert (
        codes(data, "fact")["lone-images"]
        == "1 image of test alone in their class, which count as misses of recall: 6."
    )


def test_a_query_that_is_in_the_gallery_too_is_one_image_and_not_its_own_neighbour(root):
    train = [f"c{name}/{n}.png {name}" for name in range(4) for n in range(IMAGES)]
    gallery = [f"c{name}/{n}.png {name}" for name in (6, 7) for n in (0, 1)]
    data = lists(root, train=train, query=["c6/1.png 6", "c7/2.png 7"], gallery=gallery)
    assert codes(data) == {}
    assert "listed twice" not in " ".join(codes(data, "warning").values())
    test = data.listing.splits["test"]
    assert names_of(test) == ["c6/1.png", "c7/2.png", "c6/0.png", "c7/0.png", "c7/1.png"]
    assert test.roles.tolist() == [0, 1, 2, 2, 2]
    assert [data.label_names[label] for label in test.targets.tolist()] == ["6", "7", "6", "7", "7"]
    data = lists(root, train=train, query=["c6/1.png 6"], gallery=["c6/1.png 6", *gallery[2:]])
    assert "No image of test has another one of its class" in codes(data)["no-pairs"]


@pytest.mark.parametrize("given", [["query"], ["gallery"], ["test", "query", "gallery"]])
def test_queries_without_a_gallery_are_refused(root, given):
    with pytest.raises(ConfigError, match="give test_list, or query_list and gallery_list"):
        lists(root, train=["c1/0.png 1"], **{name: ["c2/0.png 2"] for name in given})


def test_unreadable_and_other_images(root, tmp_path):
    painter = Painter()
    for name in "abcd":
        for number in range(3):
            painter.paint(tmp_path / f"{name}/{number}.png")
    grey = Image.fromarray(np.full((5, 5), 40, np.uint8))
    grey.save(tmp_path / "a/grey.png")
    Image.new("CMYK", (5, 5), (0, 255, 255, 0)).save(tmp_path / "b/cmyk.jpg")
    Image.new("RGBA", (5, 5), (10, 20, 30, 0)).save(tmp_path / "c/clear.png")
    data = folder(tmp_path, validation=None, transparency=(255, 255, 255), split_seed=3)
    pool = data.read().splits["train"]
    pool.read_with(data.reading)
    read = {name: pool.source.read(index) for index, name in enumerate(names_of(pool))}
    assert read["a/grey.png"].unique().tolist() == [40]
    assert read["c/clear.png"].unique().tolist() == [255]
    red, green, blue = read["b/cmyk.jpg"].float().mean((1, 2)).tolist()
    assert red > 200 > 100 > max(green, blue)
    content = (tmp_path / "d/0.png").read_bytes()
    (tmp_path / "d/0.png").write_bytes(content[: len(content) // 2])
    found = codes(folder(tmp_path, validation=None))
    assert "d/0.png" in " ".join(found.values())


def test_the_kind_of_target_is_none_of_lists(root):
    with pytest.raises(ConfigError, match="the choices are class, multilabel and regression"):
        ImageListData(train_list="a.txt", target="embedding")


def test_a_query_that_is_listed_twice_asks_once(tmp_path):
    """It found its own file as a neighbour."""
    files = [str(Painter(seed).paint(tmp_path / f"{seed}.png")) for seed in range(2)]
    queries = ListedSplit(FileSource([files[0], *files], str(tmp_path)), torch.tensor([0, 0, 1]))
    gallery = ListedSplit(FileSource(files, str(tmp_path)), torch.tensor([0, 1]))
    joined = ListedRoles.of(queries, gallery)
    assert joined.roles.tolist() == [BOTH, BOTH]
    assert joined.targets.tolist() == [0, 1]
