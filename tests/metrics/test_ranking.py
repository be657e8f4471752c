import pytest
import torch

from vispeft.errors import ConfigError, DataError
from vispeft.metrics import Cosine, Hyperbolic, Similarity, make_similarity, nearest, ranking
from vispeft.metrics.ranking import exact_copies, first_in_order


def test_first_columns_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(9, (40, 30), generator=generator).float()
    scores[20:] += torch.rand(20, 30, generator=generator)  # rows without ties
    wanted = scores.sort(dim=1, descending=True, stable=True).indices
    for count in (1, 4, 29, 30):
        assert torch.equal(first_in_order(scores, count), wanted[:, :count])


def test_copies_are_found():
    rows = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    rows[[7, 9, 15]], rows[12] = rows[3].clone(), rows[11]
    rows[18], rows[19] = 0.0, -0.0
    copies, firsts = exact_copies(rows)
    assert dict(zip(copies.tolist(), firsts.tolist(), strict=True)) == {7: 3, 9: 3, 15: 3, 12: 11, 19: 18}
    assert len(exact_copies(torch.eye(5))[0]) == 0


def test_copies_are_told_from_rows_that_differ_in_one_column():
    rows = torch.zeros(60, 40)
    rows[:40] += torch.eye(40)
    rows[40:] = rows[:20]
    copies, firsts = exact_copies(rows[torch.arange(59, -1, -1)])
    assert copies.sort().values.tolist() == list(range(40, 60))
    assert torch.equal(copies - firsts, torch.full((20,), 40))


def test_neighbours_leave_the_query_out_and_do_not_depend_on_blocks(monkeypatch):
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    rows[20:25] = rows[3].clone()
    own = torch.arange(50)
    _, indices = nearest(rows, rows, 8, own=own)
    assert not (indices == own[:, None]).any()
    assert indices[3, :5].tolist() == [20, 21, 22, 23, 24]
    assert indices[22, :5].tolist() == [3, 20, 21, 23, 24]
    monkeypatch.setattr(ranking, "BLOCK", 1000)
    assert torch.equal(nearest(rows, rows, 8, own=own)[1], indices)
    assert nearest(rows[:2], rows[:3], 8)[0].shape == (2, 3)


def test_hyperbolic_distance_equals_the_formula():
    x, y = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double) * 3
    similarity = Hyperbolic(curvature=0.3, clip=1.5)
    x, y = (similarity.prepare(side.float()).double() for side in (x, y))
    found = -similarity.scores(x.float(), y.float())
    for i, a in enumerate(x):
        for j, b in enumerate(y):  # the Moebius sum of -a and b (Ganea et al., 2018)
            c, ab, aa, bb = 0.3, -(a @ b), a @ a, b @ b
            total = ((1 + 2 * c * ab + c * bb) * -a + (1 - c * aa) * b) / (1 + 2 * c * ab + c**2 * aa * bb)
            wanted = 2 / c**0.5 * torch.atanh(c**0.5 * total.norm())
            assert found[i, j].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_similarities_are_written_and_read_as_plain_values():
    for given in ("cosine", "dot", Hyperbolic(curvature=0.2)):
        similarity = make_similarity(given)
        assert make_similarity(similarity.to_dict()).to_dict() == similarity.to_dict()
    assert make_similarity({"name": "hyperbolic", "clip": 1.0}) == Hyperbolic(clip=1.0)
    for wrong in (
        "euclid",
        {"clip": 1},
        {"name": "cosine", "clip": 1},
        3,
        {"name": "hyperbolic", "curvature": -1},
        {"name": []},
        None,
    ):
        with pytest.raises(ConfigError):
            make_similarity(wrong)


class Manhattan(Similarity):
    """The negative sum of absolute differences, a similarity of one's own."""

    name = "manhattan"

    def scores(self, queries, gallery):
        return -torch.cdist(queries, gallery, p=1)


class Namesake(Manhattan):
    """One that takes the name of ours."""

    name = "cosine"


def test_a_similarity_of_ones_own_is_read_back_by_its_name():
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    found = nearest(rows, rows, 3, make_similarity(Manhattan().to_dict()))[1]
    assert torch.equal(found, (rows[:, None] - rows).abs().sum(2).argsort(1)[:, :3])
    assert type(make_similarity("cosine")) is Cosine


def test_what_no_neighbours_can_be_found_for_is_refused():
    rows = torch.eye(4)
    for count in (0, -1):
        with pytest.raises(ConfigError, match=f"count={count}"):
            nearest(rows, rows, count)
    for own in (torch.arange(3), torch.full((4,), 4), torch.full((4,), -2), torch.zeros(4), torch.eye(4).bool()[0]):
        with pytest.raises(DataError, match="4 indices of a gallery of 4"):
            nearest(rows, rows, 2, own=own)
    assert nearest(rows, rows, 2, own=torch.full((4,), -1))[1][:, 0].tolist() == [0, 1, 2, 3]
