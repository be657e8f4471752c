"""Wrote the golden files: adapters, their outputs, and a run that was stopped, as revision a0bd47e wrote them.

The files stay as they are, for later revisions have to read them: do not run this again to make a test pass. Where it
is needed for further files, run it from the root of a checkout of the revision that is to write them, with this folder
copied into its tests:

    python -m tests.golden.write FOLDER

FOLDER then holds adapters/, outputs.safetensors, run/ and run_end/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import vispeft
from tests.golden.backbones import (
    ADAPTERS,
    DECODED,
    RUN_BACKBONE,
    STACK,
    WEIGHTS,
    images,
    make,
    make_run_backbone,
    noise,
    outputs,
    segmentation,
)
from vispeft.cli import train
from vispeft.tasks import Classification

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
METHODS: dict[str, Callable[[], vispeft.Method]] = {
    "ssf_vit": lambda: vispeft.SSF(),
    "ssf_swin": lambda: vispeft.SSF(patch_merging=True),
    "lora_vit": lambda: vispeft.LoRA(rank=3, alpha=6, roles=LINEARS),
    "lora_swinv2": lambda: vispeft.LoRA(rank=3, roles=LINEARS),
    "pissa_vit": lambda: vispeft.LoRA(rank=3, alpha=6, start="pissa"),
    "dora_vit": lambda: vispeft.LoRA(rank=3, dora=True, roles=LINEARS),
    "lora_fa_registers": lambda: vispeft.LoRA(rank=3, freeze_a=True, lr_ratio=16.0, rslora=True, blocks=(1,)),
    "lora_1bit_swin": lambda: vispeft.LoRA(rank=3, bits=1),
    "adaptformer_1bit_vit": lambda: vispeft.AdaptFormer(bottleneck=8, scale=1.0, bias=False, bits=1, head_bits=1),
    "convpass_4bit_registers": lambda: vispeft.Convpass(bottleneck=4, start="identity", bits=4),
    "adapter_vit": lambda: vispeft.Adapter(bottleneck=8, layernorm="in", scale=None, roles=("attn", "mlp")),
    "vpt_vit": lambda: vispeft.VPT(num_tokens=3),
    "vpt_shallow_dinov3": lambda: vispeft.VPT(num_tokens=2, deep=False, project=7),
    "vpt_swin": lambda: vispeft.VPT(num_tokens=3),
    "vqt_vit": lambda: vispeft.VQT(num_queries=2),
    "vqt_weighted_swin": lambda: vispeft.VQT(num_queries=9, aggregate="weighted", normalize=False, keep=0.7),
    "lst_vit": lambda: vispeft.LST(reduction=2),
    "lst_swin": lambda: vispeft.LST(reduction=2),
    "prefix_registers": lambda: vispeft.Prefix(length=3),
    "prefix_mlp_dinov3": lambda: vispeft.Prefix(length=2, mid_dim=4),
    "mam_vit": lambda: vispeft.MAM(length=2, bottleneck=8, scale=0.3),
    "fact_vit": lambda: vispeft.FacT(rank=3),
    "fact_tk_swinv2": lambda: vispeft.FacT(rank=3, variant="tk", scale=2.0),
    "compacter_vit": lambda: vispeft.Compacter(bottleneck=4),
    "compacter_8bit_swin": lambda: vispeft.Compacter(
        bottleneck=4, phm_dim=2, rank=None, shared_rule=False, train_layernorm=True, roles=("mlp",), bits=8
    ),
    "repadapter_dinov3": lambda: vispeft.RepAdapter(bottleneck=4),
    "hydra_vit": lambda: vispeft.Hydra(rank=2),
    "hydra_2bit_vit": lambda: vispeft.Hydra(rank=2, scale=0.5, bits=2),
    "bitfit_vit": lambda: vispeft.BitFit(),
    "norm_tuning_swin": lambda: vispeft.NormTuning(),
    "linear_probe_vit": lambda: vispeft.LinearProbe(),
    "full_vit": lambda: vispeft.Full(),
    "lora_features": lambda: vispeft.LoRA(rank=2),
    "stack_first": lambda: vispeft.LoRA(rank=2),
    "stack_second": lambda: vispeft.AdaptFormer(bottleneck=4, scale=1.0),
}

CONFIG = f"""
model:
  class_path: vispeft.tasks.Classification
  init_args:
    backbone: {RUN_BACKBONE[0]}
    backbone_args: {json.dumps(RUN_BACKBONE[1])}
    weights: backbone.safetensors
    method: {{class_path: vispeft.LoRA, init_args: {{rank: 2}}}}
    lr: 1e-2
    ema: 0.9
data:
  class_path: vispeft.data.DigitsData
  init_args: {{batch_size: 72, validation: 0.05, test: 0.75}}
trainer: {{max_epochs: 2, accelerator: cpu}}
checkpoints: {{every_n_steps: 2}}
"""
"""Five steps an epoch. There is no dropout: which numbers it draws depends on the maker of the processor."""
STOP = 7


class Killed(BaseException):
    """Ends a training where it stands; nothing handles it."""


def move(bank: vispeft.AdapterBank, name: str = "default") -> None:
    """Move all that an adapter trains away from its start."""
    with torch.no_grad():
        for key, tensor in bank.named_tensors(name).items():
            tensor.add_(noise(f"moved {key}", tensor.shape, 0.1))


def check_changed(name: str, before: list[Tensor], after: list[Tensor]) -> None:
    """Check that an adapter does something."""
    for old, new in zip(before, after, strict=True):
        if old.shape == new.shape and (old - new).abs().max() < 0.02 * old.abs().max():
            raise SystemExit(f"{name} changes next to nothing.")


def write_adapters(folder: Path) -> dict[str, Tensor]:
    """Write the adapters; gives their outputs."""
    found: dict[str, list[Tensor]] = {}
    for name, golden in ADAPTERS.items():
        model = make(golden.backbone, golden.classes)
        before = outputs(model, golden.backbone, golden.maps)
        torch.manual_seed(0)
        bank = vispeft.attach(model, METHODS[name]())
        move(bank)
        if golden.notes:
            bank.annotate(**golden.notes)
        found[name] = outputs(model, golden.backbone, golden.maps)
        check_changed(name, before, found[name])
        bank.save(folder / name)
    found["stack"] = write_stack(folder)
    found[DECODED] = [write_segmentation(folder / DECODED)]
    return {f"{name}/{index}": t.contiguous() for name, ts in found.items() for index, t in enumerate(ts)}


def write_stack(folder: Path) -> list[Tensor]:
    """Write two adapters; gives the output of both together."""
    model = make("vit")
    for name in STACK:
        torch.manual_seed(0)
        bank = vispeft.attach(model, METHODS[name](), name=name)
        move(bank, name)
    alone = outputs(model, "vit")
    bank.set_active(STACK)
    for name in STACK:
        bank.save(folder / name, name)
    check_changed("stack", alone, outputs(model, "vit"))
    return outputs(model, "vit")


def write_segmentation(folder: Path) -> Tensor:
    """Write an adapter with a decoder; gives the scores per pixel."""
    with tempfile.TemporaryDirectory() as place:
        task = segmentation(Path(place))
    move(task.bank)
    with torch.no_grad():
        for name, tensor in task.decoder.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(noise(f"moved {name}", tensor.shape, 0.1))
    task.bank.annotate(class_names=["water", "forest", "town", "field"])
    task.save_adapter(folder)
    with torch.no_grad():
        return task.eval()(images("vit"))


def stopped(self: Classification, batch: object, batch_idx: int) -> Tensor:
    """Train a step, or end."""
    if self.global_step == STOP:
        raise Killed
    return training_step(self, batch, batch_idx)


training_step = Classification.training_step


def write_run(folder: Path) -> None:
    """Write a run that was stopped inside its second epoch, and what it ends with when it goes on."""
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        save_file(make_run_backbone().state_dict(), WEIGHTS)
        Path("golden.yaml").write_text(CONFIG)
        Classification.training_step = stopped
        with contextlib.suppress(Killed):
            train.main(["golden.yaml", "--out", "run"])
        Classification.training_step = training_step
        shutil.copytree("run", folder / "run")
        (events,) = (folder / "run/logs/tensorboard").glob("events.*")
        events.rename(events.with_name("events.out.tfevents.0"))  # the name tells the machine
        train.main(["--resume", "run"])
        shutil.copytree("run/adapter", folder / "run_end/adapter")
        metrics = json.loads(Path("run/metrics.json").read_text())
        kept = {key: metrics[key] for key in ("validation", "test", "best_epoch", "epochs", "steps")}
        (folder / "run_end/metrics.json").write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    torch.set_num_threads(1)
    save_file(write_adapters(folder / "adapters"), folder / "outputs.safetensors")
    write_run(folder)


if __name__ == "__main__":
    main()
