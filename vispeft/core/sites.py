"""Sites: the places of a backbone where something can act, under one closed vocabulary of roles.

The vocabulary is the same for every family, so that a method written once finds its places everywhere. What a role is
called inside one timm family is written in that family's view (``vispeft/backbones``), nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vispeft.errors import ConfigError, SiteError, UnknownNameError

__all__ = ["ROLES", "Kind", "Layout", "Site", "Slice", "View", "select"]

Kind = Literal["linear", "norm", "conv", "attention", "mlp", "block", "tokens", "scale", "table"]
Layout = Literal["NLC", "NHWC", "NCHW"]

ROLES: dict[str, str] = {
    "patch_embed": "the convolution that turns patches into tokens",
    "patch_embed.norm": "the norm behind it (Swin)",
    "tokens": "the token sequence or map that enters the first block",
    "norm_pre": "the norm in front of the first block (CLIP)",
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
    "attn.norm": "the norm in front of the output projection",
    "attn.proj": "the output projection",
    "ls1": "the layer scale of the attention branch",
    "norm2": "the norm of the MLP branch",
    "mlp": "the MLP module",
    "mlp.fc1": "the first linear layer of the MLP (of double width when gated and fused)",
    "mlp.fc1_g": "the gate part of it",
    "mlp.fc1_x": "the value part of it",
    "mlp.act": "the activation",
    "mlp.norm": "the norm in front of the second linear layer",
    "mlp.fc2": "the second linear layer of the MLP",
    "ls2": "the layer scale of the MLP branch",
    "rel_pos": "the relative-position bias",
    "downsample.norm": "the norm of patch merging",
    "downsample.reduction": "the linear layer of patch merging",
    "final_norm": "the norm behind the last block",
    "fc_norm": "the norm behind pooling",
    "attn_pool": "attention pooling",
    "head": "the classifier",
}


@dataclass(frozen=True)
class Slice:
    """A run of output rows of a linear layer, such as the query part of a fused projection."""

    start: int
    stop: int

    def __len__(self) -> int:
        """Count the rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class Site:
    """One place where a unit can act.

    A slice of a fused layer (``attn.q``, ``mlp.fc1_g``) is a site of its own: it has the module path of the whole layer
    and the rows that belong to it.
    """

    path: str
    """Path of the module inside the model, empty for the model itself."""
    role: str
    """One of `ROLES`."""
    kind: Kind
    """What kind of computation sits there."""
    in_features: int
    """Width of what enters."""
    out_features: int
    """Width of what leaves."""
    block: int | None = None
    """Index over all blocks of the model, counted from the input; None outside of blocks."""
    stage: int | None = None
    """Stage index of a hierarchical model."""
    layout: Layout = "NLC"
    """Order of the axes of what leaves."""
    rows: Slice | None = None
    """The rows of the fused layer, for a slice."""
    kernel: tuple[int, int] = (1, 1)
    """Height and width of the kernel of a convolution."""
    inside: bool = False
    """Whether the place is one of several inside the module at `path`, and needs its role to be told apart."""
    reads_weight: bool = False
    """Whether the model reads the layer's ``.weight`` instead of calling it."""
    owner: str | None = None
    """Path of the module that reads the weight, and holds the bias, where `reads_weight` is set."""
    null: tuple[str, ...] = ()
    """Tensors of the layer that cannot change any output, such as a shift of all keys alike under softmax."""
    alias: str | None = None
    """Path of the module in the whole model, where this one is a part of it with other paths (``features_only``)."""
    consumers: tuple[str, ...] = ()
    """Linear layers that are the only readers of a norm's output: where a shift can be folded forward exactly."""

    @property
    def key(self) -> str:
        """Name of the site in files: its path, with the slice's last name where it is one."""
        path = self.path if self.alias is None else self.alias
        return path if self.part is None else f"{path}:{self.part}"

    @property
    def columns(self) -> int:
        """Columns of the layer's weight as a matrix: the inputs of one output."""
        return self.in_features * self.kernel[0] * self.kernel[1]

    @property
    def part(self) -> str | None:
        """Name of the place inside its module, where the module holds several."""
        return self.role.rsplit(".", 1)[-1] if self.inside or self.rows is not None else None


@dataclass(frozen=True)
class View:
    """What vispeft knows about one model of a timm family; a description, never a copy.

    The fields say where things are. `host` names the class of the family's own forward, put on the model in place.
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
    """Class and register tokens in front of the patch tokens."""
    layout: Layout
    """Order of the axes between blocks."""
    head_path: str | None
    """Path of the classifier; None where the model has none (``features_only``)."""
    tensors: dict[str, dict[str, int]] = field(default_factory=dict)
    """Parameters of the base by owning module and name, with their sizes; the classifier is not among them."""
    head_drop_paths: tuple[str, ...] = ()
    """Dropout modules that belong to the classifier."""
    drop_path_paths: tuple[tuple[str, ...], ...] = ()
    """Per block, the paths of its stochastic-depth modules."""
    size_bound: tuple[str, ...] = ()
    """Endings of names of tensors whose shape depends on the image size (positions, relative-position tables)."""
    input_bound: tuple[str, ...] = ()
    """Names of tensors whose shape depends on the number of input channels."""
    model_class: str = ""
    """Name of the timm class, in files."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Beginnings of paths, and what they are in the whole model, where this one is a part of it."""
    patch_size: tuple[int, int] = (1, 1)
    """Height and width of a patch in pixels."""
    img_size: tuple[int, int] = (224, 224)
    """Height and width the model was built for."""
    in_chans: int = 3
    """Number of input channels."""
    global_pool: str = "token"
    """How the model pools tokens in front of its classifier."""
    not_here: dict[str, str] = field(default_factory=dict)
    """Roles this family lacks, with the reason."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles present, in the order of the forward pass."""
        return tuple(dict.fromkeys(site.role for site in self.sites))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.widths)

    def whole_name(self, name: str) -> str:
        """Give the name a tensor or module has in the whole model.

        Args:
            name: Its name here.
        """
        for here, there in self.aliases.items():
            if name == here or name.startswith(f"{here}."):
                return there + name[len(here) :]
        return name

    def at(self, *roles: str) -> Iterator[Site]:
        """Iterate over the sites of some roles, in forward order.

        Args:
            *roles: Names out of `ROLES`.

        Yields:
            Each site whose role is among them.
        """
        return (site for site in self.sites if site.role in roles)

    def blocks_of(self, sites: Iterable[Site]) -> Iterator[Site]:
        """Iterate over the blocks that hold some sites.

        Args:
            sites: Sites inside blocks.

        Yields:
            For each of them the site of its block.
        """
        blocks = {site.block: site for site in self.at("block")}
        return (blocks[site.block] for site in sites)

    def needs_norm_first(self, method: str) -> None:
        """Refuse a family that normalises behind its branches, for methods that read what the norm makes.

        Args:
            method: Name of the method, for the message.

        Raises:
            SiteError: If it does.
        """
        order = [site.role for site in self.sites]
        if order.index("norm1") > order.index("attn"):
            raise SiteError(
                f"{method} works on what the norm in front of a branch makes, and {self.family} normalises behind its "
                "branches: there is no stated form for it. Use a method that does not, such as AdaptFormer."
            )


def check_roles(roles: Iterable[str]) -> None:
    """Refuse names that are not in the vocabulary.

    Raises:
        UnknownNameError: If a role does not exist in any family.
    """
    for role in roles:
        if role not in ROLES:
            raise UnknownNameError("role", role, ROLES)


def select(view: View, roles: Sequence[str], blocks: Sequence[int] | None = None, optional: bool = False) -> list[Site]:
    """Choose sites by role and block.

    A method asks for roles of its own and the user may narrow them; each role asked for must exist in the model, since
    a role that silently matches nothing is an adapter that silently trains nothing.

    Args:
        view: The model's description.
        roles: Roles to take.
        blocks: Block indices to take (negative ones count from the last); None takes all, and with indices given only
            sites inside blocks are taken.
        optional: Leave out roles the model lacks instead of raising.

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
"""Roles of fused layers, and the roles of their parts."""


def _expand(view: View, roles: Sequence[str]) -> list[str]:
    """Let the parts stand in for a fused layer where the model has them as layers of their own."""
    expanded: list[str] = []
    for role in roles:
        parts = [part for part in _PARTS.get(role, ()) if any(site.rows is None for site in view.at(part))]
        expanded += [role] if role in view.roles or not parts else parts
    return list(dict.fromkeys(expanded))


def _block_index(index: int, depth: int) -> int:
    if not -depth <= index < depth:
        raise ConfigError(f"Block {index} was asked for, but the model has {depth} blocks (0 to {depth - 1}).")
    return index % depth
