"""The cells of the conformance grid: methods, tiny backbones of every family, and the refusals with their reasons.

`README.md` in this folder says which property is tested where, and on which cells.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vispeft
from vispeft.adapters.bank import AdapterBank

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")

METHODS: dict[str, vispeft.Method] = {
    "linear_probe": vispeft.LinearProbe(),
    "full": vispeft.Full(),
    "lora": vispeft.LoRA(rank=3),
    "lora_all": vispeft.LoRA(rank=3, alpha=6, roles=LINEARS),
    "ssf": vispeft.SSF(),
    "ssf_merging": vispeft.SSF(patch_merging=True),
    "bitfit": vispeft.BitFit(),
    "norm_tuning": vispeft.NormTuning(),
    "vpt": vispeft.VPT(num_tokens=3),
    "vqt": vispeft.VQT(num_queries=2, dropout=0.0),
    "vqt_weighted": vispeft.VQT(num_queries=9, aggregate="weighted", normalize=False, dropout=0.0, keep=0.7),
    "prefix": vispeft.Prefix(length=3),
    "prefix_mlp": vispeft.Prefix(length=2, mid_dim=4),
    "mam": vispeft.MAM(length=2, bottleneck=8, scale=0.3),
    "vpt_shallow": vispeft.VPT(num_tokens=2, deep=False, project=7),
    "adapter": vispeft.Adapter(bottleneck=8, layernorm="in", scale=None, roles=("attn", "mlp")),
    "adapter_parallel": vispeft.Adapter(bottleneck=8, parallel=True, layernorm="out", start="bert"),
    "adaptformer": vispeft.AdaptFormer(bottleneck=8, dropout=0),
    "adaptformer_1bit": vispeft.AdaptFormer(bottleneck=8, dropout=0, bias=False, bits=1),
    "lora_2bit": vispeft.LoRA(rank=3, bits=2),
    "dora": vispeft.LoRA(rank=3, dora=True, roles=LINEARS),
    "pissa": vispeft.LoRA(rank=3, alpha=6, start="pissa"),
    "lora_fa": vispeft.LoRA(rank=3, freeze_a=True, lr_ratio=16.0),
    "convpass": vispeft.Convpass(bottleneck=4, dropout=0),
    "convpass_attn": vispeft.Convpass(bottleneck=8, scale=4.0, variant="attn", start="identity", dropout=0, bits=4),
    "repadapter": vispeft.RepAdapter(bottleneck=4, dropout=0),
    "repadapter_attn": vispeft.RepAdapter(bottleneck=4, groups=1, variant="attn", dropout=0, bits=8),
    "hydra": vispeft.Hydra(rank=2),
    "lst": vispeft.LST(reduction=2),
    "lst_sparse": vispeft.LST(reduction=3, blocks=(1,), start="random"),
    "hydra_2bit": vispeft.Hydra(rank=2, scale=0.5, bits=2),
    "fact": vispeft.FacT(rank=3, dropout=0.0),
    "fact_tk": vispeft.FacT(rank=3, variant="tk", scale=2.0, dropout=0.0),
    "fact_4bit": vispeft.FacT(rank=3, variant="tk", scale=20.0, bits=4, dropout=0.0),
    "compacter": vispeft.Compacter(bottleneck=4),
    "compacter_full": vispeft.Compacter(
        bottleneck=4,
        phm_dim=2,
        rank=None,
        shared_rule=False,
        rule_start=0.5,
        train_layernorm=True,
        roles=("mlp",),
        bits=8,
    ),
    "polyhistor": vispeft.Polyhistor(reduction=4, task_dim=6, hidden_dim=8, embed_dim=8),
    "polyhistor_lite": vispeft.Polyhistor(
        lite=True,
        reduction=2,
        rank_divisor=None,
        task_dim=5,
        hidden_dim=8,
        embed_dim=8,
        kernel_front=False,
        parallel=False,
        activation="gelu",
        roles=("attn", "mlp"),
    ),
    "vpt_window": vispeft.VPTWindow(num_tokens=3),
    "vptsp": vispeft.VPTSP(num_tokens=4, step=1),
    "bone": vispeft.Bone(rank=6),
    "bone_mini": vispeft.Bone(rank=3, mini=4, scale=0.5),
    "bat": vispeft.Bone(rank=2, variant="bat"),
    "svfit": vispeft.SVFit(),
    "svfit_few": vispeft.SVFit(rank=9, roles=("attn.q", "attn.proj", "mlp.fc2")),
    "mask": vispeft.Mask(),
    "sparse": vispeft.Sparse(),
    "sparse_lift": vispeft.Sparse(budget=0.1, support="lift", principal=2, roles=("patch_embed", *LINEARS)),
    "sparse_gps": vispeft.Sparse(budget="row:2", support="gps", everywhere=True),
    "pst": vispeft.PST(rank=2, mask_rank=3, start="kaiming"),
    "snell": vispeft.SNELL(dim=4, threshold=0.3, scale=1.0),
    "snella": vispeft.SNELL(dim=4, threshold=0.0, variant="snella"),
    "mos": vispeft.MoS(rank=3, shards=2, dropout=0.0),
    "dyt": vispeft.DyT(bottleneck=12, dropout=0.0, complete=False, noise=0.0),
    "triadapt": vispeft.TriAdapt(rank=2),
    "mtlora": vispeft.MTLoRA(tasks=("seg", "depth"), rank=3, task_rank=2, dropout=0.0),
    "adapter_plus": vispeft.AdapterPlus(bottleneck=4, unit_drop=0.0),
    "adapter_plus_inner": vispeft.AdapterPlus(
        bottleneck=4, position="houlsby", scale=None, layernorm=True, bias=False, start="bert", unit_drop=0.0, bits=8
    ),
    "mona": vispeft.Mona(bottleneck=4, dropout=0.0),
    "mlae": vispeft.MLAE(rank=3, expert_dropout=0.0),
    "rein": vispeft.Rein(num_tokens=3, rank=2),
    "mmrl": vispeft.MMRL(num_tokens=3, token_dim=6, first_block=0, rank=2, read_rank=3),
    "mmrl_base": vispeft.MMRL(num_tokens=2, token_dim=6, first_block=1, variant="mmrl"),
    "lofit": vispeft.LoFiT(stage="both"),
    "lofit_offsets": vispeft.LoFiT(stage="offsets", heads=((0, 1), (0, 0))),
    "conformer_adapter": vispeft.ConformerAdapter(reduction=6, kernel=4, variant="houlsby"),
    "ditask": vispeft.DiTASK(tasks=("seg", "depth"), cells=6, task_cells=4),
}


PARALLEL = (
    *("adapter_parallel", "adaptformer", "adaptformer_1bit", "convpass", "convpass_attn", "polyhistor"),
    *("adapter_plus", "adapter_plus_inner", "mona", "rein", "conformer_adapter", "dyt"),
)
"""Methods with terms beside the branches of a block."""

STORES_MORE = (
    *("lora_fa", "vqt_weighted", "sparse", "sparse_lift", "sparse_gps", "pst", "mos", "triadapt"),
    "conformer_adapter",
)
"""Methods whose files hold tensors that do not train."""

BATCH_STATISTICS = ("conformer_adapter",)
"""Methods that normalise by the batch while they train, and keep running statistics of it."""

EXCLUSIVE = (
    "sparse_gps",
    "conformer_adapter",
    "full",
    "bitfit",
    "norm_tuning",
    "lst",
    "lst_sparse",
    "compacter_full",
    "vqt",
    "vqt_weighted",
    "mmrl",
    "mmrl_base",
    "mtlora",
    "ditask",
    "vptsp",
)
"""Methods that replace tensors of the base or its output features, so that two of them cannot act at once."""

LINKED = ("vpt", "vqt", "prefix", "mam", "fact", "compacter", "lst", "convpass", "polyhistor_lite", "mona")
LINKED += ("rein", "conformer_adapter", "dyt", "mmrl")
"""Methods, in all their forms, whose blocks need each other: they share tensors, hand on more than tokens, or give the
patches something that reaches a class token with the next block's attention."""
DEEP = ("lora_all", "ssf", "ssf_merging")
"""Methods that act on each block by itself, and yet are tried on more than one of a stage, shifted windows included."""


@dataclass(frozen=True)
class Backbone:
    """A tiny model of one family."""

    make: Callable[..., nn.Module]
    """Makes it, with random weights; takes ``num_classes`` and ``img_size``."""
    size: int = 32
    """Image size."""
    other_size: tuple[int, int] = (32, 48)
    """A non-square size it must serve when created for it."""
    grid: bool = True
    """Whether it belongs to the grid's main families; the others are variants of one."""


_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def _vit(num_classes: int = 5, img_size: Any = 32, **extra: Any) -> nn.Module:
    return VisionTransformer(img_size=img_size, num_classes=num_classes, **{**_VIT, **extra})


BACKBONES: dict[str, Backbone] = {
    "vit": Backbone(_vit),
    "vit_reg_ls": Backbone(partial(_vit, reg_tokens=2, init_values=0.1, no_embed_class=True)),
    "vit_clip": Backbone(partial(_vit, pre_norm=True, act_layer="quick_gelu"), grid=False),
    "vit_mae": Backbone(partial(_vit, global_pool="avg"), grid=False),
    "vit_siglip": Backbone(partial(_vit, class_token=False, global_pool="map"), grid=False),
    "vit_aimv2": Backbone(
        partial(
            _vit,
            class_token=False,
            global_pool="avg",
            norm_layer=RmsNorm,
            mlp_layer=SwiGLU,
            qkv_bias=False,
            proj_bias=False,
        ),
        grid=False,
    ),
    "vit_glu": Backbone(partial(_vit, mlp_layer=GluMlp, qk_norm=True, scale_attn_norm=True), grid=False),
}

_SWIN = {"patch_size": 2, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}


def _swin(num_classes: int = 5, img_size: Any = 32, **extra: Any) -> nn.Module:
    options = {**_SWIN, "drop_path_rate": 0.0, **extra}
    return SwinTransformer(img_size=img_size, num_classes=num_classes, **options)


def _swinv2(num_classes: int = 5, img_size: Any = 32, **extra: Any) -> nn.Module:
    options = {**_SWIN, "drop_path_rate": 0.0, **extra}
    return SwinTransformerV2(img_size=img_size, num_classes=num_classes, **options)


def _eva(num_classes: int = 5, img_size: Any = 32, **extra: Any) -> nn.Module:
    return Eva(img_size=img_size, num_classes=num_classes, **{**_VIT, "use_rot_pos_emb": True, **extra})


_DINOV3 = {
    "qkv_bias": False,
    "init_values": 0.1,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "use_abs_pos_emb": False,
    "num_reg_tokens": 2,
    "use_fc_norm": False,
}
_EVA02 = {"swiglu_mlp": True, "mlp_ratio": 8 / 3, "global_pool": "token"}

BACKBONES |= {
    "eva_dinov3": Backbone(partial(_eva, **_DINOV3)),
    "eva_dinov3_qkvb": Backbone(partial(_eva, **{**_DINOV3, "qkv_bias": True}), grid=False),
    "eva02": Backbone(partial(_eva, **_EVA02)),
    "eva02_split": Backbone(
        partial(_eva, **{**_EVA02, "qkv_fused": False, "scale_mlp": True, "scale_attn_inner": True}), grid=False
    ),
    "eva_pe": Backbone(
        partial(
            _eva, attn_type="rope", global_pool="map", use_pre_transformer_norm=True, use_post_transformer_norm=True
        ),
        grid=False,
    ),
    "swin": Backbone(_swin),
    "swinv2": Backbone(_swinv2),
}


@dataclass(frozen=True)
class Refusal:
    """Why a cell may refuse."""

    reason: str
    """One of `REASONS`."""
    says: str
    """A pattern that the error's message must match: the site that is missing, or the family without a stated form."""


REASONS = ("no such site", "no image map or token sequence", "weight read by the model", "no stated form")
"""The only reasons for a refusal; anything else is a defect."""

NO_MERGING = Refusal("no such site", r"'downsample\.norm'.*no patch merging")
NO_WHOLE_QKV = Refusal("no such site", r"'attn\.q'.*part of one")
NO_WHOLE_FC1 = Refusal("no such site", r"'mlp\.fc1_g'.*part of one")
NO_CLASS_TOKEN = Refusal("no stated form", "reads the class token")
WIDTHS_DIFFER = Refusal("no stated form", r"blocks of one width.*no stated form")
NORMS_BEHIND = Refusal("no stated form", r"swinv2.*no stated form|no stated form.*swinv2")

REFUSED: dict[tuple[str, str], Refusal] = {
    **{("ssf_merging", name): NO_MERGING for name in BACKBONES if not name.startswith("swin")},
    **{
        (method, "swinv2"): NORMS_BEHIND
        for method in (
            *("vpt", "vpt_shallow", "vpt_window", "convpass", "convpass_attn", "lst", "lst_sparse"),
            "conformer_adapter",
        )
    },
    **{("rein", backbone): WIDTHS_DIFFER for backbone in ("swin", "swinv2")},
    **{
        (method, backbone): NO_CLASS_TOKEN
        for method in ("vptsp", "mmrl", "mmrl_base")
        for backbone in BACKBONES
        if backbone not in ("vit", "vit_reg_ls", "vit_clip", "vit_glu", "eva02", "eva02_split")
    },
    ("repadapter", "vit_aimv2"): NO_WHOLE_FC1,
    **{(method, "eva02_split"): NO_WHOLE_QKV for method in ("repadapter", "repadapter_attn")},
}
"""Cells that refuse: (method, backbone) to the reason."""

NO_PLAIN_FORM: dict[tuple[str, str], str] = {
    **{
        (m, b): "inserts tokens|beside its tokens"
        for m in ("vpt", "vpt_shallow", "vptsp", "mmrl", "mmrl_base")
        for b in BACKBONES
    },
    **{(m, b): "keys and values of its own" for m in ("prefix", "prefix_mlp", "mam", "vpt_window") for b in BACKBONES},
    **{(m, b): "queries that read" for m in ("vqt", "vqt_weighted") for b in BACKBONES},
    **{(m, b): "term beside a branch" for m in PARALLEL for b in BACKBONES},
    **{
        (m, b): "no weight form"
        for m in ("adapter", "compacter", "compacter_full", "polyhistor_lite")
        for b in BACKBONES
    },
    **{(m, b): "network beside it" for m in ("lst", "lst_sparse") for b in BACKBONES},
    **{(m, b): "several outputs" for m in ("mtlora", "ditask") for b in BACKBONES},
    ("ssf", "vit_mae"): "identity here",
    ("ssf", "vit_aimv2"): "identity here",
}
"""Cells whose merge is partial, with a pattern that a reason in the report must match."""


@cache
def _made(backbone: str, **options: Any) -> tuple[nn.Module, Tensor]:
    """Make a backbone once, and the state that the random generator has afterwards."""
    torch.manual_seed(7)
    model = BACKBONES[backbone].make(**options)
    for name, parameter in model.named_parameters():
        if "head" not in name:  # another class count or image size must not change the rest
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            noise = torch.empty(parameter.shape).normal_(0, 0.05, generator=generator)
            parameter.data = (torch.ones if name.endswith("norm.weight") else torch.zeros)(parameter.shape) + noise
            if parameter.ndim > 1 and "token" not in name:
                parameter.data *= 3
    return model.eval(), torch.get_rng_state()


@dataclass(frozen=True)
class Cell:
    """One method on one backbone."""

    method: str
    backbone: str
    short: bool = False
    """Whether there is one block a stage, which is enough where each block has an adapter of its own."""

    def __str__(self) -> str:
        return f"{self.method}-{self.backbone}"

    @property
    def key(self) -> tuple[str, str]:
        """What the tables know it by."""
        return self.method, self.backbone

    def model(self, **options: Any) -> nn.Module:
        """Make the backbone, the same one at every call, with weights that leave nothing at zero."""
        blocks = {} if not self.short else {"depths": (1, 1)} if self.backbone.startswith("swin") else {"depth": 1}
        made, state = _made(self.backbone, **{"img_size": BACKBONES[self.backbone].size, **blocks, **options})
        torch.set_rng_state(state)
        return copy.deepcopy(made)

    def attach(self, model: nn.Module, name: str = "default", moved: bool = True, **options: Any) -> AdapterBank:
        """Attach the method; `moved` takes every unit away from its start. Gradients are another test's business."""
        bank = vispeft.attach(model, METHODS[self.method], name=name, **{"verify": False, **options})
        if moved:
            move(bank, name)
        return bank

    def images(self, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
        """Make images of noise."""
        side = BACKBONES[self.backbone].size
        return torch.randn(batch, 3, *(size or (side, side)), generator=torch.Generator().manual_seed(9))

    @property
    def merges_whole(self) -> bool:
        """Whether every layer has a plain form."""
        return self.key not in NO_PLAIN_FORM


def move(bank: AdapterBank, name: str, seed: int = 3) -> None:
    """Move every trainable tensor of an adapter, head included, away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in bank.named_tensors(name).values():
            tensor.add_(torch.empty(tensor.shape).normal_(0, 0.05, generator=generator).to(tensor))


def unit_names(bank: AdapterBank, name: str = "default") -> set[int]:
    """Collect the identities of an adapter's unit tensors."""
    return {id(entry.tensor) for entry in bank._entries[name].tensors()}


SECOND_FORMS = {
    *("ssf_merging", "vpt_shallow", "vqt_weighted", "prefix_mlp", "adapter_parallel", "adaptformer_1bit", "lora_2bit"),
    *("dora", "pissa", "lora_fa", "convpass_attn", "repadapter_attn", "hydra_2bit", "lst_sparse", "fact_tk"),
    *("fact_4bit", "compacter_full", "mtlora", "polyhistor", "polyhistor_lite", "vpt_window"),
    *("bone_mini", "bat", "svfit_few", "sparse_lift", "sparse_gps", "snella", "ditask"),
    *("adapter_plus", "adapter_plus_inner", "mona", "mlae", "rein", "conformer_adapter", "lofit"),
    *("lofit_offsets", "triadapt", "dyt", "mmrl", "mmrl_base"),
}
"""Further settings of a method, and methods with tests of their own for what is particular to them: they run on the
main families, and not on the variants of one family as well."""

LEFT = {("polyhistor", "vit"), ("polyhistor_lite", "vit"), ("polyhistor_lite", "swin"), ("vpt_window", "vit")}
LEFT |= {
    (method, backbone) for method in ("adapter_plus_inner", "lofit_offsets", "mmrl_base") for backbone in BACKBONES
}
"""Cells left to ``make test-slow``: tests of their own have what is particular to them."""

CELLS = [
    Cell(method, backbone, short=not method.startswith(LINKED) and method not in DEEP)
    for method in METHODS
    for backbone in BACKBONES
    if (BACKBONES[backbone].grid or method not in SECOND_FORMS) and (method, backbone) not in REFUSED
]
"""All cells that serve."""
MAIN = [cell for cell in CELLS if BACKBONES[cell.backbone].grid]
"""Those on the main families."""


def params(cells: Iterable[Cell], slow: Callable[[Cell], bool] = lambda cell: False) -> list[Any]:
    """Make test parameters of cells; second forms run on `vit` and `swin`, and elsewhere with ``make test-slow``.

    Args:
        cells: The cells.
        slow: Whether a cell is left to ``make test-slow`` too.
    """

    def marks(cell: Cell) -> list[pytest.MarkDecorator]:
        elsewhere = (is_second_form(cell) and cell.backbone not in ("vit", "swin")) or cell.key in LEFT
        return [pytest.mark.slow] if elsewhere or slow(cell) else []

    return [pytest.param(cell, id=str(cell), marks=marks(cell)) for cell in cells]


def is_variant(cell: Cell) -> bool:
    """Tell whether the backbone is a variant of a family: it shares its hosts, and has another structure."""
    return not BACKBONES[cell.backbone].grid


def is_second_form(cell: Cell) -> bool:
    """Tell whether the method is in a further setting."""
    return cell.method in SECOND_FORMS
