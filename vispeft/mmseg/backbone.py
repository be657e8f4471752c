"""The backbone: a timm model with an adapter, as mmsegmentation builds, trains, saves and loads one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor, nn

from vispeft.adapters.attach import attach, load
from vispeft.adapters.bank import AdapterBank
from vispeft.adapters.compiling import Compile
from vispeft.backbones.create import create_model
from vispeft.building.methods import build_method, method_node
from vispeft.core.method import Method
from vispeft.core.origin import Memory
from vispeft.errors import ConfigError, FileError, VerificationError
from vispeft.heads.pyramid import BEHIND_MAPS, MapReader
from vispeft.hosts.model import ModelHost
from vispeft.storage.files import check_tensors, read_decoder
from vispeft.storage.fingerprint import base_tensors, check_fingerprint, fingerprint
from vispeft.tasks.inference import padded_to
from vispeft.zoo.adapters import find_adapter

__all__ = ["BASE_KEY", "VispeftBackbone"]

logger = logging.getLogger(__name__)

BASE_KEY = "base_fingerprint"
"""Entry of a checkpoint without frozen tensors that identifies them: bytes of JSON."""
_OWN = ("flexible_size", "num_classes", "pretrained", "weights")
"""Arguments of `create_model` that are not allowed in ``model_args``."""
_HOOKS = ("callbacks", "change_gradients", "loss_term", "start_from")
"""Methods of `Method` that tasks and plain loops call during training."""


@MODELS.register_module()
class VispeftBackbone(BaseModule):
    """A timm ViT or Swin with an adapter: images in, a tuple of NCHW maps out, fine to coarse.

    The frozen part behaves as in evaluation whatever the mode of the segmentor. Weights are loaded when it is built,
    not in `init_weights`, because some adapters start from them; so ``init_model`` finds them in the config too. A
    checkpoint may lack the frozen tensors, and must have everything else.
    """

    def __init__(
        self,
        model: str,
        peft: Mapping[str, Any] | None = None,
        out_indices: Sequence[int] | None = None,
        *,
        levels: Literal["taps", "vitdet"] = "taps",
        width: int = 256,
        pretrained: bool = True,
        weights: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        with_cp: bool = False,
        memory: Memory = "lean",
        compile: Compile = "off",
        init_cfg: None = None,
    ) -> None:
        """Create the model, attach or load the adapter, and verify that it trains through the maps.

        Args:
            model: Name of a timm model, or ``zoo:NAME``.
            peft: The adapter: ``dict(type="SSF", ...)`` with a method's name in the registry, in ``configs/method``, or
                of its class, and its fields; or ``dict(load=...)`` with the directory of an adapter or of a run, or
                ``zoo:NAME``. None leaves the model as it is, and all of it trains.
            out_indices: Stages of a Swin or blocks of a ViT whose maps are given. None takes all stages, or four blocks
                evenly spread.
            levels: ``vitdet`` makes four levels out of the last map of a plain ViT, for heads that need a pyramid.
            width: Channels of each level of a ``vitdet`` pyramid.
            pretrained: Whether to load weights. False gives random ones.
            weights: File with the model's weights, instead of those timm would fetch.
            model_args: Further arguments of ``timm.create_model``, such as ``img_size`` or ``drop_path_rate``.
            with_cp: Whether to compute activations again in the backward pass, which saves memory.
            memory: How much is kept for the backward pass, with equal gradients; see `AdapterBank.memory`.
            compile: What `torch.compile` compiles of an adapted model; see `AdapterBank.compile`.
            init_cfg: For mmengine's sake; must be None.

        Raises:
            ConfigError: If an argument cannot work, or the method is not known.
            BackboneError: If the model is not supported, or its weights cannot be had.
            FileError: If the adapter or the weights are missing or damaged.
            BaseMismatchError: If the adapter was trained on another backbone.
            VerificationError: If a trainable tensor receives no gradient.
        """
        if init_cfg is not None:
            raise ConfigError(
                f"VispeftBackbone(init_cfg={dict(init_cfg)}): the weights have to be there before the adapter is. Give "
                "a file of timm's tensors as weights=, or pretrained=True."
            )
        if not isinstance(pretrained, bool):
            raise ConfigError(
                f"VispeftBackbone(pretrained={pretrained!r}): True or False is needed. A file of timm's tensors goes "
                "into weights=. A segmentor hands its own pretrained on to the backbone; set that to None."
            )
        super().__init__()
        given = dict(model_args or {})
        taken = sorted(set(_OWN) & set(given))
        if taken:
            raise ConfigError(
                f"model_args has {', '.join(taken)}. VispeftBackbone takes pretrained and weights by these names, and "
                "sets num_classes=0 and flexible_size=True itself."
            )
        # The name of a hub model does not reveal its family, and so not its option for flexible sizes; use model_args.
        flexible = ":" not in model or model.startswith("zoo:")
        self.model: nn.Module = create_model(
            model, pretrained=pretrained, weights=weights, num_classes=0, flexible_size=flexible, **given
        )
        if peft is not None:
            _adapt(self.model, dict(peft))
        self.restorable = pretrained or weights is not None
        self.reader = MapReader(self.model, out_indices, levels, width)
        self.channels, self.strides = self.reader.channels, self.reader.strides
        self._verify()
        if peft is not None and levels == "vitdet" and "load" in peft:
            _load_reader(self.reader, str(peft["load"]))
        if self.bank is not None:
            self.bank.memory = memory
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            reason = self.bank.compile(compile, device=device)
            if reason is not None:
                logger.warning("compile=%r has no effect: %s.", compile, reason)
        if with_cp:
            self.model.set_grad_checkpointing()  # type: ignore[operator]  # timm's

    def _verify(self) -> None:
        try:
            if self.bank is not None:
                self.bank.verify(self, BEHIND_MAPS)
        except VerificationError as error:
            found = str(error).partition(". The model does not use")[0]
            raise VerificationError(
                f"Through the maps at out_indices {self.reader.taps}, {found[0].lower()}{found[1:]}. Units "
                "behind the last map cannot train: add the last block or stage to out_indices, or limit the method by "
                "blocks."
            ) from error

    @property
    def bank(self) -> AdapterBank | None:
        """The adapters of the model; None without, and after merging for good."""
        return AdapterBank.of(self.model)

    def init_weights(self) -> None:
        """Do nothing: mmengine would call timm's ``init_weights``, which randomises the backbone."""
        self._is_init = True

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps.

        Args:
            images: (B, 3, H, W), of any size. Where the model's patches do not divide it, zeros are added at the bottom
                and at the right, and maps are cut to the cells that hold a part of the image.

        Returns:
            Maps (B, C, ceil(H / stride), ceil(W / stride)), fine to coarse.
        """
        height, width = images.shape[-2:]
        maps = self.reader(self.model, padded_to(images, self.reader.divisor))
        return tuple(
            level[..., : -(-height // stride), : -(-width // stride)]
            for level, stride in zip(maps, self.strides, strict=True)
        )

    # ------------------------------------------------------------------ checkpoints

    def frozen_keys(self) -> set[str]:
        """Names of the state dict's tensors that training does not change; empty without an adapter, or merged."""
        if self.bank is None or not isinstance(self.model, ModelHost):
            return set()
        return {f"model.{name}" for name, _ in base_tensors(self.model, self.bank.view.head_path)}

    def slim(self, state: MutableMapping[str, Any], prefix: str = "") -> None:
        """Remove the frozen tensors from a checkpoint, and record which ones they were.

        Random ones stay, as they could not be restored.

        Args:
            state: The state dict; changed in place.
            prefix: Beginning of this module's names in it.
        """
        frozen = [key for name in self.frozen_keys() if (key := prefix + name) in state]
        if self.bank is None or not self.restorable or not frozen:
            return
        for key in frozen:
            del state[key]
        text = json.dumps(fingerprint(self.model, self.bank.view))
        state[f"{prefix}{BASE_KEY}"] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Let torch and mmengine load only checkpoints that are complete, or lack just the frozen tensors."""
        self._complete(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _complete(self, state: MutableMapping[str, Any], prefix: str) -> None:
        """Check the names in a state dict, and fill in the frozen tensors it lacks.

        Raises:
            FileError: If a tensor that trains is missing, or one is unknown.
            BaseMismatchError: If the frozen tensors it lacks differ from this model's.
        """
        base = state.pop(f"{prefix}{BASE_KEY}", None)
        own = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        frozen = {prefix + name for name in self.frozen_keys()}
        missing = [key for key in own if key not in state and key not in frozen]
        unknown = [key for key in state if key.startswith(prefix) and key not in own]
        if missing or unknown:
            raise FileError(
                f"The checkpoint does not belong to this backbone: it lacks {_some(missing)}, and has {_some(unknown)} "
                "beside it. Give VispeftBackbone the model, peft and levels the checkpoint was written with; a file of "
                "backbone weights goes into weights=."
            )
        if base is not None and self.bank is not None:
            saved = json.loads(bytes(base.tolist()).decode())
            check_fingerprint(saved, self.model, self.bank.view)
        for key in frozen - set(state):
            state[key] = own[key]


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])]) or "nothing"


def _adapt(model: nn.Module, peft: dict[str, Any]) -> None:
    """Attach the adapter of a config to a model, without verification, which follows through the maps."""
    if "load" in peft:
        if set(peft) != {"load"}:
            others = ", ".join(sorted(set(peft) - {"load"}))
            raise ConfigError(f"peft has load and {others}: a loaded adapter brings its method with it. Drop {others}.")
        bank = load(model, find_adapter(str(peft["load"])))
    else:
        bank = attach(model, _method(peft), verify=False)
    method = bank.plan().method
    if not method.reaches_maps:
        raise ConfigError(
            f"{method.name} changes the backbone's last feature and no map inside it, which is all that a decoder "
            "reads. Choose another method, such as LoRA, SSF or AdaptFormer."
        )
    hooks = [name for name in _HOOKS if getattr(type(method), name) is not getattr(Method, name)]
    if hooks:
        raise ConfigError(
            f"{method.name} takes part in every training step ({', '.join(hooks)}), which mmengine's loops do not let "
            "it do. Train it by a task of vispeft, or choose another method, such as LoRA, SSF or AdaptFormer."
        )


def _method(peft: dict[str, Any]) -> Method:
    """Build a method as the YAML configs of this project do."""
    if "type" not in peft:
        raise ConfigError(
            f"peft={peft}: give dict(type=METHOD, ...), such as dict(type='SSF'), or dict(load='zoo:NAME' or a folder)."
        )
    fields = {name: value for name, value in peft.items() if name != "type"}
    return build_method(method_node({"class_path": peft["type"], "init_args": fields}))


def _load_reader(reader: MapReader, source: str) -> None:
    """Load the pyramid stored with an adapter, if there is one."""
    beside = read_decoder(find_adapter(source))
    tensors = {key.removeprefix("reader."): tensor for key, tensor in beside.items() if key.startswith("reader.")}
    if tensors:
        check_tensors(reader.state_dict(), tensors)
        reader.load_state_dict(tensors)
