"""Published sets for metric learning, read from small folders in their layouts."""

import pytest

from tests.data import published_metric as made
from tests.data.published import Painter
from tests.data.reading import names_of, ready
from tests.fresh import ROOT
from vispeft.building.config_files import read_config
from vispeft.cli.config import build_data
from vispeft.data import (
    CarsMetricData,
    CUBMetricData,
    INaturalistMetricData,
    InShopMetricData,
    SOPMetricData,
)
from vispeft.errors import ConfigError, DataError

# Written down once more, from the description of the protocol.
COUNTS = {
    CUBMetricData: {"train": (5864, 100), "test": (5924, 100)},
    CarsMetricData: {"train": (8054, 98), "test": (8131, 98)},
    SOPMetricData: {"train": (59551, 11318), "test": (60502, 11316)},
    InShopMetricData: {"train": (25882, 3997), "query": (14218, 3985), "gallery": (12612, 3985)},
    INaturalistMetricData: {"train": (325846, 5690), "test": (136093, 2452)},
}
SMALL = {"published": False, "batch_size": 4, "images_per_class": 2}
CARS = ["AM General SUV", "Acura RL", "BMW M3", "Bentley GT-V8"]
BIRDS = ["001.Albatross", "002.Auklet", "010.Bunting", "100.Cardinal"]
LAYOUTS = {
    "cub lists": (CUBMetricData, made.make_cub, True, BIRDS),
    "cub folders": (CUBMetricData, made.make_cub, False, BIRDS),
    "cars mat": (CarsMetricData, made.make_cars, "mat", CARS),
    "cars folders": (CarsMetricData, made.make_cars, "folders", CARS),
    "cars csv": (CarsMetricData, made.make_cars, "csv", CARS),
    "products": (SOPMetricData, made.make_products, False, ["1", "2", "11319", "11320"]),
    "products apart": (SOPMetricData, made.make_products, True, ["1", "2", "11319", "11320"]),
    "in-shop": (InShopMetricData, made.make_inshop, True, ["1", "7", "3", "9"]),
    "in-shop plain": (InShopMetricData, made.make_inshop, False, ["1", "7", "3", "9"]),
    "inaturalist": (
        INaturalistMetricData,
        made.make_inaturalist,
        False,
        ["Aves/7", "Birds/12", "Aves/9", "Plantae/12"],
    ),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    place, painter = tmp_path_factory.mktemp("published"), Painter()
    return {name: make(place / name, painter, kind) for name, (_, make, kind, _) in LAYOUTS.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(roots, name):
    reader, _, _, classes = LAYOUTS[name]
    data = ready(reader(root=str(roots[name]), **SMALL))
    assert list(data.label_names) == classes
    assert data.num_classes == 2
    splits = data.listing.splits
    assert {split: set(found.targets.tolist()) for split, found in splits.items()} == {
        "train": {0, 1},
        "validation": {2, 3},
        "test": {2, 3},
    }
    for split in ("train", "test"):
        parts = [image.split("/") for image in names_of(splits[split])]
        labels = splits[split].targets.tolist()
        if name in ("cub lists", "cub folders", "cars folders", "cars csv"):  # a folder has the name of its class
            assert [part[-2] for part in parts] == [classes[label] for label in labels]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    assert not data.validation_chooses


@pytest.mark.parametrize("reader", COUNTS)
def test_published_sizes_are_asserted(roots, reader):
    assert reader.counts == COUNTS[reader]
    name = next(name for name, found in LAYOUTS.items() if found[0] is reader)
    with pytest.raises(DataError, match="give all of them, or set published: false") as error:
        ready(reader(root=str(roots[name]), **{**SMALL, "published": True}))
    images, classes = COUNTS[reader]["train"]
    assert f"{images:,} images of {classes:,} classes in train as published, and here are 6 of 2" in str(error.value)
    assert str(error.value).count("as published") == len(COUNTS[reader])


def test_cars_have_the_images_of_their_classes(roots):
    """Image `n` is of class `n` modulo four, in every layout."""
    for name in ("cars mat", "cars folders", "cars csv"):
        data = CarsMetricData(root=str(roots[name]), **SMALL)
        for split in data.listing.splits.values():
            numbers = [int(image.split("/")[-1][:6]) for image in names_of(split)]
            assert [number % 4 for number in numbers] == split.targets.tolist()


def test_folders_of_cars_in_another_order_than_the_classes_are_refused(tmp_path):
    made.make_cars(tmp_path, Painter(), "folders")
    made.write_mat(tmp_path, [("1.jpg", 1, "train")])
    assert CarsMetricData(root=str(tmp_path), **SMALL).listing.class_names == tuple(CARS)
    made.write_mat(tmp_path, [("1.jpg", 1, "train")], [CARS[1], CARS[0], *CARS[2:]])
    with pytest.raises(DataError, match=r"Folder 1 of .* is 'AM General SUV', and class 1 in cars_annos.mat is 'Acura"):
        CarsMetricData(root=str(tmp_path), **SMALL).read()


def test_in_shop_has_one_table_of_classes_for_queries_and_gallery(roots):
    """The items come in another order among the queries than in the gallery."""
    data = ready(InShopMetricData(root=str(roots["in-shop"]), **SMALL))
    test = data.listing.splits["test"]
    items = [int(name.split("/id_")[1][:8]) for name in names_of(test)]
    assert [int(data.label_names[label]) for label in test.targets.tolist()] == items == [9, 3, 9, 3]
    assert test.roles.tolist() == [1, 1, 2, 2]


def test_species_may_come_from_the_tables(tmp_path):
    root = made.make_inaturalist(tmp_path, Painter(), True)
    data = ready(INaturalistMetricData(root=str(root), classes="json", **SMALL))
    assert data.label_names == ("50", "51", "52", "53")
    for content in ("[1]", 100_000 * "["):
        (root / "val2018.json").write_text(content)
        with pytest.raises(DataError, match=r"val2018\.json is no table as published"):
            INaturalistMetricData(root=str(root), classes="json", **SMALL).read()
    with pytest.raises(ConfigError, match="folders and json"):
        INaturalistMetricData(root=str(root), classes="names", **SMALL)


@pytest.mark.parametrize("reader", COUNTS)
def test_a_folder_without_any_layout_is_refused(tmp_path, reader):
    with pytest.raises(DataError, match="needs"):
        reader(root=str(tmp_path / "nothing"), **SMALL).read()


def test_damaged_lists_are_named(tmp_path):
    root = made.make_products(tmp_path / "products", Painter(), False)
    place = root / "Stanford_Online_Products/Ebay_train.txt"
    place.write_text(place.read_text() + "99 3\n")
    with pytest.raises(DataError, match=r"Ebay_train\.txt:8 has 2 columns, and the published table has 4"):
        SOPMetricData(root=str(root), **SMALL).read()
    root = made.make_inshop(tmp_path / "inshop", Painter(), False)
    made.write(root / "list_eval_partition.txt", "1", "header", "img/1.jpg id_1 valid")
    with pytest.raises(DataError, match="splits are train, query, gallery"):
        InShopMetricData(root=str(root), **SMALL).read()
    root = made.make_cub(tmp_path / "cub", Painter(), True)
    made.write(root / "CUB_200_2011/image_class_labels.txt", "1 1")
    with pytest.raises(DataError, match=r"no class for the image of images\.txt:2"):
        CUBMetricData(root=str(root), **SMALL).read()
    made.write(tmp_path / "cars/cars_annos.mat", "nothing")
    (tmp_path / "cars/car_ims").mkdir()
    with pytest.raises(DataError, match=r"cars_annos\.mat cannot be read"):
        CarsMetricData(root=str(tmp_path / "cars"), **SMALL).read()
    root = made.make_cars(tmp_path / "csv", Painter(), "csv")
    made.write(root / "anno_test.csv", "1.jpg,1,2,3,4,9")
    with pytest.raises(DataError, match="has no class from 1 to 4"):
        CarsMetricData(root=str(root), **SMALL).read()
    made.write(tmp_path / "inat/Inaturalist_train_set1.txt", "1.jpg")
    made.write(tmp_path / "inat/Inaturalist_test_set1.txt", "1.jpg")
    with pytest.raises(DataError, match="needs two folders above it"):
        INaturalistMetricData(root=str(tmp_path / "inat"), **SMALL).read()


@pytest.mark.parametrize(
    ("labels", "images", "told"),
    [
        (["1 x", "2 2"], ["1 001.A/1.jpg", "2 002.B/1.jpg"], r"image_class_labels.txt:1 has no number .* but 'x'"),
        (
            ["1 1", "2 2", "1 2"],
            ["1 001.A/1.jpg", "2 002.B/1.jpg"],
            r"image 1 twice, at image_class_labels.txt:1 and",
        ),
        (["1 1", "2 2"], ["1 001.A/1.jpg", "1 002.B/1.jpg"], r"the image 1 twice, at images.txt:1 and images.txt:2"),
        (["1 1", "2 2"], ["1 001.A/1.jpg"], r"images.txt has no image 2, which image_class_labels.txt:2 names"),
    ],
)
def test_lists_of_cub_that_do_not_belong_together_are_refused(tmp_path, labels, images, told):
    place = tmp_path / "CUB_200_2011"
    made.write(place / "image_class_labels.txt", *labels)
    made.write(place / "images.txt", *images)
    (place / "images").mkdir()
    with pytest.raises(DataError, match=told):
        CUBMetricData(root=str(tmp_path), **SMALL).read()


def test_validation_classes_follow_the_order_where_the_test_classes_do(roots):
    data = CUBMetricData(root=str(roots["cub lists"]), **{**SMALL, "validation": 0.5})
    validation = data.listing.splits["validation"].targets
    assert {data.label_names[label] for label in validation.tolist()} == {"002.Auklet"}
    assert data.validation_chooses


def test_equal_images_in_train_and_test_of_a_published_set_are_a_warning(tmp_path):
    root = made.make_cub(tmp_path, Painter(), True)
    folders = root / "CUB_200_2011/images"
    (folders / "100.Cardinal/1.jpg").write_bytes((folders / "001.Albatross/1.jpg").read_bytes())
    data = ready(CUBMetricData(root=str(root), **SMALL))
    assert "splits-overlap" in {finding.code for finding in data.report().of("warning")}


def test_too_few_images_for_a_batch(roots):
    """Published classes may be smaller than their share of a batch, and give some images twice."""
    data = CUBMetricData(root=str(roots["cub lists"]), **{**SMALL, "batch_size": 8, "images_per_class": 4})
    assert "few-images" in {finding.code for finding in data.report().of("warning")}
    with pytest.raises(ConfigError, match="there are 6 training images, fewer than a batch"):
        ready(data)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/metric_learning").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_open_with_their_command_and_name_data_that_can_be_made(path):
    assert path.read_text().startswith(f"# vispeft train metric_learning/{path.stem}\n")
    tree = read_config(path)
    data = build_data(tree["data"], [], path.name)
    assert data.target == "embedding"
    assert tree["model"]["class_path"] == "vispeft.tasks.MetricLearning"
    assert data.validation_chooses == (type(data) not in COUNTS)  # published results are those of the last epoch
