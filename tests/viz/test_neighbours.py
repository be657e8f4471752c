import numpy as np
import pytest
import torch
from PIL import Image

from vispeft.errors import ConfigError, DataError
from vispeft.metrics import make_similarity
from vispeft.tasks.metric_pictures import Retrieved, neighbour_rows
from vispeft.viz import Neighbour, NeighbourRow, draw_neighbours, embedding_plot, neighbours, projection


def image(value, size=(20, 30)):
    return torch.full((3, *size), value, dtype=torch.uint8)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def has(path, colour):
    return (np.abs(pixels(path).astype(int) - colour).max(1) < 3).any()


GREEN, RED = (0, 158, 115), (213, 94, 0)


def test_right_and_wrong_neighbours_are_framed_and_unknown_ones_are_not(tmp_path):
    def draw(*right):
        found = [Neighbour(image=image(120, (30, 20)), score=0.5, right=value) for value in right]
        rows = [NeighbourRow(image=image(200), title="a $query_", neighbours=found)]
        rows.append(NeighbourRow(image=image(200), title="", neighbours=found[:1]))
        return draw_neighbours(rows, tmp_path / "drawn.png")

    assert has(draw(True, True), GREEN)
    assert not has(draw(True, True), RED)
    assert has(draw(False, None), RED)
    assert not has(draw(None, None), GREEN)
    with pytest.raises(DataError, match="no query"):
        draw_neighbours([], tmp_path / "none.png")


def test_wrong_neighbours_are_named(tmp_path, monkeypatch):
    found = [
        Neighbour(image=image(120), score=0.9, right=True, title="mug"),
        Neighbour(image=image(120), score=0.8, right=False, title="a $cup_ whose name is longer than its picture"),
        Neighbour(image=image(120), score=0.7, right=None, title="bowl"),
        Neighbour(image=image(120), score=0.6, right=False),
    ]
    figures = []
    monkeypatch.setattr(neighbours, "save", lambda figure, path: figures.append(figure))
    draw_neighbours([NeighbourRow(image=image(200), title="mug", neighbours=found)], tmp_path / "a.png")
    titles = [place.get_title() for place in figures[0].axes]
    assert titles == ["mug", "0.900", "0.800\na $cup_ w… picture", "0.700\nbowl", "0.600"]


@pytest.mark.parametrize("names", [None, ["cup", "mug"]])
def test_rows_of_a_split_name_the_class_of_each_neighbour(names):
    vectors, labels = torch.tensor([[1.0, 0], [0.8, 0.6], [0.9, 0.4]]), torch.tensor([0, 1, 0])
    found = Retrieved(vectors, labels, torch.zeros(3, dtype=torch.long), make_similarity("cosine"))
    first, *_ = neighbour_rows(found, lambda index: image(index), names)
    zero, one = ("0", "1") if names is None else names
    assert first.title == zero
    assert [(n.title, n.right) for n in first.neighbours] == [(zero, True), (one, False)]


@pytest.mark.parametrize(("method", "most"), [("pca", 30), ("tsne", 2000)])
def test_embeddings_are_drawn_in_two_dimensions(tmp_path, monkeypatch, method, most):
    monkeypatch.setattr(projection, "_MOST_POINTS", most)
    labels = torch.arange(40) % 4 + 7
    embeddings = torch.eye(4)[labels % 4] + 0.05 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    path = embedding_plot(embeddings, labels, tmp_path / "points.png", method=method)
    for colour in ((31, 119, 180), (174, 199, 232), (255, 127, 14), (255, 187, 120)):  # the first four of tab20
        assert has(path, colour)


def test_embeddings_that_cannot_be_drawn_are_refused(tmp_path):
    rows, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.long)
    for arguments, error in (
        ((rows[:2], labels[:2]), DataError),
        ((rows, labels[:3]), DataError),
        ((rows / 0, labels), DataError),
    ):
        with pytest.raises(error):
            embedding_plot(*arguments, tmp_path / "a.png")
    with pytest.raises(ConfigError):
        embedding_plot(rows, labels, tmp_path / "a.png", method="umap")
    assert not list(tmp_path.iterdir())
    assert embedding_plot(rows[:, :1], labels, tmp_path / "a.png", names=["only"]).exists()
