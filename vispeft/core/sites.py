"""Sites: the places in a backbone where a unit can act, named by a closed vocabulary of roles.

The vocabulary is the same for every family, so that a method written once finds its sites in all of them. Only a
family's view (``vispeft/backbones``) maps roles to the names of timm's modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vispeft.errors import ConfigError, SiteError, UnknownNameError, counted

__all__ = ["ROLES", "Kind", "Layout", "Site", "Slice", "View", "select"]

Kind = Literal["linear", "norm", "conv", "attention", "mlp", "block", "tokens", "scale", "table"]
Layout = Literal["NLC", "NHWC", "NCHW"]

QUARTERS = 4
"""Number of maps that dense tasks read from a plain model."""
ROLES: dict[str, str] = {
    "patch_embed": "the convolution that turns patches into tokens",
    "patch_embed.norm": "the norm after it (Swin)",
    "tokens": "the token sequence or map that enters the first block",
    "norm_pre": "the norm before the first block (CLIP)",
    "block": "a whole transformer block",
    "norm1": "the norm of the attention branch",
    "attn": "the attention module",
    "attn.qkv": "the joint query, key and value projection",
    "attn.q": "the query part of it",
    "attn.k": "the key part of it",
    "attn.v": "the value part of it",
    "attn.q_norm": "the norm of the queries of a head",
    "attn.k_norm": "the norm of the keys of a head",
    "attn.core": "softmax of queries and keys, times values",
    "attn.norm": "the norm before the output projection",
    "attn.proj": "the output projection",
    "ls1": "the layer scale of the attention branch",
    "norm2": "the norm of the MLP branch",
    "mlp": "the MLP module",
    "mlp.fc1": "the first linear layer of the MLP (of double width when gated and fused)",
    "mlp.fc1_g": "the gate part of it",
    "mlp.fc1_x": "the value part of it",
    "mlp.act": "the activation",
    "mlp.norm": "the norm before the second linear layer",
    "mlp.fc2": "the second linear layer of the MLP",
    "ls2": "the layer scale of the MLP branch",
    "rel_pos": "the relative-position bias",
    "downsample.norm": "the norm of patch merging",
    "downsample.reduction": "the linear layer of patch merging",
    "final_norm": "the norm after the last block",
    "fc_norm": "the norm after pooling",
    "attn_pool": "attention pooling",
    "head": "the classifier",
}


@dataclass(frozen=True)
class Slice:
    """A contiguous range of output rows of a linear layer, such as the query part of a fused projection."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Count the rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Site:
    """One place where a unit can act.

    A slice of a fused layer (``attn.q``, ``mlp.fc1_g``) is a site of its own: it has the module path of the fused layer
    and the rows that belong to it.
    """

    path: str
    """Path of the module in the model; empty for the model itself."""
    role: str
    """One of `ROLES`."""
    kind: Kind
    """Kind of computation."""
    in_features: int
    """Width of the input."""
    out_features: int
    """Width of the output."""
    block: int | None = None
    """Index among all blocks of the model, counted from the input; None outside of blocks."""
    stage: int | None = None
    """Stage index of a hierarchical model."""
    layout: Layout = "NLC"
    """Order of the output's axes."""
    rows: Slice | None = None
    """For a slice, its rows in the fused layer."""
    kernel: tuple[int, int] = (1, 1)
    """Height and width of the kernel of a convolution."""
    inside: bool = False
    """Whether the module at `path` holds several sites, which only their roles distinguish."""
    reads_weight: bool = False
    """Whether the model reads the layer's ``.weight`` instead of calling it."""
    owner: str | None = None
    """Path of the module that reads the weight and holds the bias, where `reads_weight` is set."""
    null: tuple[str, ...] = ()
    """Tensors of the layer that cannot affect any output, such as a common shift of all keys under softmax."""
    alias: str | None = None
    """Path of the module in the full model, where a truncated model (``features_only``) has other paths."""
    consumers: tuple[str, ...] = ()
    """The linear layers that read a norm's output, where no other module does: a shift can be folded into them."""

    @property
    def key(self) -> str:
        """Name of the site in files: its path, followed by the `part` if there is one."""
        path = self.path if self.alias is None else self.alias
        return path if self.part is None else f"{path}:{self.part}"

    @property
    def span(self) -> tuple[int, int]:
        """First output row of the site in its layer, and the end of its rows."""
        return (0, self.out_features) if self.rows is None else (self.rows.start, self.rows.stop)

    @property
    def columns(self) -> int:
        """Number of columns of the layer's weight as a matrix (out, columns)."""
        return self.in_features * self.kernel[0] * self.kernel[1]

    @property
    def part(self) -> str | None:
        """Name of the site inside its module, where the module holds several sites."""
        return self.role.rsplit(".", 1)[-1] if self.inside or self.rows is not None else None


@dataclass(frozen=True)
class View:
    """The description of one timm model: where its sites are. It copies nothing.

    The host of the whole model, with the family's own forward pass, is in `Family.host`.
    """

    family: str
    """Name of the family: ``vit``, ``eva``, ``swin``, ``swinv2``."""
    sites: tuple[Site, ...]
    """Every site, in the order of the forward pass."""
    widths: tuple[int, ...]
    """Width of each block."""
    stages: tuple[tuple[int, ...], ...]
    """Block indices of each stage; one stage for a plain model."""
    heads: tuple[int, ...]
    """Attention heads of each block."""
    num_prefix_tokens: int
    """Number of class and register tokens before the patch tokens."""
    layout: Layout
    """Order of the axes between blocks."""
    head_path: str | None
    """Path of the classifier; None where the model has none (``features_only``)."""
    tensors: dict[str, dict[str, int]] = field(default_factory=dict)
    """Sizes of the base's parameters by owning module and name, without the classifier."""
    head_drop_paths: tuple[str, ...] = ()
    """Dropout modules that belong to the classifier."""
    drop_path_paths: tuple[tuple[str, ...], ...] = ()
    """Per block, the paths of its stochastic-depth modules."""
    size_bound: tuple[str, ...] = ()
    """Last name components of tensors whose shape depends on the image size (positions, relative-position tables)."""
    input_bound: tuple[str, ...] = ()
    """Names of tensors whose shape depends on the number of input channels."""
    model_class: str = ""
    """Name of the timm class, in files."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Path prefixes in this model and their counterparts in the full model, for a truncated model."""
    patch_size: tuple[int, int] = (1, 1)
    """Height and width of a patch in pixels."""
    img_size: tuple[int, int] = (224, 224)
    """Image height and width the model was built for, in pixels."""
    in_chans: int = 3
    """Number of input channels."""
    global_pool: str = "token"
    """How the model pools tokens before its classifier."""
    not_here: dict[str, str] = field(default_factory=dict)
    """Reasons why roles are missing, by role."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles present, in the order of the forward pass."""
        return tuple(dict.fromkeys(site.role for site in self.sites))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.widths)

    @property
    def has_stages(self) -> bool:
        """Whether the blocks stand in stages of falling resolution."""
        return self.layout == "NHWC"

    @property
    def map_ends(self) -> tuple[int, ...]:
        """The blocks behind which dense tasks read maps by default.

        The last block of each stage, or of each quarter of a plain model (four maps in DINOv2, BEiT and DPT); fewer in
        a plain model of less than four blocks.
        """
        if self.has_stages:
            return tuple(blocks[-1] for blocks in self.stages)
        return tuple(sorted({(index + 1) * self.depth // QUARTERS - 1 for index in range(QUARTERS)} - {-1}))

    def map_taps(self, taps: Sequence[int] | None) -> list[int]:
        """Return the taps of maps as indices from 0: stages, or blocks of a plain model.

        Args:
            taps: Stages or blocks in rising order; negative ones count from the last. None takes all stages, or
                `map_ends`.

        Raises:
            ConfigError: If one does not exist, or they are not in rising order.
        """
        count, what = (len(self.stages), "stages") if self.has_stages else (self.depth, "blocks")
        if taps is None:
            return list(range(count)) if self.has_stages else list(self.map_ends)
        found = [tap + count if tap < 0 else tap for tap in taps]
        if not found or any(not 0 <= tap < count for tap in found) or sorted(set(found)) != found:
            raise ConfigError(
                f"taps={list(taps)}: the model has {count} {what}; give some of 0 to {count - 1} in rising order."
            )
        return found

    def whole_name(self, name: str) -> str:
        """Return the name of a tensor or module in the full model.

        Args:
            name: Its name in this model.
        """
        for here, there in self.aliases.items():
            if name == here or name.startswith(f"{here}."):
                return there + name[len(here) :]
        return name

    def at(self, *roles: str) -> Iterator[Site]:
        """Iterate over the sites of some roles, in forward order.

        Args:
            *roles: Names from `ROLES`.

        Yields:
            Each site whose role is among them.
        """
        return (site for site in self.sites if site.role in roles)

    def blocks_of(self, sites: Iterable[Site]) -> Iterator[Site]:
        """Iterate over the blocks that contain the given sites.

        Args:
            sites: Sites inside blocks.

        Yields:
            The block's site, for each given site.
        """
        blocks = {site.block: site for site in self.at("block")}
        return (blocks[site.block] for site in sites)

    def needs_norm_first(self, method: str) -> None:
        """Raise if the family normalises after its branches, for methods that read a branch's normalised input.

        Args:
            method: Name of the method, for the message.

        Raises:
            SiteError: If the norm comes after the branch.
        """
        order = [site.role for site in self.sites]
        if order.index("norm1") > order.index("attn"):
            raise SiteError(
                f"{method} reads the output of the norm before a branch, but {self.family} normalises after its "
                "branches: there is no stated form for it. Use one that needs no such norm, such as AdaptFormer."
            )


def check_roles(roles: Iterable[str]) -> None:
    """Raise on names that are not in the vocabulary.

    Raises:
        UnknownNameError: If a role does not exist in any family.
    """
    for role in roles:
        if role not in ROLES:
            raise UnknownNameError("role", role, ROLES)


def select(view: View, roles: Sequence[str], blocks: Sequence[int] | None = None, optional: bool = False) -> list[Site]:
    """Choose sites by role and block.

    Each role must exist in the model: a role that silently matched nothing would give an adapter that silently trains
    nothing.

    Args:
        view: The model's description.
        roles: Roles to select.
        blocks: Block indices to select (negative ones count from the last), which leaves out all sites outside of
            blocks; None selects everything.
        optional: Skip roles the model lacks instead of raising.

    Returns:
        The sites, in forward order.

    Raises:
        UnknownNameError: If a role is not in the vocabulary.
        SiteError: If a role matches no site of this model.
        ConfigError: If a block index is out of range.
    """
    check_roles(roles)
    roles = _expand(view, roles)
    wanted = None if blocks is None else {_block_index(index, view.depth) for index in blocks}
    chosen = [site for site in view.sites if site.role in roles and (wanted is None or site.block in wanted)]
    found = {site.role for site in chosen}
    for role in roles:
        if role in found or optional:
            continue
        reason = view.not_here.get(role) or (
            "it exists, but not in the chosen blocks" if role in view.roles else "this model has no such site"
        )
        raise SiteError(
            f"Role {role!r} ({ROLES[role]}) matches nothing in this {view.family} model: {reason}. "
            f"Present roles: {', '.join(view.roles)}."
        )
    return chosen


_PARTS = {"attn.qkv": ("attn.q", "attn.k", "attn.v"), "mlp.fc1": ("mlp.fc1_g", "mlp.fc1_x")}
"""Roles of fused layers and of their parts."""


def _expand(view: View, roles: Sequence[str]) -> list[str]:
    """Replace the role of a fused layer by those of its parts where the model has separate layers."""
    expanded: list[str] = []
    for role in roles:
        parts = [part for part in _PARTS.get(role, ()) if any(site.rows is None for site in view.at(part))]
        expanded += [role] if role in view.roles or not parts else parts
    return list(dict.fromkeys(expanded))


def _block_index(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise ConfigError(
            f"Block {index} was asked for, but the model has {counted(depth, 'block')} (0 to {depth - 1})."
        )
    return index % depth
