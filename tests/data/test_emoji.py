"""The emoji set, made from small archives in the layout of its three packages."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests.data.reading import names_of, ready
from vispeft.data import EmojiData
from vispeft.errors import DataError

CODES = ["2600-FE0F", "1F600", "1F601", "1F602", "0023-FE0F-20E3", "2B50"]
EXTRA = {"1F1E9-1F1EA": "Flags", "1F3FB": "Component", "1FAE8": "Symbols"}
ARCHIVES = {
    "emoji-datasource-google-16.0.0.tgz": "package/img/google/64/{}.png",
    "emoji-datasource-twitter-16.0.0.tgz": "package/img/twitter/64/{}.png",
    "lobehub-fluent-emoji-3d-1.1.0.tgz": "package/assets/{}.webp",
}


def drawing(number, ending):
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[:3] = [number, 2 * number, 3 * number, 255]  # the lower half is transparent black
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, ending, lossless=True)
    return content.getvalue()


def pack(root, codes=None, lacking="1FAE8"):
    """Write the three archives; the last vendor has no drawing of one character."""
    categories = {**dict.fromkeys(codes or CODES, "Objects"), **EXTRA}
    table = [
        {"unified": code, "image": f"{code.lower()}.png", "name": f"NAME OF {code}", "category": category}
        for code, category in categories.items()
    ]
    for vendor, (archive, inside) in enumerate(ARCHIVES.items()):
        with tarfile.open(root / archive, "w:gz") as packed:
            files = {"package/emoji.json": json.dumps(table).encode()} if vendor < 2 else {}
            for number, code in enumerate(categories):
                if vendor < 2 or code != lacking:
                    name = inside.format(code.lower())
                    files[name] = drawing(1 + 5 * number + vendor, "WEBP" if name.endswith("webp") else "PNG")
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                packed.addfile(entry, io.BytesIO(content))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("npm"))


def opened(root, **settings):
    return EmojiData(**{"root": str(root), "batch_size": 4, "published": False, "validation": None, **settings})


def test_characters_of_all_vendors_are_classes_in_the_order_of_their_code_points(root):
    data = ready(opened(root))
    order = ["0023-FE0F-20E3", "2600-FE0F", "2B50", "1F600", "1F601", "1F602"]
    assert data.label_names == tuple(f"{code} name of {code.lower()}" for code in order)
    assert data.num_classes == 3
    for split, codes in (("train", order[:3]), ("test", order[3:])):
        wanted = [f"{code}/{vendor}.png" for code in codes for vendor in ("fluent", "google", "twitter")]
        listed = data.listing.splits[split]
        found = sorted(zip(listed.targets.tolist(), names_of(listed), strict=True))
        assert [name for _, name in found] == wanted
    assert {role for _, _, roles in data.test_dataloader() for role in roles.tolist()} == {0}


def test_drawings_lie_on_white_and_are_made_once(root):
    data = opened(root)
    source = data.listing.splits["test"].source
    image = source.read(names_of(data.listing.splits["test"]).index("1F601/google.png"))
    assert image[:, 0, 0].tolist() == [11, 22, 33]
    assert image[:, 5, 5].tolist() == [255, 255, 255]
    changed = (data.folder / "1F601/google.png").stat().st_mtime_ns
    assert opened(root).folder == data.folder
    assert (data.folder / "1F601/google.png").stat().st_mtime_ns == changed


def test_validation_classes_are_the_last_training_classes(root):
    data = opened(root, validation=0.4)
    validation = data.listing.splits["validation"]
    assert {data.label_names[label] for label in validation.targets.tolist()} == {"2B50 name of 2b50"}
    assert data.validation_chooses


def test_training_images_are_cropped_and_never_mirrored(root):
    data = opened(root)
    assert (data.augment.crop, data.augment.flip) == ("resized", 0)
    assert "crop_pct" not in data._given  # evaluation sees the whole drawing


def test_a_part_of_the_set_is_refused_unless_asked_for(root):
    with pytest.raises(DataError, match=r"2,397 images of 799 classes in train as published, and here are 9 of 3"):
        ready(opened(root, published=True))


def test_missing_and_damaged_archives_are_named(root, tmp_path):
    with pytest.raises(DataError, match=r"npm pack --pack-destination .* emoji-datasource-google@16\.0\.0"):
        opened(tmp_path).read()
    pack(tmp_path)
    archive = tmp_path / "lobehub-fluent-emoji-3d-1.1.0.tgz"
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(DataError, match=r"fluent-emoji-3d-1\.1\.0\.tgz cannot be read"):
        opened(tmp_path).read()


def test_a_table_cannot_lead_out_of_the_folder(tmp_path):
    pack(tmp_path, [*CODES, "../1F700"])
    with pytest.raises(DataError, match=r"has '\.\./1F700' in place of code points"):
        opened(tmp_path).read()
