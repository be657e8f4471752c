"""Losses and miners of metric learning by name, and the criterion made of them."""

import copy
import logging
import math
import pickle

import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from torch import nn

from vispeft.building.known import register_class
from vispeft.errors import ConfigError, DataError, UnknownNameError
from vispeft.losses import Hist, Hyperbolic, MetricLoss, RecallAtK
from vispeft.tasks.metric_criterion import MetricCriterion
from vispeft.tasks.metric_losses import (
    AGEING,
    BOUNDED,
    list_metric_losses,
    list_miners,
    loss_node,
    metric_loss,
    metric_miner,
    miner_node,
)

CLASSES, DIM = 4, 8
NEEDED = {
    "HistogramLoss": {"n_bins": 10},
    "MultipleLosses": {
        "losses": ["ContrastiveLoss", {"class_path": "ProxyAnchorLoss", "init_args": {"margin": 0.2}}],
        "miners": ["PairMarginMiner", None],
        "weights": [1.0, 0.5],
    },
    "RankedListLoss": {"margin": 0.4, "Tn": 10},
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def batch(scale=3.0, requires_grad=True):
    noise = torch.randn(16, DIM, generator=torch.Generator().manual_seed(0)) * scale
    return noise.requires_grad_(requires_grad), torch.arange(CLASSES).repeat_interleave(4)


def criterion(name, miner=None, memory=0, **arguments):
    torch.manual_seed(0)
    loss = metric_loss(name, CLASSES, DIM, **{**NEEDED.get(name, {}), **arguments})
    return MetricCriterion(loss, None if miner is None else metric_miner(miner), memory, DIM)


def test_every_loss_trains_in_two_steps_and_its_state_is_all_in_the_state_dict():
    names = list_metric_losses()
    assert len(names) >= 34 + 3
    for name in names:
        first, second = criterion(name), criterion(name)
        first.check(CLASSES, DIM)
        for number in range(2):
            embeddings, labels = batch(1.0 + number)
            found = first(embeddings, labels)
            found.backward()
            assert found.dtype == torch.float32
            assert embeddings.grad.isfinite().all(), name
            assert embeddings.grad.any(), name
        second.load_state_dict(first.state_dict())
        again = [one(*batch()).detach() for one in (first, second)]
        assert torch.equal(*again), f"{name} has state that its state dict lacks"


def test_every_miner_chooses_for_a_loss_of_pairs_or_triplets():
    names = list_miners()
    assert len(names) == 9
    for name in names:
        made = criterion("ContrastiveLoss", miner=name)
        made.check(CLASSES, DIM)
        assert made(*batch()).isfinite()


def test_a_loss_runs_in_float32_under_autocast_and_its_proxies_stay_what_they_are():
    made = criterion("ProxyAnchorLoss")
    embeddings, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = made(embeddings.bfloat16(), labels)
    found.backward()
    assert found.dtype == made.loss.proxies.dtype == made.loss.proxies.grad.dtype == torch.float32


def test_embeddings_have_length_one_except_where_the_length_has_a_meaning():
    for name, keeps in (("AngularLoss", False), ("SphereFaceLoss", True), ("Hist", True)):
        made = criterion(name)
        (near, labels), (far, _) = batch(1.0), batch(3.0)
        assert made.raw == keeps
        assert torch.allclose(made(near, labels), made(far, labels)) != keeps
    made = criterion("ContrastiveLoss", embedding_regularizer="LpRegularizer")
    assert made.raw
    assert made(*batch(3.0)) > made(*batch(1.0))


def test_nested_objects_are_made_and_written_out():
    node = loss_node(
        {
            "class_path": "TripletMarginLoss",
            "init_args": {
                "margin": 0.1,
                "distance": {"class_path": "LpDistance", "init_args": {"p": 1}},
                "reducer": "MeanReducer",
            },
        }
    )
    library = "pytorch_metric_learning"
    assert node == {
        "name": f"{library}.losses.TripletMarginLoss",
        "init_args": {
            "margin": 0.1,
            "distance": {"name": f"{library}.distances.LpDistance", "init_args": {"p": 1}},
            "reducer": {"name": f"{library}.reducers.MeanReducer", "init_args": {}},
        },
    }
    assert loss_node(node) == node
    made = metric_loss(node, CLASSES, DIM)
    assert (made.margin, made.distance.p) == (0.1, 1)
    assert loss_node("vispeft.losses.Hist") == loss_node("Hist") == {"name": "vispeft.losses.Hist", "init_args": {}}
    assert miner_node(None) is None
    centres = metric_loss(
        "SoftTripleLoss",
        CLASSES,
        DIM,
        centers_per_class=2,
        weight_regularizer={"class_path": "SparseCentersRegularizer", "init_args": {"centers_per_class": 2}},
    )
    assert centres(*batch()).isfinite()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ManifoldLoss", "in place of labels"),
        ("VICRegLoss", "two views"),
        ("SelfSupervisedLoss", "two views"),
        ("CrossBatchMemory", "set memory"),
        ("GenericPairLoss", "base class"),
        ("ProxyAnchor", "ProxyAnchorLoss"),
        ("os.system", "Unknown loss"),
        ({"class_path": "ProxyAnchorLoss", "init_args": {"num_classes": 3}}, "decided by the data"),
        ({"class_path": "Hist", "init_args": {"embedding_size": 3}}, "decided by the data"),
        ({"class_path": "ProxyAnchorLoss", "init_args": {"margn": 3}}, "Did you mean 'margin'"),
        ({"class_path": "ProxyAnchorLoss", "init_args": {"weight_init_func": "x"}}, "is a function"),
        ({"class_path": "ContrastiveLoss", "init_args": {"distance": "MeanReducer"}}, "Unknown distance"),
        ({"class_path": "ContrastiveLoss", "init_args": {"reducer": "DoNothingReducer"}}, "no number"),
        ({"class_path": "ContrastiveLoss", "init_args": {"pos_margin": {"class_path": "os.system"}}}, "class_path"),
        ({"class_path": "ContrastiveLoss", "args": {}}, "loss.init_args"),
        ({"init_args": {}}, "give a name"),
    ],
)
def test_what_is_refused_by_name(given, told):
    with pytest.raises((ConfigError, UnknownNameError), match=told):
        loss_node(given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("ProxyAnchorLos", "Unknown loss 'ProxyAnchorLos'. Did you mean 'ProxyAnchorLoss'"),
        ("proxyanchorloss", "Unknown loss 'proxyanchorloss'. Did you mean 'ProxyAnchorLoss'?"),
        ("RecalAtK", "Unknown loss 'RecalAtK'. Did you mean 'RecallAtK'?"),
        ("pytorch_metric_learning.losses.ArcFaceLos", "Did you mean 'pytorch_metric_learning.losses.ArcFaceLoss'"),
        ("vispeft.losses.Hst", "Did you mean 'vispeft.losses.Hist'"),
    ],
)
def test_a_misspelt_loss_is_answered_by_near_names_alone(given, told):
    with pytest.raises(UnknownNameError) as refused:
        loss_node(given)
    assert str(refused.value).startswith("Unknown loss")
    assert told in str(refused.value)
    assert str(refused.value).endswith("?")


def test_parts_that_do_not_fit_together_are_refused_before_the_first_step():
    with pytest.raises(ConfigError, match=r"InstanceLoss with the miner PairMarginMiner cannot be computed"):
        criterion("InstanceLoss", miner="PairMarginMiner").check(CLASSES, DIM)
    with pytest.raises(ConfigError, match="NTXentLoss is nan for a batch of noise"):
        criterion("NTXentLoss", temperature=0).check(CLASSES, DIM)
    with pytest.raises(ConfigError, match="ProxyNCALoss cannot compare a batch with another one"):
        criterion("ProxyNCALoss", memory=24)
    with pytest.raises(ConfigError, match=r"RankedListLoss\(\) cannot be made"):
        metric_loss("RankedListLoss", CLASSES, DIM)
    with pytest.raises(ConfigError, match="Hist\\(tau=0\\)"):
        metric_loss("Hist", CLASSES, DIM, tau=0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("RecallAtK", {"ks": [1.5]}),
        ("RecallAtK", {"ks": [True]}),
        ("RecallAtK", {"similarity_temperature": math.nan}),
        ("RecallAtK", {"rank_temperature": math.inf}),
        ("Hyperbolic", {"curvature": math.nan}),
        ("Hyperbolic", {"curvature": 0, "clip": -1.0}),
        ("Hyperbolic", {"temperature": math.nan}),
        ("Hist", {"tau": math.nan}),
        ("Hist", {"alpha": math.inf}),
        ("Hist", {"network_weight": -1.0}),
    ],
)
def test_numbers_out_of_range_are_refused(name, arguments):
    with pytest.raises(ConfigError, match=rf"^{name}\({list(arguments)[-1]}=.*needed[^.]*\.$|such as \[1, 2, 4\]\.$"):
        metric_loss(name, CLASSES, DIM, **arguments)


def test_a_sum_of_losses_has_the_needs_of_each():
    made = criterion("MultipleLosses", losses=["Hist", "RecallAtK"], miners=None, weights=None)
    assert made.least_per_class == 2
    assert set(made.proxy_tensors) == {"loss.losses.0.means", "loss.losses.0.log_vars"}
    assert criterion("Hist").proxy_tensors == ("loss.means", "loss.log_vars")
    assert criterion("ProxyAnchorLoss").proxy_tensors == ("loss.proxies",)
    curved = {"name": "Hyperbolic", "init_args": {"curvature": 0.2}}
    made = criterion("MultipleLosses", losses=[curved, {**curved}], miners=None, weights=None)
    assert made.similarity == {"name": "hyperbolic", "curvature": 0.2, "clip": 2.3}
    with pytest.raises(ConfigError, match="Hyperbolic by hyperbolic, TripletMarginLoss by cosine"):
        criterion("MultipleLosses", losses=[curved, "TripletMarginLoss"], miners=None, weights=None)


def test_losses_that_compare_images_need_two_of_a_class():
    for name in list_metric_losses():
        made, (embeddings, labels) = criterion(name), batch()
        if made.least_per_class == 1:  # it trains with different classes alone
            made(embeddings[::4], labels[::4]).backward()
            assert embeddings.grad.any(), name
    assert criterion("TripletMarginLoss").least_per_class == criterion("MarginLoss").least_per_class == 2
    assert criterion("ProxyAnchorLoss").least_per_class == 1
    assert criterion("ContrastiveLoss", memory=24).least_per_class == 1


def test_equal_embeddings_keep_every_loss_and_gradient_finite():
    labels = torch.arange(CLASSES).repeat_interleave(4)
    for name in list_metric_losses():
        points = torch.ones(16, DIM) * torch.tensor([1.0, 1.0, 1.0, -1.0])[labels, None]  # cosines of 1 and -1
        found = criterion(name)(points.requires_grad_(), labels)
        found.backward()
        assert found.isfinite(), name
        assert points.grad.isfinite().all(), name


def test_bounded_cosines_leave_a_loss_what_it_is():
    for name in BOUNDED:
        made = criterion(name)
        embeddings, labels = batch()
        plain = copy.deepcopy(made)
        plain.loss.distance = CosineSimilarity()
        torch.testing.assert_close(made(embeddings, labels), plain(embeddings, labels))
        again = pickle.loads(pickle.dumps(made))
        torch.testing.assert_close(again(embeddings, labels), made(embeddings, labels))


def test_losses_that_will_break_say_so(caplog):
    with caplog.at_level(logging.WARNING):
        for name in AGEING:
            criterion(name)
        criterion("ProxyAnchorLoss")
    assert [record.args[0] for record in caplog.records] == list(AGEING)


def test_a_memory_adds_earlier_batches_and_its_place_is_state():
    made, fresh = (criterion("ContrastiveLoss", miner="PairMarginMiner", memory=24) for _ in range(2))
    made.check(CLASSES, DIM)  # leaves no trace
    assert made.loss.queue_idx == 0
    assert not made.loss.has_been_filled
    embeddings, labels = batch(requires_grad=False)
    alone = made(embeddings, labels)
    assert made.loss.queue_idx == 16
    fresh.load_state_dict(made.state_dict())
    for one in (made, fresh):
        assert one(embeddings.flip(0), labels) != alone
        assert (one.loss.queue_idx, one.loss.has_been_filled) == (8, True)
    assert torch.equal(made(embeddings, labels), fresh(embeddings, labels))


def test_our_losses_read_any_order_and_uneven_classes():
    embeddings, labels = batch()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for loss in (RecallAtK(), Hyperbolic(), Hyperbolic(curvature=0), Hist(CLASSES, DIM)):
        whole = loss(embeddings, labels)
        if not isinstance(loss, Hyperbolic):  # whose terms are cut to equal classes
            torch.testing.assert_close(loss(embeddings[order], labels[order]), whole)
        assert loss(embeddings[1:], labels[1:]).isfinite()
    assert RecallAtK()(embeddings[:3], torch.arange(3)) == 0
    with pytest.raises(DataError, match="images_per_class"):
        Hyperbolic()(embeddings[:5], labels[:5])


def test_recall_at_k_is_the_recall_where_steps_are_steep():
    points = torch.nn.functional.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(2)), dim=1)
    labels = torch.arange(3).repeat_interleave(4)
    scores = points @ points.T
    ranks = (scores[:, None, :] > scores[:, :, None]).sum(2) + 1  # the query itself is first
    same = (labels[:, None] == labels) & ~torch.eye(12, dtype=torch.bool)
    hits = [((ranks < k) + 0.5 * (ranks == k)) * same for k in (2, 4)]  # a smooth step is one half at its place
    wanted = torch.stack([hit.sum(1).clamp(max=k) / min(k, 3) for hit, k in zip(hits, (2, 4), strict=True)]).mean()
    found = 1 - RecallAtK((2, 4), 1e-6, 1e-6)(points, labels)
    torch.testing.assert_close(found, wanted)


@register_class
class Centred(MetricLoss):
    """A loss of one's own, with the number of classes filled in."""

    def __init__(self, num_classes: int, weight: float = 1.0) -> None:
        super().__init__()
        self.centres, self.weight = nn.Parameter(torch.zeros(num_classes, DIM)), weight

    def forward(self, embeddings, labels, indices_tuple=None):
        return self.weight * (embeddings - self.centres[labels]).square().mean()


def test_a_loss_of_ones_own():
    made = metric_loss("Centred", CLASSES, DIM, weight=2.0)
    assert made.centres.shape == (CLASSES, DIM)
    assert made(*batch()).isfinite()
