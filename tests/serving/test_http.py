"""The HTTP server: answers, limits, and adapters that come and go, without a socket where none is needed."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vispeft
from tests.conformance.cells import move
from tests.core.test_rows import vit
from vispeft.cli.serve import check_token_merging
from vispeft.data.images import read_image
from vispeft.data.preprocessing import Preprocessing
from vispeft.errors import ConfigError

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from vispeft.serving.batches import Batches
from vispeft.serving.http import Limits, make_app
from vispeft.serving.outputs import Meaning

SIZE = Preprocessing(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
LIMITS = Limits(bytes=20_000, pixels=10_000, seconds=0.3, answer_seconds=20)


def picture(seed: int = 0, side: int = 20) -> bytes:
    values = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    file = io.BytesIO()
    Image.fromarray(values.numpy()).save(file, "PNG")
    return file.getvalue()


def served(folder: Path | None = None) -> tuple[vispeft.serving.Server, dict[str, Any]]:
    model = vit()
    notes: dict[str, Any] = {
        "a": {"target": "class", "temperature": 2.0},
        "b": {"target": "multilabel"},
        "c": {"target": "regression", "mean": [1.0] * 4, "deviation": [2.0] * 4},
    }
    for name, output in notes.items():
        bank = vispeft.attach(model, vispeft.LoRA(rank=2), name=name, verify=False)
        bank.annotate(name, class_names=list("wxyz"), preprocessing=SIZE.to_dict(), output=output)
        move(bank, name, seed=ord(name))
    model.eval()
    if folder is not None:
        bank.save(folder / "guest", "a")
    scores = {}
    image = SIZE.transform()(read_image(io.BytesIO(picture())))[None]
    with torch.no_grad():
        for name in notes:
            with bank.using(name):
                scores[name] = model(image)[0]
    return vispeft.serve(model), scores


class Client:
    """Sends requests to an ASGI application, piece by piece."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.headers: dict[str, str] = {}
        """Headers of the last response."""

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes | list[bytes] = b"",
        headers: dict[str, str] | None = None,
        pause: float = 0.0,
        ends: bool = True,
    ) -> tuple[int, Any]:
        pieces = [body] if isinstance(body, bytes) else body

        async def messages() -> AsyncIterator[dict[str, Any]]:
            for number, piece in enumerate(pieces):
                await asyncio.sleep(pause)
                more = number + 1 < len(pieces) or not ends
                yield {"type": "http.request", "body": piece, "more_body": more}
            yield {"type": "http.disconnect"}

        received, sent = messages(), []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        given = [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()]
        scope = {"type": "http", "method": method, "path": path, "headers": given, "query_string": b""}
        scope |= {"raw_path": path.encode(), "root_path": "", "scheme": "http", "http_version": "1.1"}
        await self.app(scope, received.__anext__, send)
        start = next(message for message in sent if message["type"] == "http.response.start")
        self.headers = {key.decode(): value.decode() for key, value in start["headers"]}
        content = b"".join(message.get("body", b"") for message in sent).decode()
        return start["status"], json.loads(content) if content.startswith("{") else content


def test_answers_limits_and_refusals(tmp_path: Path) -> None:
    server, scores = served(tmp_path)
    batches = Batches(server, size=4, delay=0.02)
    client = Client(make_app(server, batches, LIMITS, token="word", top=2))
    right = {"Authorization": "Bearer word"}

    async def talk() -> None:
        answers = await asyncio.gather(*(client.ask("POST", f"/answer/{name}", picture()) for name in "abc"))
        assert [status for status, _ in answers] == [200] * 3
        (_, first), (_, labels), (_, numbers) = answers
        shares = (scores["a"] / 2).softmax(0)
        assert first["adapter"] == "a"
        assert first["class"] == "wxyz"[int(shares.argmax())]
        assert first["probability"] == pytest.approx(float(shares.max()), abs=1e-5)
        assert len(first["classes"]) == 2
        assert list(labels["probabilities"].values()) == pytest.approx(scores["b"].sigmoid().tolist(), abs=1e-5)
        assert list(numbers["values"].values()) == pytest.approx((scores["c"] * 2 + 1).tolist(), abs=1e-5)

        refused = {
            "no image": (400, await client.ask("POST", "/answer/a", b"no image")),
            "cut": (400, await client.ask("POST", "/answer/a", picture()[:200])),
            "empty": (400, await client.ask("POST", "/answer/a")),
            "pixels": (400, await client.ask("POST", "/answer/a", picture(side=128)[:1000])),
            "adapter": (404, await client.ask("POST", "/answer/aa", picture())),
            "page": (404, await client.ask("GET", "/nothing")),
            "method": (405, await client.ask("GET", "/answer/a")),
            "form": (415, await client.ask("POST", "/answer/a", b"--x", {"Content-Type": "multipart/form-data"})),
            "large": (413, await client.ask("POST", "/answer/a", [b"x" * 9000] * 3)),
            "told": (413, await client.ask("POST", "/answer/a", b"x", {"Content-Length": "100000000"})),
            "slow": (408, await client.ask("POST", "/answer/a", [b"x"] * 9, pause=0.1)),
            "gone": (400, await client.ask("POST", "/answer/a", b"x", ends=False)),
            "no token": (401, await client.ask("PUT", "/adapters/d", b"{}")),
            "no json": (400, await client.ask("PUT", "/adapters/d", b"no", right)),
            "no source": (400, await client.ask("PUT", "/adapters/d", b'{"source": "/nowhere"}', right)),
            "no name": (404, await client.ask("DELETE", "/adapters/d", b"", right)),
        }
        for what, (wanted, (status, answer)) in refused.items():
            assert status == wanted, (what, answer)

        source = b'{"source": "%s"}' % str(tmp_path / "guest").encode()
        assert (await client.ask("PUT", "/adapters/d", source, right))[0] == 201
        assert (await client.ask("PUT", "/adapters/d", source, right))[0] == 409
        status, guest = await client.ask("POST", "/answer/d", picture())
        assert status == 200
        assert guest["class"] == first["class"]
        assert guest["probability"] == pytest.approx(first["probability"], abs=1e-5)
        assert (await client.ask("DELETE", "/adapters/d", b"", right))[0] == 200
        assert (await client.ask("POST", "/answer/d", picture()))[0] == 404

        _, listing = await client.ask("GET", "/adapters")
        assert [own["name"] for own in listing["adapters"]] == ["a", "b", "c"]
        status, health = await client.ask("GET", "/health")
        assert (status, health) == (200, {"status": "ok", "adapters": 3, "waiting": 0})
        _, metrics = await client.ask("GET", "/metrics")
        assert 'vispeft_requests_total{adapter="a",status="200"} 1' in metrics
        assert 'vispeft_requests_total{adapter="a",status="499"} 1' in metrics
        assert 'vispeft_requests_total{adapter="",status="404"}' in metrics
        assert "vispeft_held_bytes 0\n" in metrics
        batches.stop()
        assert (await client.ask("POST", "/answer/a", picture()))[0] == 503
        assert (await client.ask("GET", "/health"))[0] == 503

    asyncio.run(talk())


def test_adapters_are_fixed_without_a_token() -> None:
    server, _ = served()
    batches = Batches(server)
    client = Client(make_app(server, batches, LIMITS))
    assert asyncio.run(client.ask("DELETE", "/adapters/a"))[0] == 403
    batches.stop()


def test_one_image_at_fault_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    server, scores = served()
    batches = Batches(server, size=3, delay=0.2)
    image = SIZE.transform()(read_image(io.BytesIO(picture())))
    answers = type(server).answer_held

    def breaks(self: Any, images: torch.Tensor, pairs: list[Any], served: Any) -> list[torch.Tensor]:
        if any(name == "b" for _, name in pairs):
            raise RuntimeError("broken")
        return answers(self, images, pairs, served)

    monkeypatch.setattr(type(server), "answer_held", breaks)
    found = [batches.ask(image, name) for name in "abc"]
    torch.testing.assert_close(found[0].result(), scores["a"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2].result(), scores["c"], rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="broken"):
        found[1].result()
    batches.stop()


def test_images_that_wait_are_answered_before_their_adapter_goes() -> None:
    server, scores = served()
    batches = Batches(server, size=8, delay=0.05)
    image = SIZE.transform()(read_image(io.BytesIO(picture())))
    for name in "abc":  # behind the last one the model has no adapters
        answer = batches.ask(image, name)
        removing = threading.Thread(target=server.remove, args=(name,), daemon=True)
        removing.start()
        torch.testing.assert_close(answer.result(timeout=30), scores[name], rtol=0, atol=1e-6)
        removing.join(timeout=30)
        assert not removing.is_alive()
    assert server.names == []
    batches.stop()


def test_an_image_that_is_given_up_leaves_the_queue_and_its_adapter() -> None:
    server, _ = served()
    batches = Batches(server, size=8, delay=20)
    answer = batches.ask(torch.zeros(3, 16, 16), "a")
    assert batches.waiting == 1
    assert answer.cancel()
    assert batches.waiting == 0
    server.remove("a")  # does not wait for it
    batches.stop()


def test_a_removed_adapter_answers_what_it_was_asked_over_http() -> None:
    server, scores = served()
    batches = Batches(server, size=8, delay=0.1)
    client = Client(make_app(server, batches, LIMITS, token="word"))

    async def talk() -> None:
        asked = asyncio.create_task(client.ask("POST", "/answer/b", picture()))
        while not batches.waiting:
            await asyncio.sleep(0.01)
        assert (await client.ask("DELETE", "/adapters/b", b"", {"Authorization": "Bearer word"}))[0] == 200
        status, answer = await asked
        assert status == 200
        assert list(answer["probabilities"].values()) == pytest.approx(scores["b"].sigmoid().tolist(), abs=1e-5)

    asyncio.run(talk())
    batches.stop()


PREPARED = 3 * 4 * 16 * 16
"""Bytes of a prepared image."""


@pytest.mark.slow
def test_requests_hold_no_more_bytes_than_the_bound() -> None:
    server, _ = served()
    batches = Batches(server, size=64, delay=0.3)
    limits = Limits(bytes=4000, held=10_000, seconds=20, answer_seconds=20)
    client = Client(make_app(server, batches, limits))

    async def held() -> int:
        _, text = await client.ask("GET", "/metrics")
        return int(text.split("\nvispeft_held_bytes ")[1].split()[0])

    async def most_of(asked: list[asyncio.Task[tuple[int, Any]]]) -> int:
        most = 0
        while not all(task.done() for task in asked):
            most = max(most, await held())
            await asyncio.sleep(0.005)
        return most

    async def talk() -> None:
        asked = [asyncio.create_task(client.ask("POST", "/answer/a", picture(number))) for number in range(8)]
        most = await most_of(asked)
        statuses = [task.result()[0] for task in asked]
        assert set(statuses) == {200, 503}
        assert 2 * PREPARED <= most <= 10_000
        assert await held() == 0

        # No one tells how much will come: what there is room for waits for the rest, the others are dropped.
        stalled = [asyncio.create_task(client.ask("POST", "/answer/a", [b"x" * 3500, b"y"], pause=0.2)) for _ in "1234"]
        most = await most_of(stalled)
        # Two files fit, and one prepared image beside a file: the last one is decoded, and is no image.
        assert sorted(task.result()[0] for task in stalled) == [400, 503, 503, 503]
        assert 7000 <= most <= 10_000

        waiting = asyncio.create_task(client.ask("POST", "/answer/a", [b"x" * 3900] * 2, pause=0.2))
        others = [asyncio.create_task(client.ask("POST", "/answer/a", [b"x" * 3900, b""], pause=0.3)) for _ in "12"]
        await asyncio.sleep(0.25)
        told = {"Content-Length": "4000", "Expect": "100-continue"}
        status, answer = await client.ask("POST", "/answer/a", b"x" * 4000, told)  # refused before it is sent
        assert (status, client.headers["retry-after"]) == (503, "1")
        assert "10000 bytes" in answer["error"]
        await asyncio.gather(waiting, *others)
        assert waiting.result()[0] == 413
        assert await held() == 0
        assert (await client.ask("POST", "/answer/a", picture()))[0] == 200

    asyncio.run(talk())
    batches.stop()


def test_a_bound_that_no_image_fits_is_refused() -> None:
    server, _ = served()
    batches = Batches(server)
    with pytest.raises(ConfigError, match="held_mb"):
        make_app(server, batches, Limits(bytes=4000, held=4000 + PREPARED - 1))
    make_app(server, batches, Limits(bytes=4000, held=4000 + PREPARED))
    with pytest.raises(ConfigError, match="above 0"):
        Limits(held=0)
    batches.stop()


def test_a_client_adds_no_run_that_merges_tokens(tmp_path: Path) -> None:
    """The command line refused it, and a request did not."""
    server, _ = served(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("token_merging: {r: 8}\n")
    batches = Batches(server)
    client = Client(make_app(server, batches, LIMITS, token="word", check=check_token_merging))
    right = {"Authorization": "Bearer word"}
    for source in ("run", "run/adapter"):
        body = json.dumps({"source": str(tmp_path / source)}).encode()
        status, said = asyncio.run(client.ask("PUT", "/adapters/merging", body, right))
        assert status == 400
        assert "merges tokens" in said["error"]
    batches.stop()


def test_equal_labels_have_keys_of_their_own() -> None:
    """ImageNet has two classes called crane; the one of 0.95 was lost."""
    notes: dict[str, Any] = {"preprocessing": Preprocessing(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3).to_dict()}
    notes |= {"class_names": ["crane", "crane", "owl"], "output": {"target": "multilabel"}}
    answer = Meaning("x", notes, 5).read(torch.tensor([3.0, -3.0, -1.0]))
    assert answer is not None
    assert answer["labels"] == ["crane"]
    assert list(answer["probabilities"]) == ["crane", "crane (2)", "owl"]
    assert answer["probabilities"]["crane"] == pytest.approx(0.9526, abs=1e-4)
