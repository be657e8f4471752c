import pytest
import torch

from vispeft.errors import ConfigError, UnknownNameError
from vispeft.heads import Decoder, decoder, list_decoders, register_decoder
from vispeft.heads.base import _DECODERS

CHANNELS = (8, 16, 24, 32)
SMALL = {"linear": {}, "fcn": {"num_convs": 2}, "segformer": {}, "uper": {}, "dpt": {"reassembled": (4, 6, 8, 10)}}
SMALL |= {"hrnet": {"channels": (2, 3, 4, 5), "widen": 2}}
PYRAMID = ((16, 24), (8, 12), (4, 6), (2, 3))


def make(name, in_channels=CHANNELS, classes=5, **options):
    options = {**({} if name == "linear" else {"channels": 12}), **SMALL[name], **options}
    return decoder(name, in_channels, classes, **options)


def maps(sizes=PYRAMID, channels=CHANNELS, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, *size, generator=generator) for c, size in zip(channels, sizes, strict=True)]


def fitting(name, batch=2):
    return maps(PYRAMID if name != "dpt" else ((5, 7),) * 4, batch=batch)


def test_every_decoder_is_listed():
    assert list_decoders() == sorted(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_gradients_reach_all_parameters_and_all_maps_that_are_read(name):
    torch.manual_seed(0)
    head, inputs = make(name), [level.requires_grad_() for level in fitting(name)]
    scores = head(inputs)
    (scores * torch.randn_like(scores)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    read = [level.grad is not None for level in inputs]
    assert read == ([False, False, False, True] if name == "fcn" else [True] * 4)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("linear", (16, 24)),
        ("fcn", (2, 3)),
        ("segformer", (16, 24)),
        ("uper", (16, 24)),
        ("dpt", (40, 56)),
        ("hrnet", (16, 24)),
    ],
)
def test_scores_have_the_size_of_the_finest_map_that_is_read(name, size):
    assert make(name).eval()(fitting(name)).shape == (2, 5, *size)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_evaluation_treats_images_apart_and_training_drops_channels(name):
    torch.manual_seed(0)
    head = make(name, dropout=0.5)
    both = fitting(name)
    head.eval()
    one = head([level[:1] for level in both])
    torch.testing.assert_close(head(both)[:1], one, atol=1e-6, rtol=1e-5)
    head.train()
    assert not torch.equal(head(both), head(both))


@pytest.mark.parametrize("name", ["linear", "fcn", "segformer", "dpt"])
def test_a_plain_vit_serves_decoders_without_need_of_a_pyramid(name):
    scores = make(name, (8,) * 4).eval()(maps(((6, 6),) * 4, (8,) * 4))
    assert scores.shape[-2:] == ((48, 48) if name == "dpt" else (6, 6))


def test_a_plain_vit_is_refused_by_a_decoder_that_needs_a_pyramid():
    with pytest.raises(ConfigError, match=r"6x6, 6x6.*levels=\"vitdet\".*'dpt', 'fcn', 'hrnet', 'linear'"):
        make("uper", (8,) * 4)(maps(((6, 6),) * 4, (8,) * 4))


def test_a_pyramid_is_refused_by_the_decoder_that_makes_its_own_scales():
    with pytest.raises(ConfigError, match=r"16x24, 8x12, 4x6, 2x3.*'segformer' or 'uper'"):
        make("dpt")(maps())


def test_a_pyramid_may_end_in_single_pixels():
    assert make("uper").eval()(maps(((2, 4), (1, 2), (1, 1), (1, 1)))).shape == (2, 5, 2, 4)


def test_pooling_one_image_in_training_is_refused_with_a_reason():
    with pytest.raises(ConfigError, match="at least two"):
        make("uper")(maps(batch=1))
    assert make("uper", pool_scales=(2, 3))(maps(batch=1)).shape[0] == 1


@pytest.mark.parametrize("channels", [CHANNELS[:3], (8, 16, 24, 33)])
def test_maps_of_another_number_or_width_are_refused(channels):
    with pytest.raises(ConfigError, match="made for 4 maps of 8, 16, 24, 32 channels"):
        make("segformer")(maps(PYRAMID[: len(channels)], channels))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fcn", {"index": 4}, "map 4 of 4"),
        ("fcn", {"num_convs": 0}, "num_convs=0"),
        ("uper", {"pool_scales": (0, 1)}, "pool_scales"),
        ("dpt", {"in_channels": (8, 8)}, "exactly 4"),
        ("dpt", {"reassembled": (8, 8)}, "exactly 4"),
        ("segformer", {"dropout": 1.0}, "dropout=1.0"),
        ("segformer", {"channels": 0}, "channels=0"),
        ("linear", {"classes": 0}, "num_classes=0"),
        ("linear", {"in_channels": ()}, "needs a map"),
    ],
)
def test_options_that_cannot_be_are_refused(name, options, words):
    with pytest.raises(ConfigError, match=words):
        make(name, **options)


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(UnknownNameError, match="'segformer'"):
        decoder("segfromer", CHANNELS, 5)
    with pytest.raises(UnknownNameError, match="'channels'"):
        decoder("uper", CHANNELS, 5, chanels=3)


def test_a_decoder_from_outside_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("vispeft.heads.base._DECODERS", dict(_DECODERS))

    @register_decoder
    class Last(Decoder):
        name = "last"

        def __init__(self, in_channels, num_classes):
            super().__init__(in_channels, num_classes, channels=in_channels[-1], dropout=0.0)

        def fuse(self, maps):
            return maps[-1]

    head = decoder("last", CHANNELS, 5)
    assert isinstance(head, Last)
    assert head(maps()).shape == (2, 5, 2, 3)


def test_the_linear_decoder_is_one_matrix_on_normalised_features():
    head = make("linear", (3, 4)).train()
    inputs = maps(((4, 4), (4, 4)), (3, 4))
    joined = torch.cat(inputs, dim=1)
    mean, variance = joined.mean((0, 2, 3), keepdim=True), joined.var((0, 2, 3), keepdim=True, correction=0)
    matrix, bias = head.conv_seg.weight[:, :, 0, 0], head.conv_seg.bias
    expected = torch.einsum("kc,bchw->bkhw", matrix, (joined - mean) / (variance + 1e-5).sqrt())
    torch.testing.assert_close(head(inputs), expected + bias[:, None, None], atol=1e-6, rtol=1e-5)


def test_dpt_takes_the_published_widths_by_default():
    assert [p.out_channels for p in decoder("dpt", (768,) * 4, 2, channels=8).projects] == [96, 192, 384, 768]


def test_start_values_are_those_of_mmsegmentation():
    torch.manual_seed(0)
    head = decoder("segformer", (64, 64), 150, channels=256)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not head.conv_seg.bias.any()
    # Kaiming, fan out of a 1x1 convolution to 256 channels.
    assert head.convs[0].conv.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_decoders_can_be_exported_with_any_batch(name):
    head, inputs = make(name).eval(), fitting(name)
    dynamic = ([{0: torch.export.Dim("batch")}] * 4,)
    program = torch.export.export(head, (inputs,), dynamic_shapes=dynamic)
    larger = fitting(name, batch=3)
    torch.testing.assert_close(program.module()(larger), head(larger), atol=1e-5, rtol=1e-5)


SWIN_T, MERGED = (96, 192, 384, 768), (192, 384, 768, 768)
PASCAL = {"semseg": 21, "human_parts": 7, "normals": 3, "sal": 1}


def test_decoders_of_several_tasks_have_the_published_sizes():
    """1,946,624 is the count of MTLoRA's public code (1.94 M in its paper), and 2,537,504 with 11,520 of the output
    norms are the 2.55 M of Polyhistor's table."""
    count = {
        name: sum(
            p.numel() for channels in PASCAL.values() for p in decoder(name, widths, channels, **options).parameters()
        )
        for name, widths, options in (("hrnet", MERGED, {}), ("segformer", SWIN_T, {"level_norm": False}))
    }
    assert count == {"hrnet": 1_946_624, "segformer": 2_537_504}


def test_hrnet_narrows_each_map_then_mixes_them_at_the_finest_size():
    torch.manual_seed(0)
    head, levels = make("hrnet").eval(), maps()
    narrowed = [reduce(level) for reduce, level in zip(head.reducers, levels, strict=True)]
    resized = [torch.nn.functional.interpolate(level, (16, 24), mode="bilinear") for level in narrowed]
    mixed = torch.einsum("oi,bihw->bohw", head.conv.weight[..., 0, 0], torch.cat(resized, 1))
    mixed = (mixed + head.conv.bias.view(-1, 1, 1)) / (1 + head.bn.eps) ** 0.5
    wanted = torch.einsum("oi,bihw->bohw", head.conv_seg.weight[..., 0, 0], mixed.relu())
    torch.testing.assert_close(head(levels), wanted, atol=1e-6, rtol=1e-5)


def test_hrnet_needs_a_width_for_each_map():
    with pytest.raises(ConfigError, match="there are 4 maps; give one number"):
        decoder("hrnet", CHANNELS, 5, channels=(2, 3))
    with pytest.raises(ConfigError, match="widen=0"):
        decoder("hrnet", CHANNELS, 5, widen=0)
