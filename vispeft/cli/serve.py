"""``vispeft serve``: answer images over HTTP with many adapters of one backbone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vispeft.building.config_files import read_config
from vispeft.cli.common import console, make_parser
from vispeft.cli.evaluate import load_task
from vispeft.cli.runs import CONFIG, Run
from vispeft.core.token_merging import TokenMerging
from vispeft.errors import ConfigError, counted
from vispeft.serving.server import Server, name_of
from vispeft.zoo.adapters import ADAPTER, PREFIX, find_adapter

__all__ = ["TOKEN", "backbone_of", "main", "named_runs"]

TOKEN = "VISPEFT_SERVE_TOKEN"
"""Environment variable with the word that lets a client add and remove adapters."""
STOPPING = 30
"""Seconds that open requests have when the server is stopped."""

CONNECTIONS = 64
"""Connections beside those whose images wait; further ones get status 503."""

EXAMPLE = f"""example:
  vispeft serve runs/birds/1 runs/cars/1
  vispeft serve birds=runs/birds/1 zoo:digits_ssf --port 8001 --batch 16 --delay_ms 10
  curl --data-binary @photo.jpg http://127.0.0.1:8000/answer/birds

All runs need the same backbone; adapters that leave it alone share its pass, and low-rank adapters share a batch. Runs
of classes, labels and numbers are served. Pages: POST /answer/NAME, GET /adapters, /health and /metrics (Prometheus).
With {TOKEN} set, PUT and DELETE /adapters/NAME add and remove adapters while the server runs. It listens to
this machine alone unless --host says otherwise, speaks plain HTTP, and knows no users: put a proxy in front of it for
others. It needs the extra serve: pip install "vispeft[serve]"."""


def main(argv: Sequence[str]) -> None:
    """Run the command.

    Args:
        argv: Arguments without the program's name.
    """
    parser = make_parser("serve", "Answer images over HTTP with many adapters of one backbone.", EXAMPLE)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="run directories or zoo:NAME, with NAME= in front to name one"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that is listened at; default this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    parser.add_argument("--batch", type=int, default=8, help="images of a full batch; default 8")
    parser.add_argument("--delay_ms", type=float, default=5, help="milliseconds an image waits for others; default 5")
    parser.add_argument("--waiting", type=int, default=256, help="images that may wait; more get status 503")
    parser.add_argument("--max_mb", type=float, default=16, help="megabytes of a request; default 16")
    parser.add_argument("--held_mb", type=float, default=256, help="megabytes of all requests at a time; default 256")
    parser.add_argument("--max_pixels", type=int, default=50_000_000, help="pixels of an image; default 50 million")
    parser.add_argument("--request_seconds", type=float, default=10, help="in which a request arrives; default 10")
    parser.add_argument("--answer_seconds", type=float, default=30, help="in which it is answered; default 30")
    given = parser.parse_args(list(argv))
    uvicorn = _uvicorn()  # before the backbone is loaded
    from vispeft.serving.batches import Batches
    from vispeft.serving.http import Limits, make_app

    limits = Limits(
        bytes=int(given.max_mb * 2**20),
        held=int(given.held_mb * 2**20),
        pixels=given.max_pixels,
        seconds=given.request_seconds,
        answer_seconds=given.answer_seconds,
    )
    runs = named_runs(given.runs)
    for name, source in runs.items():
        check_token_merging(name, source)
    server = Server(backbone_of(next(iter(runs.values()))), runs)
    batches = Batches(server, given.batch, given.delay_ms / 1000, max(given.waiting, given.batch))
    app = make_app(server, batches, limits, token=os.environ.get(TOKEN) or None, check=check_token_merging)
    told = counted(len(runs), "adapter")
    console.print(f"{told} at http://{given.host}:{given.port} (Ctrl-C ends it)", soft_wrap=True)
    settings: dict[str, Any] = {"log_level": "warning", "timeout_graceful_shutdown": STOPPING}
    settings["limit_concurrency"] = given.waiting + CONNECTIONS
    uvicorn.run(app, host=given.host, port=given.port, **settings)


def _uvicorn() -> Any:
    """Import the HTTP server.

    Raises:
        ConfigError: If the extra is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f'vispeft serve needs the extra serve: pip install "vispeft[serve]" ({error}).') from error
    return uvicorn


def check_token_merging(name: str, source: str) -> None:
    """Refuse a run that merges tokens, which would be answered without.

    Args:
        name: Name of the adapter.
        source: The run, or its adapter's directory; an adapter without a run merges none.

    Raises:
        ConfigError: If it does.
    """
    place = find_adapter(source) if source.startswith(PREFIX) else Path(source)
    place = place.parent if place.name == ADAPTER and not os.path.isfile(place / CONFIG) else place
    if not os.path.isfile(place / CONFIG):
        return
    if TokenMerging(**(read_config(place / CONFIG).get("token_merging") or {})) != TokenMerging():
        raise ConfigError(
            f"{name} ({source}) merges tokens, and the server runs the backbone without, so that its answers would "
            "differ from those of vispeft predict. Leave the run out."
        )


def named_runs(given: Sequence[str]) -> dict[str, str]:
    """Read the runs of a command line.

    Args:
        given: Run directories or ``zoo:NAME``, each perhaps with ``NAME=`` in front.

    Returns:
        Runs by name; without a name, ``birds_1`` for ``runs/birds/1``.

    Raises:
        ConfigError: If two have one name.
    """
    runs: dict[str, str] = {}
    for text in given:
        name, equals, source = text.partition("=")
        name, source = (name, source) if equals else (name_of(text), text)
        if name in runs:
            raise ConfigError(
                f"Two runs are called {name!r}: {runs[name]} and {source}. Write NAME=RUN for one of them."
            )
        runs[name] = source
    return runs


def backbone_of(source: str) -> nn.Module:
    """Create the backbone of a run, without adapters.

    Args:
        source: Its directory, or ``zoo:NAME``.
    """
    task, _ = load_task(Run.open(source))
    for name in task.bank.names:
        task.bank.detach(name)
    return task.model
