"""Token merging of a model with adapters: its hosts, and the models and adapters it does not go with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vispeft.adapters.entry import Entry
from vispeft.adapters.holder import BankState
from vispeft.core.families import base_class, family_of, is_feature_getter, unwrap
from vispeft.core.route import Route, Routing
from vispeft.core.sites import View
from vispeft.core.token_merging import TokenMerging
from vispeft.core.units import Unit
from vispeft.errors import BackboneError, ConfigError
from vispeft.hosts.base import Host, ensure_host
from vispeft.hosts.choose import carrying_host

__all__ = ["MergingBank", "check_mergeable", "check_merging", "place_merging"]


def place_merging(model: nn.Module, view: View, routing: Routing) -> list[Host]:
    """Make hosts of the blocks and attention modules of a model that merges tokens.

    Args:
        model: The timm model.
        view: Its description.
        routing: Its route, which holds the settings.

    Returns:
        These hosts, which need not carry units.
    """
    if routing.merging is None:
        return []
    modules = [model.get_submodule(site.path) for site in view.at("block", "attn")]
    return [ensure_host(module, carrying_host(module), routing=routing) for module in modules]


def check_mergeable(outer: nn.Module, merging: TokenMerging, depth: int) -> None:
    """Refuse a model that cannot merge tokens.

    Args:
        outer: The timm model, or a ``features_only`` wrapper around one.
        merging: The settings.
        depth: Number of its blocks.

    Raises:
        BackboneError: If its family has no token merging.
        ConfigError: If it is wrapped for its maps, or the settings name more blocks than it has.
    """
    model = unwrap(outer)
    host: Any = family_of(model).host
    if not getattr(host, "merges_tokens", False):
        raise BackboneError(
            f"Token merging was asked for in a {base_class(model).__name__}. It needs one sequence of tokens whose "
            "positions enter before the blocks: windows are fixed rectangles, and rotary positions belong to single "
            "patches. Take a ViT with position embeddings (vit_*, deit_*, DINOv2, CLIP, MAE), or leave it out."
        )
    if is_feature_getter(outer):
        raise ConfigError(
            "Token merging was asked for in a model wrapped for its maps (features_only), whose patches would share "
            "values. Create the model without features_only, or leave it out."
        )
    merging.schedule(depth)


def check_merging(entries: Mapping[str, Entry]) -> None:
    """Refuse adapters that read tokens by their places, which change where tokens are merged.

    Args:
        entries: Adapters by name.

    Raises:
        ConfigError: If one of them does.
    """
    for name, entry in entries.items():
        reasons = (reason for unit in entry.units.values() if (reason := _reason(unit)) is not None)
        reason = next(reasons, None)
        if reason is not None:
            raise ConfigError(
                f"The model merges tokens, and adapter {name!r} ({entry.method.name}) {reason}. Choose another "
                "adapter, or switch token merging off (bank.merge_tokens(0), token_merging.r: 0 of a config)."
            )


def _reason(unit: Unit) -> str | None:
    """Return why a unit does not go with merged tokens; None if it does."""
    if getattr(unit, "skips", False):
        return "decides for each patch whether it passes through a layer"
    if getattr(unit, "needs_grid", False):
        return "treats the tokens as an image"
    if getattr(unit, "needs_order", False):
        return "convolves over the row of tokens"
    if unit.kind == "side":
        return "runs a network beside the blocks that has one row for each patch"
    if unit.kind in ("branch", "stream"):
        return "passes streams beside the tokens, whose rows are not merged"
    return None


class MergingBank(BankState):
    """The token merging of a model with adapters."""

    _routes: dict[tuple[tuple[str, ...], str | tuple[str, ...] | None], Route]

    def _place_memory(self) -> None:
        raise NotImplementedError

    def _place_compiled(self) -> None:
        raise NotImplementedError

    @property
    def token_merging(self) -> TokenMerging:
        """The token merging of the model; its ``r`` is 0 where there is none."""
        return self._routing.merging or TokenMerging()

    def merge_tokens(
        self, r: int | list[int] | TokenMerging, *, inflection: float = 0.0, proportional_attention: bool = True
    ) -> None:
        """Let every block of the model merge similar patch tokens, in training and in prediction, under all adapters.

        Outputs are those of a model with one token per patch: `forward_features` gives each patch the token that it was
        merged into.

        Args:
            r: Tokens that each block merges away, a list with one number per block, or all settings; 0 for none, which
                is exactly the model without token merging.
            inflection: Slope over the blocks; see `TokenMerging`.
            proportional_attention: Whether the attention weighs merged tokens by their size; see `TokenMerging`.

        Raises:
            ConfigError: If a setting is out of range, the model is wrapped for its maps, or the acting adapter reads
                tokens by their places.
            BackboneError: If the family has no token merging.
            MergeError: If the adapters are merged.
        """
        merging = r if isinstance(r, TokenMerging) else TokenMerging(r, inflection, proportional_attention)
        with self.changing("merge tokens"):
            self.check_ready("merge tokens")
            if self._routing.used_elsewhere():
                raise ConfigError("Another thread has chosen adapters in a block of using(); let it end first.")
            if merging:
                check_mergeable(self._outer, merging, self.view.depth)
                check_merging({name: self._entries[name] for name in self._routing.default.names})
            self._routing.merging = merging if merging else None
            self._routes.clear()
            self._place_memory()
            self._place_compiled()
