"""``vispeft inspect``: show the plan of a method without changing anything."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from vispeft.backbones.create import create_model
from vispeft.building.config_files import read_config
from vispeft.building.methods import build_method, method_node
from vispeft.cli.common import console, make_parser
from vispeft.cli.config_keys import parse_override, split_overrides
from vispeft.cli.evaluate import load_task
from vispeft.cli.inside import plots
from vispeft.cli.memory import estimate_memory
from vispeft.cli.runs import Run, names_run
from vispeft.core.fields import Tasks
from vispeft.core.method import Method
from vispeft.core.plan import plan
from vispeft.errors import ConfigError
from vispeft.resources import find_config

__all__ = ["main"]

EXAMPLE = """example:
  vispeft inspect vit_base_patch16_224 ssf
  vispeft inspect vit_small_patch16_224 lora --rank 4 --roles [attn.qkv]
  vispeft inspect zoo:swin_tiny mtlora --tasks '[seg, depth]'
  vispeft inspect zoo:vit_tiny classification/digits_ssf
  vispeft inspect runs/digits_ssf/1
  vispeft inspect zoo:digits_ssf
  vispeft inspect classification/digits_lora --memory
  vispeft inspect classification/digits_lora --memory leaner --data.batch_size 256
  vispeft inspect runs/digits_ssf/1 --plots inside
  vispeft inspect runs/digits_ssf/1 --plots inside --images my_images

With --plots a folder gets attention.png (where the class token, or the tokens of a window, look), prompts.png (where
prompts look), shift.png (how far the adapter moves the output of each block), embeddings.png and embeddings_frozen.png
(pooled features of test images with and without the adapter), each where it applies.

Fields of the method follow as --field value. The backbone's weights are not needed. Of a finished run the plan of its
adapter is printed, and its counts, with those of a decoder."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("inspect", "Print every site, unit, shape and count of a plan.", EXAMPLE)
    parser.add_argument("model", metavar="MODEL|RUN", help="name of a timm model, or zoo:NAME; or a finished run")
    parser.add_argument(
        "method", metavar="METHOD|CONFIG", nargs="?", help="name of a method, or a config that has one; none with a run"
    )
    parser.add_argument(
        "--memory",
        nargs="?",
        const="",
        metavar="plain|lean|leaner",
        help="estimate the memory of a training step of a config, with its choice of memory or another one",
    )
    parser.add_argument("--plots", metavar="DIR", help="draw what happens inside of the model of a run or a config")
    parser.add_argument("--images", metavar="IMAGES", help="with --plots: folder of images instead of the run's data")
    given, overrides = parser.parse_known_args(list(argv))
    if given.plots is not None:
        _plot(given, overrides)
        return
    if given.images is not None:
        raise ConfigError("--images was given without --plots, which draws them. Add --plots DIR.")
    if given.memory is not None:
        _estimate(given.model, given.method, given.memory, overrides)
        return
    if given.method is None:
        _inspect_run(given.model, overrides)
        return
    fields = {key: _value(key, value) for key, value in split_overrides(overrides)}
    method = _method(given.method, fields)
    if isinstance(method, Tasks) and not method.tasks:
        raise ConfigError(f"{given.method} adapts to tasks, and none is named. Name them: --tasks '[seg, depth]'.")
    console.print(plan(create_model(given.model, pretrained=False), method))


def _plot(given: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Draw the inside of a model."""
    if given.method is not None or given.memory is not None:
        other = given.method if given.memory is None else "--memory"
        raise ConfigError(f"--plots takes a run or a config alone, and {other} was given too. Leave it out.")
    for path in plots(given.model, given.plots, given.images, overrides):
        console.print(str(path), soft_wrap=True)


def _estimate(config: str, method: str | None, memory: str, overrides: Sequence[str]) -> None:
    """Print the memory of a training step."""
    if method is not None:
        raise ConfigError(f"--memory takes a config alone, and {method} was given too. Set it by --model.method.")
    found = estimate_memory(config, [*(["--memory", memory] if memory else []), *overrides])
    console.print(found.table())
    console.print(found.fits(), soft_wrap=True)


def _inspect_run(place: str, overrides: Sequence[str]) -> None:
    """Print plan and counts of a finished run."""
    if not names_run(place):
        raise ConfigError(
            f"{place} was given without a method, and is no run directory. Name a method too, such as: vispeft inspect "
            f"{place} ssf"
        )
    if overrides:
        raise ConfigError(f"{' '.join(overrides)} was given with a run, whose adapter has its fields. Leave it out.")
    task, _ = load_task(Run.open(place))
    console.print(task.bank.plan())
    console.print(task.report())


def _value(key: str, value: str | None) -> Any:
    if value is None:
        raise ConfigError(f"--{key} needs a value.")
    return parse_override(key, value)


def _method(name: str, fields: dict[str, Any]) -> Method:
    node: Any = name
    if "/" in name or name.endswith((".yaml", ".yml")):
        tree = read_config(find_config(name))
        section = tree.get("model") or {"init_args": {"method": tree}}
        settings = section.get("init_args") if isinstance(section, dict) else None
        node = settings.get("method") if isinstance(settings, dict) else None
        if not isinstance(node, str | dict):
            raise ConfigError(f"{name} names no method under model.init_args.method.")
    node = method_node(node)
    return build_method({**node, "init_args": {**node["init_args"], **fields}})
