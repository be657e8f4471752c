"""CLIP models of open_clip: the classes' texts as embeddings, and the visual tower as a timm model.

open_clip is the extra ``clip``, and is imported where texts are encoded. No weights are downloaded.
"""

from __future__ import annotations

import importlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vispeft.core.families import base_class
from vispeft.errors import BackboneError, ConfigError, FileError
from vispeft.storage.class_embeddings import ClassEmbeddings

__all__ = ["TEMPLATES", "encode_classes", "load_clip", "load_visual"]

TEMPLATES = ("a photo of a {}.",)
"""The text of a class by default (arXiv 2103.00020, section 3.1.4)."""
AT_ONCE = 256
"""Texts that pass the text tower together."""


def load_clip(name: str, weights: str | Path) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """Make a CLIP of open_clip, with weights from a file.

    Args:
        name: open_clip's name of the architecture, such as ``ViT-B-16``, or ``ViT-B-16-quickgelu`` for the weights of
            OpenAI.
        weights: Its checkpoint, as open_clip publishes it.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        FileError: If the file is missing or does not fit.
        ConfigError: If the extra is not installed, or the name is unknown.
    """
    if not Path(weights).is_file():
        raise FileError(
            f"There are no CLIP weights at {str(weights)!r}, and none are downloaded. Place the checkpoint of {name} "
            "there: open_clip_model.safetensors or open_clip_pytorch_model.bin of its page on the Hugging Face Hub."
        )
    if _is_program(weights):
        raise FileError(
            f"{weights} is a TorchScript archive, as OpenAI's .pt files are: a program, which is not run. Take "
            f"open_clip_model.safetensors or open_clip_pytorch_model.bin of {name} from its page on the Hub."
        )
    try:
        library: Any = importlib.import_module("open_clip")
    except ImportError as error:
        raise ConfigError(
            f"Texts are encoded by open_clip, which cannot be imported ({error}). Install the extra: pip install "
            '"vispeft[clip]".'
        ) from error
    known = library.list_models()
    if name not in known:
        raise ConfigError(
            f"open_clip has no architecture {name!r}; it has {', '.join(known[:8])}, ... (list_models())."
        )
    try:
        model = library.create_model(name, pretrained=str(weights)).eval()
    except Exception as error:  # open_clip raises what torch.load and load_state_dict raise
        raise FileError(f"{weights} does not fit {name}: {str(error).splitlines()[0]}.") from error
    return model, library.get_tokenizer(name)


def _is_program(path: str | Path) -> bool:
    """Return whether a file is a TorchScript archive, which has code beside its tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


@torch.no_grad()
def encode_classes(
    model: Any,
    tokenize: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    source: str = "",
) -> ClassEmbeddings:
    """Encode the names of classes: the mean over templates of normalised text features, normalised again.

    Args:
        model: A CLIP of open_clip, in evaluation mode.
        tokenize: Its tokenizer.
        class_names: Names of the classes, as the data have them; underscores become spaces in the texts.
        templates: Texts with ``{}`` in place of the name.
        source: What to note as the source.

    Raises:
        ConfigError: If there are no names or templates, a template lacks ``{}``, or the visual tower has no projection.
    """
    if not class_names or not templates:
        raise ConfigError("Class embeddings need at least one class name and one template.")
    without = [template for template in templates if template.count("{}") != 1]
    if without:
        raise ConfigError(f"The template {without[0]!r} has to have {{}} once, in the place of the class name.")
    texts = [template.format(name.replace("_", " ")) for name in class_names for template in templates]
    device = next(model.parameters()).device
    parts = [
        model.encode_text(tokenize(texts[start : start + AT_ONCE]).to(device)).float()
        for start in range(0, len(texts), AT_ONCE)
    ]
    each = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(class_names), len(templates)))
    embeddings = F.normalize(each.mean(dim=1), dim=-1).cpu()
    projection = getattr(model.visual, "proj", None)
    if not isinstance(projection, Tensor):
        raise ConfigError(
            f"The visual tower {type(model.visual).__name__} has no linear projection to the joint space, so that "
            "timm's pooled features cannot be compared with texts. Take a CLIP with a plain ViT."
        )
    scale = min(math.exp(float(model.logit_scale)), 100.0)
    return ClassEmbeddings(
        embeddings, tuple(class_names), scale, projection.detach().float().t().contiguous().cpu(), source
    )


def load_visual(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the visual tower of a CLIP of open_clip into a timm ViT, exactly; the head stays as it is.

    Args:
        model: A timm ViT of the same shape, without adapters: with ``norm_pre``, norms with eps 1e-5, and quick-GELU
            where the CLIP has it, such as ``vit_base_patch16_clip_224`` and ``vit_base_patch16_clip_quickgelu_224``.
        state: The state dict of the whole CLIP, with names that begin with ``visual.``.

    Raises:
        BackboneError: If the model is no plain ViT, or tensors are missing, left over, or of other shapes.
    """
    if base_class(model) is not VisionTransformer:
        raise BackboneError(
            f"A CLIP's visual tower was to be loaded into a {base_class(model).__name__}; take a timm ViT."
        )
    if not any(key.startswith("visual.") for key in state):
        raise BackboneError("The state dict has no visual tower: no name in it begins with 'visual.'.")
    converted = dict(cast(Any, checkpoint_filter_fn)(dict(state), model))
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("head.")}
    found = {key: tensor for key, tensor in converted.items() if not key.startswith("head.")}
    other = sorted(
        key for key in {*own, *found} if key not in own or key not in found or own[key].shape != found[key].shape
    )
    if other:
        raise BackboneError(
            f"The visual tower does not fit this {base_class(model).__name__}: {len(other)} tensors are missing, left "
            f"over or of another shape, first {other[0]}. Create the timm model of the same CLIP."
        )
    model.load_state_dict(found, strict=False)
