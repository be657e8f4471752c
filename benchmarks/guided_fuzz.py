"""Readers of others' files, fuzzed with guidance by coverage: atheris looks for inputs that reach new code.

    pip install atheris                # in an environment of its own, which sees the packages of vispeft
    python benchmarks/guided_fuzz.py   # every reader, as often as RUNS says
    python benchmarks/guided_fuzz.py --readers index --runs 1000000 --corpus /tmp/corpus

It is run by hand, since atheris has no builds for every Python. Each reader gets bytes that grow from whole files, by
changes of bytes and of values; where a digest would stop all else, it is made to fit. A reader may do with them what
``tests/fuzz`` allows: take them or refuse them with one of the project's errors, within 2 s of processor time. Anything
else is a finding, kept with its bytes. Writes ``results/guided_fuzz.json``: calls by reader and by outcome, inputs that
reached new code, and findings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 2.0
"""Longest time of a call, in seconds of the processor."""
HANG = 600
"""Seconds after which a call counts as one that never ends; other processes may slow the machine down."""
LONGEST = 2**16
"""Bytes of an input; the whole files are smaller."""
RUNS = {
    "index": 50_000,
    "description": 5_000,
    "tensors": 5_000,
    "list": 20_000,
    "checkpoint": 5_000,
    "config": 1_000,
}
"""Calls of each reader."""


Change = Callable[[bytes, random.Random], bytes]


class Reader:
    """One reader, and whole files of which inputs are made."""

    def __init__(self, read: Callable[[bytes], Any], seeds: list[bytes], change: Change | None = None) -> None:
        """Name them.

        Args:
            read: Reads bytes, or refuses them.
            seeds: Whole files.
            change: Changes a value of a file; None where bytes alone are changed.
        """
        self.read, self.seeds, self._change = read, seeds, change

    def mutate(self, data: bytes, longest: int, seed: int) -> bytes:
        """Change an input: every other time a value of it, else its bytes, as the fuzzer does."""
        import atheris

        rng = random.Random(seed)
        if self._change is not None and rng.random() < 0.5:
            with contextlib.suppress(Exception):  # of what is no such file any more
                changed = self._change(data, rng)
                if len(changed) <= longest:
                    return changed
        return bytes(atheris.Mutate(data, longest))


def readers(home: Path) -> dict[str, Callable[[], Reader]]:
    """List the readers by name; each is made when it is asked for.

    Args:
        home: An empty folder, in which they write their files.
    """
    # After `instrument_imports`: what is imported here is guided.
    from tests.fuzz.test_zoo import make_zoo
    from tests.fuzz.zoo_cases import hostile_config, hostile_json, hostile_tensors
    from vispeft.cli.zoo import zoo_table
    from vispeft.cli.zoo_trust import check_config
    from vispeft.data.list_files import read_json, read_lines
    from vispeft.storage.files import read_adapter
    from vispeft.tasks.checkpoints import SEAL, read_checkpoint
    from vispeft.zoo.index import INDEX, parse_index

    zoo = make_zoo(home / "zoo")
    folder = zoo / "tiny"
    header = json.loads((folder / "adapter.json").read_bytes())

    def index() -> Reader:
        def read(data: bytes) -> None:
            zoo_table(parse_index(zoo / INDEX, with_digest(data, indented=True)))

        return Reader(read, [(zoo / INDEX).read_bytes()], hostile_json)

    def description() -> Reader:
        def read(data: bytes) -> None:
            (folder / "adapter.json").write_bytes(with_digest(data))
            read_adapter(folder)

        return Reader(read, [(folder / "adapter.json").read_bytes()], hostile_json)

    def tensors() -> Reader:
        def read(data: bytes) -> None:
            (folder / "adapter.safetensors").write_bytes(data)
            files = {**header["files"], "adapter.safetensors": hashlib.sha256(data).hexdigest()}
            (folder / "adapter.json").write_bytes(with_digest(json.dumps({**header, "files": files}).encode()))
            read_adapter(folder)

        return Reader(read, [(folder / "adapter.safetensors").read_bytes()], hostile_tensors)

    def config() -> Reader:
        def read(data: bytes) -> None:
            (folder / "config.yaml").write_bytes(data)
            check_config(folder / "config.yaml", header)

        return Reader(read, [(folder / "config.yaml").read_bytes()], hostile_config)

    def listed() -> Reader:
        def read(data: bytes) -> None:
            place = home / ("list.json" if data[:1] == b"{" else "list.txt")
            place.write_bytes(data)
            read_json(place) if place.suffix == ".json" else read_lines(place, [])

        return Reader(
            read,
            [
                b'{"a.jpg": 0, "b.jpg": ["x", "y"]}',
                b"photos/0.jpg 0\nphotos/1.jpg 1\n",
                b"photos/0.jpg,a\nphotos/1.jpg,b\n",
            ],
        )

    def checkpoint() -> Reader:
        import torch

        def read(data: bytes) -> None:
            (home / "step-1.ckpt").write_bytes(data + SEAL + hashlib.sha256(data).hexdigest().encode())
            read_checkpoint(home / "step-1.ckpt")

        whole = io.BytesIO()
        torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 0, "global_step": 4, "loops": {}}, whole)
        return Reader(read, [whole.getvalue()])

    made = {"index": index, "description": description, "tensors": tensors, "config": config}
    return {**made, "list": listed, "checkpoint": checkpoint}


def with_digest(data: bytes, *, indented: bool = False) -> bytes:
    """Make the digest inside of a JSON file fit, where the bytes are one.

    Args:
        data: The bytes.
        indented: Whether the file is an index, which is written in one way alone.
    """
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or "digest" not in value:
            return data
        if indented:
            rest = {key: inside for key, inside in value.items() if key != "digest"}
            text = json.dumps(rest, indent=1, ensure_ascii=False) + "\n"
            return (json.dumps({**rest, "digest": _sha(text)}, indent=1, ensure_ascii=False) + "\n").encode()
        text = json.dumps({**value, "digest": ""}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return json.dumps({**value, "digest": _sha(text)}, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return data


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Watch:
    """Calls a reader, counts what it does, and keeps what it must not do."""

    def __init__(self, read: Callable[[bytes], Any], runs: int, out: Path) -> None:
        """Begin at zero.

        Args:
            read: The reader.
            runs: Calls after which the process ends.
            out: File for the results.
        """
        from vispeft.errors import VispeftError

        self._read, self._runs, self._out, self._ours = read, runs, out, VispeftError
        self._count: Counter[str] = Counter()
        self._findings: dict[str, dict[str, str]] = {}
        self._slowest, self._memory = 0.0, _peak()

    def __call__(self, data: bytes) -> None:
        """Call the reader; the last call ends the process, since atheris never returns."""
        began = time.process_time()
        try:
            self._read(data)
            self._count["taken"] += 1
        except self._ours:
            self._count["refused"] += 1
        except Exception as error:  # whatever it is, it is a finding
            last = traceback.extract_tb(error.__traceback__)[-1]
            self._found(f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}", str(error), data)
        took = time.process_time() - began
        if took > SECONDS:
            self._found("slow", f"{took:.1f} s", data)
        self._slowest = max(self._slowest, took)
        if self._count.total() >= self._runs:
            self.end()

    def _found(self, kind: str, says: str, data: bytes) -> None:
        self._count["wrong"] += 1
        self._findings.setdefault(kind, {"error": says[:300], "bytes": data[:4000].hex()})

    def end(self) -> None:
        """Write the results and end the process."""
        values = {
            "calls": self._count.total(),
            **self._count,
            "slowest_seconds": self._slowest,
            "grown_mib": (_peak() - self._memory) / 1024,
            "findings": self._findings,
        }
        self._out.write_text(json.dumps(values))
        os._exit(0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def guide(name: str, runs: int, corpus: Path, out: Path) -> None:
    """Fuzz one reader in this process, which it ends.

    Args:
        name: The reader.
        runs: Calls.
        corpus: Folder in which inputs that reach new code are kept.
        out: File for the results.
    """
    import atheris

    home = Path(tempfile.mkdtemp())
    os.environ["VISPEFT_CACHE"] = str(home / "cache")
    made = readers(home)[name]()
    for number, seed in enumerate(made.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-timeout={HANG}", "-rss_limit_mb=4096", f"-max_len={LONGEST}", f"-artifact_prefix={out.parent}/"]
    arguments = [sys.argv[0], *limits, "-seed=1", "-verbosity=0", str(corpus)]
    atheris.Setup(arguments, Watch(made.read, runs, out), custom_mutator=made.mutate)
    atheris.Fuzz()


def run(name: str, runs: int, corpus: Path) -> dict[str, Any]:
    """Fuzz one reader in a process of its own, made from this one, whose packages are imported already.

    Args:
        name: The reader.
        runs: Calls.
        corpus: Folder in which inputs that reach new code are kept.

    Returns:
        Counts by outcome, the slowest call, the growth of the process, and the findings.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "out.json"
        child = os.fork()
        if child == 0:
            try:
                guide(name, runs, corpus, out)
            except BaseException:  # nothing of the parent may go on in its copy
                traceback.print_exc()
            os._exit(1)
        _, status = os.waitpid(child, 0)
        kept = {path.name: path.read_bytes()[:4000].hex() for path in Path(made).iterdir() if path != out}
        died = {"findings": {"ended": {"error": f"status {status}", "bytes": " ".join(kept.values())}}}
        found = json.loads(out.read_text()) if out.exists() else died
    reached = sum(not path.name.startswith("seed-") for path in corpus.iterdir())
    return {**found, "inputs_that_reached_new_code": reached, "seconds": time.perf_counter() - began}


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="*", choices=sorted(RUNS), default=list(RUNS))
    parser.add_argument("--runs", type=int, help="calls of each reader; default: those of RUNS")
    parser.add_argument("--corpus", type=Path, help="folder of inputs that are gone on from; default: a new one")
    given = parser.parse_args()
    import atheris

    importlib.import_module("torch")  # before the guided packages, and not guided itself
    with atheris.instrument_imports(include=["vispeft", "yaml"]):
        for name in ("cli.zoo_trust", "data.list_files", "tasks.checkpoints"):
            importlib.import_module(f"vispeft.{name}")
    from common import write

    results: dict[str, Any] = {"atheris": version("atheris"), "readers": {}}
    corpus = given.corpus or Path(tempfile.mkdtemp())
    for name in given.readers:
        results["readers"][name] = run(name, given.runs or RUNS[name], corpus / name)
        results["total"] = sum(found.get("calls", 0) for found in results["readers"].values())
        write("guided_fuzz", results)
        print(name, results["readers"][name], flush=True)


if __name__ == "__main__":
    main()
