"""Label lists as people have them: separators, quotes, headers, odd labels, and files that are no lists."""

import json
import os

import pytest

from tests.data.published import Painter
from tests.data.reading import names_of
from vispeft.data import ImageListData, JsonData
from vispeft.data.list_files import read_lines
from vispeft.errors import DataError, VispeftError

NAMES = [f"img/{number}.jpg" for number in range(6)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, painter = tmp_path_factory.mktemp("lists"), Painter()
    for name in (*NAMES, "img/my photo.jpg", "img/a, b.jpg"):
        painter.paint(folder / name)
    return folder


def read(root, text, name="a.txt", reader=ImageListData, **settings):
    """Read a list: label names by image, and the findings that are no facts."""
    (root / name).write_text(text, encoding="utf-8")
    listing = reader(train_list=str(root / name), **settings).read()
    split = listing.splits["train"]
    if listing.target == "class":
        labels = [listing.class_names[index] for index in split.targets.tolist()]
    else:
        labels = split.targets.tolist()
    return dict(zip(names_of(split), labels, strict=True)), {f.code: f for f in listing.findings if f.level != "fact"}


WORDS = dict(zip(NAMES, ("cat", "polar bear", "cat", "dog", "dog", "polar bear"), strict=True))


@pytest.mark.parametrize("separator", ["\t", ",", ", ", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_columns_may_be_separated_in_any_usual_way(root, separator, end):
    labels, found = read(root, end.join(f"{name}{separator}{label}" for name, label in WORDS.items()))
    assert labels == WORDS
    assert not found


@pytest.mark.parametrize("separator", [" ", "\t", ",", ";"])
@pytest.mark.parametrize("mark", ["path", "label", "both"])
def test_paths_and_labels_may_stand_in_quotation_marks(root, separator, mark):
    names = {"img/my photo.jpg": "polar bear", "img/a, b.jpg": "cat", **WORDS}
    if mark != "both":  # an unquoted name with the separator in it belongs to no format
        names = {k: v for k, v in names.items() if separator.strip() != "," or "," not in k}
    if mark != "both" and separator == " ":
        names = {k: v for k, v in names.items() if "bear" not in v} if mark == "path" else names
    path = '"{}"' if mark != "label" else "{}"
    label = '"{}"' if mark != "path" else "{}"
    assert read(root, "\n".join(path.format(n) + separator + label.format(c) for n, c in names.items()))[0] == names


def test_several_columns_are_several_labels(root):
    rows = "\n".join(f"{name},{index % 2},{index % 3 + 1}" for index, name in enumerate(NAMES))
    labels, _ = read(root, rows, "a.csv", target="multilabel")
    assert labels["img/4.jpg"] == [1, 0, 1, 0]
    assert read(root, rows, "a.csv", target="regression")[0]["img/4.jpg"] == [0, 2]
    quoted = "\n".join(f'{name},"1,{index}"' for index, name in enumerate(NAMES))
    assert read(root, quoted, "a.csv", target="regression")[0]["img/4.jpg"] == [1, 4]
    found = read(root, rows, "a.csv")[1]["label-kind"]
    assert (found.level, len(found.places)) == ("error", 6)
    assert "set target: multilabel" in found.text
    # Spreadsheets fill lines up with commas.
    assert read(root, "".join(f"{name},{label},,\n" for name, label in WORDS.items()))[0] == WORDS


@pytest.mark.parametrize("header", ["path,label", "filename,class", "image,label,", "Bild,Klasse"])
def test_a_header_is_left_out_with_a_warning(root, header):
    labels, found = read(root, "\n".join([header, *(f"{name},{label}" for name, label in WORDS.items())]))
    assert labels == WORDS
    assert found["list-header"].line().endswith(f"taken for a header: a.txt:1 ({header}).")
    assert found["list-header"].level == "warning"


def test_a_first_image_is_no_header(root):
    labels, found = read(root, "name.jpg label\n" + "".join(f"{name} 1\n" for name in NAMES))
    assert "name.jpg" in labels
    assert set(found) == {"labels-mixed"}


def test_backslashes_of_windows_are_slashes(root):
    text = "".join("{}\t{}\n".format(name.replace("/", "\\"), label) for name, label in WORDS.items())
    assert read(root, text)[0] == WORDS
    facts = {f.code for f in ImageListData(train_list=str(root / "a.txt")).read().findings}
    assert "backslashes" in facts
    for wrong, code in (
        ("..\\..\\x.jpg", "escaping-path"),
        ("C:\\x.jpg", "absolute-path"),
        ("\\\\pc\\x.jpg", "absolute-path"),
    ):
        assert code in read(root, f"{text}{wrong}\tcat\n")[1]


def test_a_file_whose_name_has_a_backslash_keeps_it(tmp_path):
    Painter().paint(tmp_path / "a\\b.jpg")
    assert list(read(tmp_path, "a\\b.jpg 1\n")[0]) == ["a\\b.jpg"]


def test_labels_in_front_of_paths_are_refused(root):
    for separator in (",", "\t", " "):
        with pytest.raises(
            DataError, match=r"label, or another column, in front of the path, such as 'cat' and 'img/0\.jpg'"
        ):
            read(root, "\n".join(f"{label}{separator}{name}" for name, label in WORDS.items() if "bear" not in label))
    with pytest.raises(DataError, match=r"another column, in front of the path, such as '0' and 'img/0\.jpg'"):
        read(root, "\n".join(f"{number},{name},{WORDS[name]}" for number, name in enumerate(WORDS)))


def test_labels_of_two_words_behind_a_space_are_an_error(root):
    found = read(root, "\n".join(f"{name} {label}" for name, label in WORDS.items()))[1]["list-format"]
    assert found.level == "error"
    assert found.places == ("a.txt:2 (img/1.jpg polar)", "a.txt:6 (img/5.jpg polar)")
    assert "a label of several words stands behind a tab" in found.text


def test_paths_without_endings_are_read_by_the_separator_that_every_line_has(tmp_path):
    for separator in ("\t", " ", ",", ";"):
        path = tmp_path / "a.txt"
        path.write_text("id,label\n" * (separator == ",") + "".join(f"{n:04}{separator}{n % 2}\n" for n in range(4)))
        findings = []
        assert [tuple(entry[:2]) for entry in read_lines(path, findings)] == [(f"{n:04}", str(n % 2)) for n in range(4)]
        assert [finding.code for finding in findings] == ["list-header"] * (separator == ",")


@pytest.mark.parametrize("odd", ["nan", "1e5", "²", "2.0", "½", "+3", "inf"])
def test_a_number_of_another_form_among_whole_numbers_is_an_error(root, odd):
    labels, found = read(root, "".join(f"{name} {odd if n == 4 else n % 2}\n" for n, name in enumerate(NAMES)))
    assert set(labels.values()) == {"0", "1"}
    assert found["label-kind"].level == "error"
    assert found["label-kind"].places == (f"a.txt:5 ({odd})",)


def test_words_among_numbers_and_numbers_among_words_are_a_warning(root):
    found = read(root, "".join(f"{name} {'cat' if n == 4 else n % 2}\n" for n, name in enumerate(NAMES)))[1]
    assert found["labels-mixed"].places == ("cat (1 image)",)
    found = read(root, "".join(f"{name} {'nan' if n == 4 else 'ab'[n % 2]}\n" for n, name in enumerate(NAMES)))[1]
    assert found["labels-mixed"].places == ("nan (1 image)",)
    assert found["labels-mixed"].level == "warning"
    found = read(root, "".join(f"{name} {n / 2 + 0.25}\n" for n, name in enumerate(NAMES)))[1]
    assert "set target: regression" in found["numbers-as-classes"].text
    # Names that are given say which words are right.
    text = "".join(f"{name} {'cat' if n == 4 else n % 2}\n" for n, name in enumerate(NAMES))
    assert not read(root, text, names=["dog", "cat"])[1]


@pytest.mark.parametrize("reader", [ImageListData, JsonData])
def test_numbers_of_ten_thousand_digits_are_found(root, reader):
    long = "9" * 10_000
    if reader is JsonData:
        pairs = ", ".join(f'"{name}": {long if n == 4 else n % 2}' for n, name in enumerate(NAMES))
        text = f"{{{pairs}}}"
    else:
        text = "".join(f"{name} {long if n == 4 else n % 2}\n" for n, name in enumerate(NAMES))
    labels, found = read(root, text, "a.json", reader)
    assert len(labels) == 5
    assert found[
        "label-range"
    ].line() == f"1 image with a label of more than 18 digits: a.json{' ' * (reader is JsonData)}" + (
        "img/4.jpg." if reader is JsonData else ":5."
    )


@pytest.mark.parametrize(("text", "message"), [("[" * 100_000, "nested too deeply"), ('{"a":' * 100_000, "nested too")])
def test_deep_json_is_refused(root, text, message):
    with pytest.raises(DataError, match=message):
        read(root, text, "deep.json", JsonData)


def test_what_is_no_file_is_no_list(root, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", tmp_path, "/dev/zero", "a\0b", "x" * 300, "\ud800"):
        for reader in (ImageListData, JsonData):
            with pytest.raises(VispeftError, match="could not be read"):
                reader(train_list=str(path), root=str(root)).read()


def test_a_pipe_in_a_list_is_a_broken_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    Painter().paint(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a.jpg 0\npipe.jpg 1\nfolder.jpg 1\n")
    data = ImageListData(train_list=str(tmp_path / "a.txt"), validation_list=str(tmp_path / "a.txt"))
    found = next(f for f in data.report().of("error") if f.code == "broken-image")
    assert "pipe.jpg (no regular file), folder.jpg (no regular file)" in found.line()


def test_lists_in_other_encodings_are_refused(root):
    (root / "a.txt").write_text("img/0.jpg 1\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"no text in UTF-8 .UTF-16.. Save it as UTF-8"):
        ImageListData(train_list=str(root / "a.txt")).read()


def test_one_file_has_one_name_however_it_is_written(root):
    text = "img/0.jpg 0\n./img/0.jpg 0\nimg//0.jpg 0\nimg/./0.jpg 0\nimg/1.jpg 1\n"
    data = ImageListData(train_list=str(root / "a.txt"), validation=0.3, test=0.3)
    (root / "a.txt").write_text(text)
    assert names_of(data.read().splits["train"])[:4] == ["img/0.jpg"] * 4


def test_line_separators_of_unicode_belong_to_the_path(tmp_path):
    Painter().paint(tmp_path / "a\u2028b\x85.jpg")
    assert list(read(tmp_path, "a\u2028b\x85.jpg 1\n")[0]) == ["a\u2028b\x85.jpg"]


def test_json_has_lists_for_several_labels_alone(root):
    found = read(root, json.dumps({name: ["cat", "dog"] for name in NAMES}), "a.json", JsonData)[1]["label-kind"]
    assert "set target: multilabel" in found.text
