"""Whether the wheel is enough: built, installed into an environment that holds nothing else, and used.

    python benchmarks/empty_environment.py            # minutes; writes results/empty_environment.json

Makes a virtual environment, installs torch and torchvision by the Makefile's pins (a build that is at hand locally is
taken) and then the wheel with what it asks for, in the newest versions that pyproject.toml allows. In an empty folder
and without any environment variable but the path it trains two steps from a packaged config, makes a shipped backbone
and inspects a method. What is installed may differ from requirements.lock: this is what a user gets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vispeft._compat import install_hook  # noqa: E402

install_hook()  # `write` imports timm

from common import write  # noqa: E402

TRAIN = (
    "train",
    "classification/digits_ssf",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
)
CREATE = "import vispeft; print(sum(p.numel() for p in vispeft.create_model('zoo:vit_tiny').parameters()))"


def pins() -> list[str]:
    """Read the versions of torch and torchvision out of the Makefile."""
    found = re.findall(r"^(TORCH|TORCHVISION) := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [f"{name.lower()}=={version}" for name, version in found]


def main() -> None:
    """Install, use, write."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        binaries = place / "venv" / "bin"
        empty = place / "empty"
        empty.mkdir()

        def run(name: str, *command: str | Path, bare: bool = False) -> str:
            print(f"== {name}", flush=True)
            environment = {"PATH": str(binaries), "HOME": str(empty)} if bare else None
            began = time.perf_counter()
            done = subprocess.run(command, check=True, cwd=empty, env=environment, stdout=subprocess.PIPE, text=True)
            seconds[name] = time.perf_counter() - began
            return done.stdout

        venv.create(binaries.parent, with_pip=True)
        pip = (binaries / "python", "-m", "pip", "--quiet")
        run("wheel", *pip, "wheel", "--no-deps", "--wheel-dir", place, ROOT)
        run("torch", *pip, "install", *pins())
        run("vispeft", *pip, "install", *place.glob("*.whl"))
        installed = json.loads(run("list", binaries / "python", "-m", "pip", "list", "--format=json"))
        run("version", binaries / "vispeft", "--version", bare=True)
        run("train", binaries / "vispeft", *TRAIN, bare=True)
        metrics = json.loads((empty / "runs/digits_ssf/1/metrics.json").read_text())
        parameters = int(run("create", binaries / "python", "-I", "-c", CREATE, bare=True))
        plan = run("inspect", binaries / "vispeft", "inspect", "zoo:vit_tiny", "lora", bare=True)
        assert metrics["steps"] == 2
        assert "LoRA on vit" in plan
    write(
        "empty_environment",
        {
            "seconds": seconds,
            "steps": metrics["steps"],
            "backbone_parameters": parameters,
            "installed": {package["name"]: package["version"] for package in installed},
            "cpus": os.cpu_count(),
        },
    )


if __name__ == "__main__":
    main()
