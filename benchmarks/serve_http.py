"""The HTTP server under load: answers, lost requests and throughput while adapters come and go, and broken requests.

    python benchmarks/serve_http.py [--requests 2000] [--broken 200]
    python benchmarks/serve_http.py --table     # write the table of docs/serving.md from the file

Writes results/serve_http.json. A server of ViT-S/16 (224 px, batches of 8) with four LoRA adapters runs in a process of
its own; 8 clients of this process send JPEG files, each the next one as soon as it has an answer, while a fifth adapter
is added, removed, and added again a second later. Each answer is compared with its adapter alone. Throughput is
compared with a script that reads, prepares and answers the same files in batches of 8: by the clock, and by the
processor's seconds of the server, for machines that others use. Then broken requests are sent: no image, a cut image,
100 MB, another adapter, a slow sender, a connection that is cut off.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import vispeft  # first: it makes torchvision importable where its library does not fit

import torch  # isort: skip
from common import RESULTS, write, write_section
from PIL import Image
from torch import Tensor, nn

from vispeft.data.images import read_image
from vispeft.data.preprocessing import Preprocessing

BACKBONE, CLASSES, FILES, CLIENTS, BATCH = "vit_small_patch16_224", 10, 64, 8, 8
NAMES = [f"lora_{number}" for number in range(4)]
TOKEN = "benchmark"
LIMITS = {"bytes": 8 * 2**20, "pixels": 20_000_000, "seconds": 2.0, "answer_seconds": 600.0}


def backbone() -> nn.Module:
    """Create the same backbone in both processes."""
    torch.manual_seed(0)
    return vispeft.create_model(BACKBONE, pretrained=False, num_classes=CLASSES)


def make_adapters(folder: Path) -> None:
    """Save four adapters, and a guest."""
    model = backbone()
    for seed, name in enumerate([*NAMES, "guest"]):
        bank = vispeft.attach(model, vispeft.LoRA(rank=8), name=name, verify=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in bank.named_tensors(name).values():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
        bank.annotate(name, preprocessing=Preprocessing.of(model).to_dict(), output={"target": "class"})
        bank.save(folder / name, name)


def serve(folder: Path, port: int) -> None:
    """Run the server, in a process of its own."""
    import uvicorn

    from vispeft.serving.batches import Batches
    from vispeft.serving.http import Limits, make_app

    server = vispeft.serve(backbone(), {name: folder / name for name in NAMES})
    app = make_app(server, Batches(server, BATCH, 0.02), Limits(**LIMITS), token=TOKEN, top=CLASSES)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def pictures() -> list[bytes]:
    """Make JPEG files of noise with a few large shapes."""
    found = []
    for seed in range(FILES):
        coarse = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed))
        values = nn.functional.interpolate(coarse[None], size=(224, 224), mode="bicubic")[0].clamp(0, 1)
        file = io.BytesIO()
        Image.fromarray((values * 255).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


class Process:
    """What the operating system says of the server."""

    def __init__(self, number: int) -> None:
        self.number = number

    def cpu(self) -> float:
        """Seconds of processor."""
        fields = Path(f"/proc/{self.number}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> float:
        """Memory."""
        lines = Path(f"/proc/{self.number}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def ask(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Send one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, json.loads(content) if content.startswith(b"{") else {}


def visits(port: int, folder: Path, done: threading.Event, counts: Counter[str]) -> None:
    """Add and remove a guest every second."""
    right = {"Authorization": f"Bearer {TOKEN}"}
    body = json.dumps({"source": str(folder / "guest")}).encode()
    while not done.is_set():
        counts[f"added, status {ask(port, 'PUT', '/adapters/guest', body, right)[0]}"] += 1
        counts[f"removed, status {ask(port, 'DELETE', '/adapters/guest', b'', right)[0]}"] += 1
        done.wait(1.0)


def wanted_of(files: list[bytes], folder: Path) -> dict[tuple[int, str], Tensor]:
    """Compute the probabilities of each file by each adapter alone."""
    model, found = backbone(), {}
    for name in NAMES:
        bank = vispeft.load(model, folder / name, name=name)
    model.eval()
    prepare = Preprocessing.of(model).transform()
    images = torch.stack([prepare(read_image(io.BytesIO(file))) for file in files])
    with torch.no_grad():
        for name in NAMES:
            with bank.using(name):
                scores = torch.cat([model(part) for part in images.split(BATCH)])
            found.update({(place, name): row for place, row in enumerate(scores.softmax(1))})
    return found


def load(port: int, count: int, files: list[bytes], wanted: dict[tuple[int, str], Tensor]) -> dict[str, Any]:
    """Send requests from 8 clients."""
    statuses: Counter[int] = Counter()
    lock, worst, other = threading.Lock(), [0.0], [0]

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=900)
        for request in range(number, count, CLIENTS):
            place, name = request % FILES, NAMES[(request // 3) % len(NAMES)]
            connection.request("POST", f"/answer/{name}", files[place])
            response = connection.getresponse()
            answer = json.loads(response.read())
            shares = {one["class"]: one["probability"] for one in answer.get("classes", ())}
            own = wanted[place, name]
            apart = max((abs(shares.get(str(c), 9.0) - float(own[c])) for c in range(CLASSES)), default=9.0)
            with lock:
                statuses[response.status] += 1
                worst[0] = max(worst[0], apart)
                other[0] += answer.get("adapter") != name
        connection.close()

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    start = time.perf_counter()
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    seconds = time.perf_counter() - start
    told = {str(status): number for status, number in statuses.items()}
    found = {"statuses": told, "lost": count - sum(statuses.values()), "of_another_adapter": other[0]}
    return {**found, "largest_difference": worst[0], "seconds": seconds}


def script(count: int, files: list[bytes], folder: Path) -> dict[str, float]:
    """Read, prepare and answer the same files in batches, without HTTP."""
    server = vispeft.serve(backbone(), {name: folder / name for name in NAMES})
    prepare = Preprocessing.of(server.model).transform()

    def batch(first: int) -> None:
        places = range(first, first + BATCH)
        images = torch.stack([prepare(read_image(io.BytesIO(files[place % FILES]))) for place in places])
        server(images, [NAMES[(place // 3) % len(NAMES)] for place in places])

    batch(0)
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, count, BATCH):
        batch(first)
    images = -(-count // BATCH) * BATCH
    return {"seconds": (time.perf_counter() - start) / images, "cpu_seconds": (time.process_time() - cpu) / images}


def raw(port: int, pieces: list[bytes], pause: float = 0.0, reads: bool = True) -> int:
    """Send bytes as they are, and return the status; 0 where the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass  # the server has answered and closed
        if not reads:
            return -1
        try:
            answer = connection.recv(4096)
        except OSError:
            return 0
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def broken(port: int, count: int, files: list[bytes]) -> dict[str, Any]:
    """Send broken requests in turn and count their statuses."""

    def head(size: int, name: str = NAMES[0]) -> bytes:
        return f"POST /answer/{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode()

    megabyte = b"x" * 2**20
    kinds = {
        "no image": lambda: raw(port, [head(9), b"no image."]),
        "cut image": lambda: raw(port, [head(500), files[0][:500]]),
        "100 MB": lambda: raw(port, [head(100 * 2**20), *[megabyte] * 100]),
        "wrong adapter": lambda: raw(port, [head(len(files[0]), "nobody"), files[0]]),
        "slow sender": lambda: raw(port, [head(100), *[b"x"] * 5], pause=0.6),
        "cut connection": lambda: raw(port, [head(len(files[0])), files[0][:500]], reads=False),
    }
    found: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        found[kind][str(kinds[kind]())] += 1
    return {kind: dict(statuses) for kind, statuses in found.items()}


def table_lines() -> list[str]:
    """Make the table of docs/serving.md."""
    found = json.loads((RESULTS / "serve_http.json").read_text())
    throughput, broken = found["throughput"], found["broken"]
    refused = [f"{kind}: {', '.join(own)}" for kind, own in broken.items() if set(own) != {"-1"}]
    by_clock, by_cpu = throughput["of_the_script"], throughput["of_the_script_by_cpu_seconds"]
    guests = ", ".join(f"{count} {what}" for what, count in found["guests"].items())
    return [
        "| ViT-S/16, 224 px, batches of 8, 4 LoRA adapters, 8 clients | |",
        "|---|---|",
        f"| requests, and those without an answer | {found['requests']}, {found['lost']} |",
        f"| largest difference of a probability from that of the adapter alone | {found['largest_difference']:.0e} |",
        f"| a fifth adapter meanwhile | {guests} |",
        f"| throughput, of a script's with the same batches | {by_clock:.2f} by the clock, {by_cpu:.2f} by processor |",
        f"| broken requests and their statuses | {'; '.join(refused)} |",
        f"| megabytes before and after these | {found['megabytes']['before']:.0f}, {found['megabytes']['after']:.0f} |",
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--broken", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("DIR", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        write_section("serve_http", table_lines(), "serving")
        return
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(Path(options.serve[0]), int(options.serve[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_adapters(folder)
        files = pictures()
        wanted = wanted_of(files, folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, __file__, "--serve", name, str(port), "--threads", str(options.threads)]
        process = subprocess.Popen(command)
        try:
            found = measure(process, port, folder, files, wanted, options)
        finally:
            process.terminate()
            stopped = process.wait(60)
        found["exit_status"] = stopped
    print(json.dumps(found, indent=1))
    print(f"written to {write('serve_http', found).name}")


def measure(
    process: subprocess.Popen[bytes],
    port: int,
    folder: Path,
    files: list[bytes],
    wanted: dict[tuple[int, str], Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run all measurements against the server."""
    while True:
        try:
            if ask(port, "GET", "/health")[0] == 200:
                break
        except OSError:
            time.sleep(0.5)
    seen, done, counts = Process(process.pid), threading.Event(), Counter[str]()
    load(port, CLIENTS, files, wanted)
    guest = threading.Thread(target=visits, args=(port, folder, done, counts))
    guest.start()
    before = seen.cpu()
    loaded = load(port, options.requests, files, wanted)
    cpu = (seen.cpu() - before) / options.requests
    done.set()
    guest.join()
    plain = script(min(options.requests, 200), files, folder)
    memory = seen.megabytes()
    statuses = broken(port, options.broken, files)
    last = ask(port, "POST", f"/answer/{NAMES[0]}", files[0])[0]
    throughput = {
        "script_seconds_per_image": plain["seconds"],
        "http_seconds_per_image": loaded["seconds"] / options.requests,
        "script_cpu_seconds_per_image": plain["cpu_seconds"],
        "http_cpu_seconds_per_image": cpu,
    }
    throughput["of_the_script"] = plain["seconds"] * options.requests / loaded["seconds"]
    throughput["of_the_script_by_cpu_seconds"] = plain["cpu_seconds"] / cpu
    return {
        "requests": options.requests,
        **loaded,
        "guests": dict(counts),
        "throughput": throughput,
        "broken": statuses,
        "megabytes": {"before": memory, "after": seen.megabytes()},
        "status_behind_all": last,
    }


if __name__ == "__main__":
    main()
