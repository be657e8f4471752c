"""How much processor time importing takes: the command's help, the package, and a first adapter, in fresh processes.

    python benchmarks/import_times.py                 # writes results/import_times.json and the table

Each case runs in a process of its own, in turn with the others; the time is that of the whole process, interpreter
included, from cached bytecode. `first_attach` is what is needed beyond torch and timm: the same process imports those
first, then vispeft, makes zoo:vit_tiny and attaches LoRA. Importing torch and timm leaves a full collection of their
own garbage due, which falls to whoever allocates next: `first_attach` has it done before the clock begins,
`first_attach_and_collection` does not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import write, write_section  # noqa: E402

import vispeft  # noqa: E402, F401 - makes torchvision importable for `write`

# Beside a CPU-only torch, PyPI's torchvision imports only once these operators are declared, by whomever.
TORCH_TIMM = """
import torch
try:
    import torchvision
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
"""
CASES = {
    "python": "",
    "help": "from vispeft.cli.main import main; main(['--help'])",
    "vispeft": "import vispeft",
    "torch_timm": TORCH_TIMM,
    "vispeft_timm": "import vispeft, timm",
    "tasks": "import vispeft.tasks",
}
FIRST_ATTACH = """
import time
began = time.process_time()
import vispeft
vispeft.attach(vispeft.create_model("zoo:vit_tiny"), vispeft.LoRA())
print(time.process_time() - began)
"""
MEANING = {
    "python": "Python alone",
    "help": "`vispeft --help`",
    "vispeft": "`import vispeft`",
    "torch_timm": "`import torch, timm`",
    "vispeft_timm": "`import vispeft, timm`",
    "tasks": "`import vispeft.tasks`",
    "first_attach": "after `import torch, timm`: `import vispeft`, `zoo:vit_tiny` made, LoRA attached",
    "first_attach_and_collection": "the same, with the garbage collection that torch and timm leave due",
}
PRINTED = {
    "first_attach": f"{TORCH_TIMM}\nimport gc; gc.collect()\n{FIRST_ATTACH}",
    "first_attach_and_collection": f"{TORCH_TIMM}\n{FIRST_ATTACH}",
}


def whole_process(code: str, environment: dict[str, str]) -> float:
    """Run code in a fresh process and give the processor time it took, of user and system."""
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, code)
    return usage.ru_utime + usage.ru_stime


def printed(code: str, environment: dict[str, str]) -> float:
    """Run code in a fresh process and give the seconds it prints."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in (*CASES, *PRINTED)}
    with tempfile.TemporaryDirectory() as cache:
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment = {**kept, "PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for number in range(given.rounds + 1):
            measured = {name: whole_process(code, environment) for name, code in CASES.items()}
            measured |= {name: printed(code, environment) for name, code in PRINTED.items()}
            for name, seconds in measured.items() if number else ():  # the first round writes the bytecode
                taken[name].append(seconds)
    results = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in taken.items()
    }
    for name, values in results.items():
        print(f"{name:28}" + "".join(f"  {key} {value:.3f} s" for key, value in values.items()))
    write("import_times", {"rounds": given.rounds, "load": os.getloadavg()[0], "processor_seconds": results})
    rows = [f"| {MEANING[name]} | {values['median']:.2f} |" for name, values in results.items()]
    write_section("import_times", ["| | median s of processor time |", "|---|--:|", *rows])


if __name__ == "__main__":
    main()
