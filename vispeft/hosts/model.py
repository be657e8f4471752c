"""The host of a whole model: it reads the route and keeps the frozen base in evaluation mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

from timm.layers import to_2tuple
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from vispeft.core.gate import PASSES, Gate
from vispeft.core.route import Route, Routing
from vispeft.core.tracing import in_graph
from vispeft.core.units import Unit
from vispeft.errors import BackboneError, ConfigError
from vispeft.hosts.base import Host

__all__ = ["BANK", "HEADS", "UNITS", "ModelHost", "recompute_contexts"]

BANK = "_vispeft_bank"
"""Attribute of the model that holds the bank."""
UNITS = "adapters"
"""Child of a host that holds its units."""
HEADS = "adapter_heads"
"""Child of the model that holds the classifiers of the adapters."""
_UNIT = re.compile(rf"{UNITS}\.[^.]+\.[^.]+\.")
"""The part of a tensor's name that a unit adds to the name of the base tensor it replaces."""


def recompute_contexts(routing: Routing) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of a forward pass and of its recomputation in the backward pass: both use the same route.

    Args:
        routing: The routing of the model, whose current route is used.
    """
    return nullcontext(), routing.using(routing.present())


class ModelHost(Host):
    """An adapted timm model. Families with their own forward pass subclass it in ``vispeft/backbones``."""

    awake: frozenset[str]
    """Paths of modules that follow the model's mode, besides units; an empty path means the whole base."""
    asleep: frozenset[str]
    """Names of frozen adapters, whose units stay in evaluation mode."""
    attributes: ClassVar[dict[str, Any]] = {**Host.attributes, "awake": frozenset(), "asleep": frozenset()}
    whole: ClassVar[tuple[str, ...]] = PASSES

    @property
    def gate(self) -> Gate:
        """The gate of its forward passes."""
        return self.routing.gate

    @classmethod
    def class_without(cls, plain: type[nn.Module], routing: Routing) -> type[nn.Module]:
        """Return the class of a model that is no host any more; while it is changed, its forward passes wait.

        Args:
            plain: The class that was replaced.
            routing: The route of the model.
        """
        return routing.gate.closed_class(plain)

    def train(self, mode: bool = True) -> Any:
        """Set the mode of units, classifiers and `awake` modules; all others stay in evaluation mode.

        Args:
            mode: True for training mode.

        Returns:
            The model.
        """
        self.routing.forget()
        nn.Module.train(self, mode)
        if mode:
            self._put_to_sleep(self, "")
            self.training = mode
        return self

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute features as timm does, after checking the image size."""
        self.check_size(x)
        return super().forward_features(x, *args, **kwargs)  # type: ignore[misc]  # timm's

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute intermediate features as timm does, after checking the image size."""
        self.check_size(x)
        return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]  # timm's

    @property
    def num_classes(self) -> int:
        """Number of classes of the classifier in use."""
        head = self.routing.present().head
        if head is None:
            try:
                return cast(int, self.__dict__["num_classes"])
            except KeyError:
                raise AttributeError(f"{self.replaces.__name__} has no attribute 'num_classes'") from None
        return cast(int, getattr(head, "out_features", 0))

    @num_classes.setter
    def num_classes(self, number: int) -> None:
        self.__dict__["num_classes"] = number

    def get_classifier(self) -> nn.Module:
        """Return the classifier in use: that of the last acting adapter, or of the base."""
        head = self.routing.present().head
        return cast(nn.Module, super().get_classifier()) if head is None else head  # type: ignore[misc]  # timm's

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Create a new classifier as timm does, for the last acting adapter, with the input width its method needs.

        If no adapter acts, the classifier of the base is replaced.
        """
        bank: Any = self.__dict__[BANK]
        with bank.replacing_head(num_classes):
            super().reset_classifier(num_classes, *args, **kwargs)  # type: ignore[misc]  # timm's

    def set_input_size(self, img_size: Any = None, patch_size: Any = None, *args: Any, **kwargs: Any) -> None:
        """Prepare for images of another size as timm does, and resize what units hold in place of resized tensors.

        Args:
            img_size: Height and width; None keeps them.
            patch_size: Height and width of a patch; None keeps them.
            *args: The further arguments of timm's model, by position.
            **kwargs: The same, by name.

        Raises:
            ConfigError: If patches change their size and an adapter acts on the patch embedding, or the weights are
                sharded.
        """
        embed, bank = cast(Any, self.patch_embed), cast(Any, self.__dict__[BANK])
        bank.check_whole("get another input size")
        if patch_size is not None and to_2tuple(patch_size) != embed.patch_size and isinstance(embed.proj, Host):
            raise ConfigError(
                f"set_input_size(patch_size={patch_size}) makes a new patch embedding, and adapters act on the present "
                f"one: {', '.join(embed.proj.adapters)}. Detach them, change the size of the patches, and attach anew."
            )
        # The base's own tensors are resized, not those that act in their place.
        with self.gate.alone(self, "get another input size"), self.routing.using(Route()):
            super().set_input_size(img_size, patch_size, *args, **kwargs)  # type: ignore[misc]  # timm's

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the model, and forget what is kept of its tensors."""
        self.routing.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load tensors, accepting the names of earlier versions."""
        self.routing.forget()
        self._rename_heads(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rename_heads(self, tensors: dict[str, Any], prefix: str) -> None:
        """Rename classifiers of earlier versions: the acting one was at timm's key and the base's at ``(base)``."""
        heads = f"{prefix}{HEADS}."
        if not any(key.startswith(f"{heads}(base).") for key in tensors):
            return
        place = f"{prefix}{self.__dict__[BANK].view.head_path}."
        own = cast(nn.ModuleDict, self.get_submodule(HEADS))
        placed = [name for name in own if not any(key.startswith(f"{heads}{name}.") for key in tensors)]
        for before, after in ((place, f"{heads}{placed[0]}." if placed else place), (f"{heads}(base).", place)):
            for key in [key for key in tensors if key.startswith(before)]:
                tensors[after + key.removeprefix(before)] = tensors.pop(key)

    def recomputed(self, block: Callable[..., Any], x: Tensor, **arguments: Any) -> Any:
        """Run a block with activation checkpointing, under the current route.

        Args:
            block: The block.
            x: Its tokens.
            **arguments: Its further arguments.
        """
        # PyTorch's reentrant kind, which timm can be told to use, takes no context and gives frozen inputs no gradient.
        if not in_graph():  # a graph is compiled for one route
            arguments["context_fn"] = lambda: recompute_contexts(self.routing)
        return checkpoint(block, x, use_reentrant=False, **arguments)

    def group_matcher(self, coarse: bool = False) -> Any:
        """Return timm's grouping of tensors by layer, extended to units that replace tensors of the stem.

        Args:
            coarse: Group by stage, where the family has stages.
        """
        return {name: _also_in_units(spec) for name, spec in super().group_matcher(coarse).items()}  # type: ignore[misc]

    def no_weight_decay(self) -> set[str]:
        """Return the tensors without weight decay: timm's, the units that replace them, and those that units exempt."""
        listing: Any = getattr(super(), "no_weight_decay", set)
        exempt = set(listing())
        stand_for = {name for name, _ in self.named_parameters() if _UNIT.sub("", name) in exempt}
        units = [(path, module) for path, module in self.named_modules() if isinstance(module, Unit)]
        return exempt | stand_for | {f"{path}.{name}" for path, unit in units for name in unit.no_decay}

    def check_size(self, images: Tensor) -> None:
        """Raise on images of a size the model does not accept.

        Args:
            images: (B, C, H, W).

        Raises:
            BackboneError: If the model accepts only one other size, or the size is not a multiple of the patch.
        """
        embed = cast(Any, self.patch_embed)
        size = tuple(images.shape[-2:])
        if embed.img_size is None:
            return
        if embed.strict_img_size and size != tuple(embed.img_size):
            raise BackboneError(
                f"Images of {size[0]} x {size[1]} were given to a model built for {embed.img_size[0]} x "
                f"{embed.img_size[1]}. Resize them, create the model with img_size={size}, or once for all sizes with "
                "vispeft.create_model(..., flexible_size=True)."
            )
        if not embed.dynamic_img_pad and any(side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
            raise BackboneError(
                f"Images of {size[0]} x {size[1]} were given to a model with patches of {embed.patch_size[0]} x "
                f"{embed.patch_size[1]}, which do not fit into them. Resize or pad them to multiples of the patch."
            )

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse `torch.nn.DataParallel`: its replicas would share one route and hold no parameters that train."""
        raise ConfigError(
            "torch.nn.DataParallel cannot run a model with adapters, since its replicas share one route. Use "
            "torch.nn.parallel.DistributedDataParallel, one process per device (the trainer's strategy: ddp)."
        )

    def _put_to_sleep(self, module: nn.Module, path: str, awake: bool = False) -> None:
        """Set a module and its descendants to evaluation mode, except units and `awake` modules."""
        awake = awake or path in self.awake
        module.training = awake
        for name, child in module.named_children():
            if name == UNITS and isinstance(module, Host):
                for adapter, units in child.named_children():
                    units.train(adapter not in self.asleep)
            else:
                self._put_to_sleep(child, f"{path}.{name}" if path else name, awake)


def _also_in_units(spec: Any) -> Any:
    """Extend a name pattern to units of the whole model, such as that of a trained position embedding."""
    if isinstance(spec, str):
        anywhere = re.sub(r"(^|[|])[\^]", r"\1", spec)  # names are matched from their start in any case
        return f"(?:{_UNIT.pattern})?(?:{anywhere})"
    return [(_also_in_units(pattern), suffix) for pattern, suffix in spec]
