"""Make ``docs/methods``: a page for every registered method, and an index.

    python benchmarks/method_pages.py             # after a change of a method, a preset, or of results
    python benchmarks/method_pages.py --measure   # also measure activations and merging again
    python benchmarks/method_pages.py --measure adapter_plus mona   # of these methods alone

Texts come from the methods themselves, counts from their formulas and from plans on models without weights, published
results from ``docs/methods/published.yaml``, and measured figures from JSON files in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import vispeft  # noqa: E402, I001 - before timm
import method_choice  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, saved_bytes, write  # noqa: E402
from vispeft.adapters.task_maps import TaskMaps  # noqa: E402
from vispeft.building.methods import method_node, method_presets  # noqa: E402
from vispeft.errors import MergeError, VispeftError  # noqa: E402

PAGES = ROOT / "docs" / "methods"
FACTS = "method_facts"
BACKBONES = {"ViT-B/16": "vit_base_patch16_224", "Swin-B": "swin_base_patch4_window7_224"}
MEASURED = "vit_tiny_patch16_224"
"""192 wide, 12 blocks: the model on which kept activations are counted."""
SMALL = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 5},
    ),
}
"""Models on which merging is tried."""
FEWSHOT = {
    "dinov2_vit_s14": "DINOv2-S/14",
    "clip_vit_b16": "CLIP ViT-B/16",
    "vit_tiny": "vit_tiny",
    "swin_tiny": "swin_tiny",
}
BATCH = 4
CONFIG_RATE, FAR = 3e-3, 5
"""Learning rate of ``configs/classification/digits.yaml``, and the factor from which on a method needs its own."""
TASKS = ("semseg", "human_parts", "sal", "normals")
"""Tasks of the methods that need some."""


def names() -> list[str]:
    """List the methods that ship."""
    found = vispeft.list_methods()
    return [name for name in found if type(vispeft.method(name)).__module__.startswith("vispeft.methods.")]


def default(name: str) -> vispeft.Method:
    """Make a method with its default fields, for `TASKS` if it needs some.

    Args:
        name: Registry name.
    """
    method = vispeft.method(name)
    return method.for_tasks(TASKS) if method.multi_task else method


# ------------------------------------------------------------------------------------------------- measuring


def measure(chosen: Sequence[str] = ()) -> dict[str, Any]:
    """Count kept activations and try to merge, method by method.

    Args:
        chosen: The methods to measure, beside the figures of the others that are on disk; none for all.
    """
    images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    whole = saved_bytes(timm.create_model(MEASURED).train(), images)
    facts = json.loads((RESULTS / f"{FACTS}.json").read_text(encoding="utf-8"))["methods"] if chosen else {}
    for name in chosen or names():
        model = timm.create_model(MEASURED)
        method = default(name)
        vispeft.attach(model, method, verify=False)
        kept = saved_bytes((TaskMaps(model) if method.multi_task else model).train(), images)
        facts[name] = {"activations": kept / whole, "merge": {kind: merges(name, *SMALL[kind]) for kind in SMALL}}
        print(name, facts[name])
    return {"model": MEASURED, "batch": BATCH, "full_bytes": whole, "methods": dict(sorted(facts.items()))}


def merges(name: str, model: str, arguments: dict[str, Any]) -> str:
    """Say whether a method merges into a plain model: yes, no, in part, or refused where it cannot act.

    Args:
        name: Registry name.
        model: A timm model.
        arguments: What makes it small.
    """
    torch.manual_seed(0)
    backbone = timm.create_model(model, **arguments).eval()
    try:
        bank = vispeft.attach(backbone, default(name), verify=False)
    except VispeftError:
        return "refused"
    if bank.tasks() and not bank.plan().method.one_pass:
        bank.set_active("default", task=bank.tasks()[0])
    with torch.no_grad():
        for _, tensor in bank.trainable_parameters():
            tensor.add_(torch.randn_like(tensor) * 0.02)
    try:
        bank.merge()
    except MergeError:
        return "in part" if bank.merge(partial=True).merged else "no"
    return "yes"


# ----------------------------------------------------------------------------------------------------- pages


def pages() -> dict[str, str]:
    """Make all pages by file name."""
    models = {}
    with torch.device("meta"):
        for label, name in BACKBONES.items():
            models[label] = timm.create_model(name)
    facts = json.loads((RESULTS / f"{FACTS}.json").read_text(encoding="utf-8"))["methods"]
    published = yaml.safe_load((PAGES / "published.yaml").read_text(encoding="utf-8"))
    counted = {name: {label: count(name, model) for label, model in models.items()} for name in names()}
    made = {f"{name}.md": "\n".join(page(name, models, counted[name], facts.get(name), published)) for name in names()}
    return {**made, "README.md": "\n".join(index(counted, facts))}


Counts = tuple[int, int, list[str]] | str
"""By formula, measured, and roles; or why the method refuses the model."""


def count(name: str, model: torch.nn.Module) -> Counts:
    """Count a method's parameters on a model by its formula and by what it would build."""
    method = default(name)
    try:
        plan = vispeft.plan(model, method)
    except VispeftError as error:
        return str(error)
    roles = dict.fromkeys(item.site.role for item in plan)
    return method.parameter_count(vispeft.core.families.describe(model)), plan.trainable, list(roles)


def page(
    name: str,
    models: dict[str, torch.nn.Module],
    counted: dict[str, Counts],
    facts: dict[str, Any] | None,
    published: dict[str, Any],
) -> Iterator[str]:
    """Make the page of a method, line by line."""
    method = vispeft.method(name)
    cls = type(method)
    tasks = f" and {len(TASKS)} tasks" if method.multi_task else ""
    summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    yield from (f"# {cls.__name__} (`{name}`)", "", "<!-- made by benchmarks/method_pages.py -->", "", summary)
    if rest.strip():
        yield from ("", " ".join(rest.split("\n\n", 1)[0].split()) if "\n\n" not in rest.strip() else rest.strip())
    yield from ("", f"Paper: <{cls.paper}>" if cls.paper else "No paper of its own: a baseline of many.", "")
    if method.multi_task:
        yield from ("Attach it with tasks, and read their maps with `vispeft.forward_tasks`.", "")
    else:
        yield from ("```bash", command(name, method), "```", "")
    yield from ("## Counts", "", f"Trainable parameters with the default fields{tasks}, without the classifier.", "")
    formula = inspect.cleandoc(cls.parameter_count.__doc__ or "").splitlines()[0]
    yield from (formula, "", "| backbone | by formula | built | acts at |", "|---|--:|--:|---|")
    for label, found in counted.items():
        if isinstance(found, str):
            yield f"| {label} | refused | | {found} |"
        else:
            roles = ", ".join(f"`{role}`" for role in found[2]) or "nothing"
            yield f"| {label} | {found[0]:,} | {found[1]:,} | {roles} |"
    yield from ("", "## Memory and merging", "", *costs(facts, brings_criterion(method)), *speed(name), "")
    yield from ("## What to train it with", "")
    yield from advice(method, {label: model for label, model in models.items() if not isinstance(counted[label], str)})
    yield from ("", "## Presets", "", *presets(name), "", "## Published results", "", *results(name, published))
    yield from ("", "## Own results", "", *own(name), "")


def command(name: str, method: vispeft.Method) -> str:
    """Write the command that trains a method, with its rate where that of the config is far from it.

    Args:
        name: Registry name.
        method: The method with its default fields.
    """
    if brings_criterion(method):
        return f"vispeft train metric_learning/emoji_vptsp --method {name}"
    rate = method.recipes[0].lr if method.recipes else CONFIG_RATE
    far = not 1 / FAR < rate / CONFIG_RATE < FAR
    return f"vispeft train classification/digits --method {name}" + (f" --model.lr={rate:g}" if far else "")


def brings_criterion(method: vispeft.Method) -> bool:
    """Whether a method has a criterion of its own for metric learning, which passes the backbone a second time."""
    return type(method).criterion is not vispeft.Method.criterion


def costs(facts: dict[str, Any] | None, criterion: bool) -> Iterator[str]:
    """Say what a method costs in memory, and whether it merges."""
    if facts is None:
        yield "Not measured yet."
        return
    share = facts["activations"]
    kinds = (
        (0.1, "nothing of the backbone is kept"),
        (0.5, "the backbone keeps little"),
        (2.0, "the backbone's own are kept"),
        (math.inf, "those of each task's stream or pass too"),
    )
    told = next(text for limit, text in kinds if share <= limit)
    yield (
        f"Activations kept for the backward pass: **{share:.2f}** of full fine-tuning ({told}; ViT-Ti/16, 224 pixels, "
        f"{BATCH} images, float32)."
        + (" In training, the second pass of its criterion keeps about as much again." if criterion else "")
    )
    told = {
        "yes": "exactly, into a plain timm model",
        "no": "no",
        "in part": "in part (`partial=True`)",
        "refused": "-",
    }
    yield from ("", "Merges: " + "; ".join(f"{kind}: {told[result]}" for kind, result in facts["merge"].items()) + ".")


def speed(name: str) -> Iterator[str]:
    """Tell the throughput of a method that makes the adapted model cheaper, which `benchmarks/dyt_speed.py` measures.

    Args:
        name: Registry name.
    """
    record = RESULTS / f"{name}_speed.json"
    if not record.is_file():
        return
    found = json.loads(record.read_text(encoding="utf-8"))
    rows = found["rows"]
    paper, whole = rows[f"{name}, 0.5 pass"], rows["lora"]
    yield ""
    yield (
        f"Predicting takes {paper['operations_of_frozen']:.2f} of the frozen model's operations and reaches "
        f"{paper['throughput']:.2f} of the frozen model's throughput where {paper['passed']:.2f} of the patch tokens "
        f"pass each MLP, and LoRA {whole['throughput']:.2f} ({found['model']}, random weights, batches of "
        f"{found['batch']}, one CPU thread; [benchmarks](../benchmarks.md#tokens-that-skip-mlps))."
    )


def advice(method: vispeft.Method, models: dict[str, torch.nn.Module]) -> Iterator[str]:
    """List what the method recommends, as `Method.recommended` gives it."""
    if not method.recipes:
        yield "No recipe is stated; choose a learning rate on validation images."
        return
    yield from ("| model | images | learning rate | decay | fields | source |", "|---|--:|--:|--:|---|---|")
    for label, model in models.items():
        for images in (1000, 50_000):
            recipe = method.recommended(model, images)
            fields = ", ".join(f"{key}={value}" for key, value in recipe.fields.items())
            numbers = f"{recipe.lr:g} | {recipe.weight_decay:g} | {fields}"
            yield f"| {label} | {images:,} | {numbers} | {recipe.source} |"


def presets(name: str) -> Iterator[str]:
    """List the files of ``configs/method`` that configure this method."""
    for preset in method_presets():
        node = method_node(preset)
        if node["class_path"] == method_node(name)["class_path"]:
            fields = ", ".join(f"{key}={value}" for key, value in node["init_args"].items())
            yield f"* [`{preset}`](../../configs/method/{preset}.yaml): {fields or 'the default fields'}"


def results(name: str, published: dict[str, Any]) -> Iterator[str]:
    """List what others report."""
    found = published["results"].get(name)
    if not found:
        yield "None that could be checked at its source."
        return
    yield from ("| data | value | read in |", "|---|--:|---|")
    for entry in found:
        yield f"| {entry['data']} | {entry['value']} | {published['sources'][entry['source']]} |"


def own(name: str) -> Iterator[str]:
    """List what this project measured."""
    rows = list(own_rows(name))
    if not rows:
        yield "Not run yet."
        return
    yield from ("| data | test accuracy | from |", "|---|--:|---|", *rows)


def own_rows(name: str) -> Iterator[str]:
    """Make a line per result of this project."""
    for backbone, label in FEWSHOT.items():
        runs = [
            json.loads(p.read_text(encoding="utf-8"))
            for p in sorted(RESULTS.glob(f"fewshot/{backbone}/{name}-lr*.json"))
        ]
        tests = [100 * run["test"] for run in runs if run["method"] == name and "test" in run]
        if tests:
            spread = f" ± {statistics.stdev(tests):.1f}" if len(tests) > 1 else ""
            mean = f"{statistics.mean(tests):.1f}{spread}"
            told = f"few-shot Fashion-MNIST, {label}, {len(tests)} of 3 seeds"
            yield f"| {told} | {mean} | `results/fewshot/{backbone}` |"
    record = RESULTS / "config_figures.json"
    entry = (
        json.loads(record.read_text(encoding="utf-8"))["configs"].get(f"digits_{name}", {}) if record.is_file() else {}
    )
    if "test_accuracy" in entry:
        yield f"| digits of scikit-learn | {100 * entry['test_accuracy']:.1f} | `results/config_figures.json` |"


def index(counted: dict[str, dict[str, Counts]], facts: dict[str, Any]) -> Iterator[str]:
    """Make the page that says which method to try, and lists all."""
    yield from ("# Methods", "", "<!-- made by benchmarks/method_pages.py -->", "")
    yield from method_choice.lines(RESULTS, trained_shares(counted))
    yield from (
        "## All methods",
        "",
        "Every method is attached in one line (`vispeft.attach(model, vispeft.method(name))`) and trained by its name:",
        "",
        "```bash",
        "vispeft train classification/digits --method adaptformer",
        "```",
        "",
        "Trainable parameters with the default fields, without the classifier; activations kept for the backward pass "
        "as a share of full fine-tuning (ViT-Ti/16).",
        "",
        f"| method | {' | '.join(BACKBONES)} | activations | merges (ViT, Swin) |",
        "|---|--:|--:|--:|---|",
    )
    for name, found in counted.items():
        numbers = " | ".join("refused" if isinstance(entry, str) else f"{entry[1]:,}" for entry in found.values())
        fact = facts.get(name)
        told = f"{fact['activations']:.2f} | {', '.join(fact['merge'].values())}" if fact else "not measured | "
        yield f"| [{name}]({name}.md) | {numbers} | {told} |"
    yield from ("", "`method.recommended(model, n_images)` gives learning rate, decay and size with their source.", "")


def trained_shares(counted: dict[str, dict[str, Counts]]) -> dict[str, float | None]:
    """Divide what methods train of the first backbone by what full fine-tuning trains; None where they refuse it."""
    label = next(iter(BACKBONES))
    whole = counted["full"][label]
    assert not isinstance(whole, str), "full fine-tuning takes every backbone"
    found = {name: counts[label] for name, counts in counted.items()}
    return {name: None if isinstance(entry, str) else entry[1] / whole[1] for name, entry in found.items()}


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measure", nargs="*", choices=names(), help="measure activations and merging again, by default of all methods"
    )
    chosen = parser.parse_args().measure
    if chosen is not None or not (RESULTS / f"{FACTS}.json").is_file():
        write(FACTS, measure(chosen or ()))
    made = pages()
    for file in PAGES.glob("*.md"):
        if file.name not in made:
            file.unlink()
    for file_name, text in made.items():
        (PAGES / file_name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
