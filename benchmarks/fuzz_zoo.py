"""Hostile zoos by the ten thousand: indexes, configs and whole folders, and every file with one byte flipped.

    python benchmarks/fuzz_zoo.py                                   # 100,000 cases, 1,000 flips in each file
    python benchmarks/fuzz_zoo.py --indexes 840 --configs 80 --folders 80 --flips 100

The cases are those of ``tests/fuzz/zoo_cases.py``, each made from its number, and what is demanded of each is what the
tests demand: refused with one of the project's errors or taken, within 2 s of processor time and 200 MB, no program
started, nothing imported because of a name in it, no file outside of the cache. Writes ``results/fuzz_zoo.json`` after
each kind, and goes on behind the kinds that are there; a case that does not meet this is listed by kind and number.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import RESULTS, write  # noqa: E402

from tests.fuzz.common import outcome  # noqa: E402
from tests.fuzz.test_zoo import make_zoo, pull_case  # noqa: E402
from tests.fuzz.zoo_cases import config_changed, flipped, hostile_zoo, read_changed  # noqa: E402
from vispeft.errors import VispeftError  # noqa: E402
from vispeft.zoo import find_adapter  # noqa: E402
from vispeft.zoo.index import INDEX, write_index  # noqa: E402

Case = Callable[[int], Any]


def many(kind: str, count: int, case: Case, outside: Path) -> dict[str, Any]:
    """Run the cases of one kind.

    Args:
        kind: Its name, for the list of failures.
        count: How many; their numbers are 0 to `count` - 1.
        case: Runs one, given its number.
        outside: A folder in which nothing may be new afterwards.

    Returns:
        Counts by outcome, the slowest case, and the failures.
    """
    found: Counter[str] = Counter()
    failures, slowest, began = [], 0.0, time.perf_counter()
    for seed in range(count):
        start = time.process_time()
        try:
            said = outcome(lambda seed=seed: case(seed), outside)
            assert said.isprintable(), "a message with control characters"
            found["taken" if said == "works" else "refused"] += 1
        except Exception as error:  # whatever it is, it is a finding
            failures.append({"kind": kind, "number": seed, "error": f"{type(error).__name__}: {error}"[:300]})
            print(failures[-1], flush=True)
        slowest = max(slowest, time.process_time() - start)
    seconds = time.perf_counter() - began
    return {"cases": count, **found, "slowest_seconds": slowest, "seconds": seconds, "failures": failures}


def flips(zoo: Path, count: int) -> dict[str, int]:
    """Flip bytes of every file of an installed adapter, one at a time, and count those that are not refused.

    Args:
        zoo: The zoo with the adapter, which is the user's own.
        count: Flips of each file.
    """
    taken = {}
    for path in [zoo / INDEX, *sorted((zoo / "tiny").iterdir())]:
        whole, taken[path.name] = path.read_bytes(), 0
        for changed in flipped(whole, count, 0):
            path.write_bytes(changed)
            try:
                find_adapter("zoo:tiny")
                taken[path.name] += 1
            except VispeftError:
                pass
        path.write_bytes(whole)
    return taken


def main() -> None:
    """Run what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, count in (("indexes", 84_000), ("configs", 8_000), ("folders", 8_000), ("flips", 1_000)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        outside, cache = home / "outside", home / "cache"
        outside.mkdir()
        os.environ["VISPEFT_CACHE"] = str(cache)
        os.chdir(outside)
        whole = make_zoo(home / "whole")
        index = (whole / INDEX).read_bytes()
        copy = shutil.copytree(whole / "tiny", home / "copy")
        config, header = (copy / "config.yaml").read_bytes(), json.loads((copy / "adapter.json").read_bytes())

        def one_folder(seed: int) -> None:
            if (cache / "zoo" / INDEX).is_file():
                write_index(cache / "zoo", {})
            hostile_zoo(whole, home / "source", seed)
            pull_case(home / "source")

        kinds: dict[str, tuple[int, Case]] = {
            "indexes": (given.indexes, lambda seed: read_changed(whole / INDEX, index, seed)),
            "configs": (given.configs, lambda seed: config_changed(copy, header, config, seed)),
            "folders": (given.folders, one_folder),
        }
        record = RESULTS / "fuzz_zoo.json"
        earlier = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        results: dict[str, Any] = {"total": sum(count for count, _ in kinds.values())}
        for kind, (count, case) in kinds.items():
            if earlier.get(kind, {}).get("cases") == count:
                results[kind] = earlier[kind]
                continue
            results[kind] = many(kind, count, case, outside)
            write("fuzz_zoo", results)
            print(kind, {key: value for key, value in results[kind].items() if key != "failures"}, flush=True)
        shutil.rmtree(cache, ignore_errors=True)
        pull_case(whole)
        results["flips"] = {"of_each_file": given.flips, "taken": flips(cache / "zoo", given.flips)}
        write("fuzz_zoo", results)
        print(results["flips"])


if __name__ == "__main__":
    main()
