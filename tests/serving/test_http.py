"""The HTTP server: answers, limits, and adapters that come and go, without a socket where none is needed."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vispeft
from tests.conformance.cells import move
from tests.core.test_rows import vit
from vispeft.data.images import read_image
from vispeft.data.preprocessing import Preprocessing

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from vispeft.serving.batches import Batches
from vispeft.serving.http import Limits, make_app

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
    answers = type(server).__call__

    def breaks(self: Any, images: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
        if "b" in names:
            raise RuntimeError("broken")
        return answers(self, images, names)

    monkeypatch.setattr(type(server), "__call__", breaks)
    found = [batches.ask(image, name) for name in "abc"]
    torch.testing.assert_close(found[0].result(), scores["a"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2].result(), scores["c"], rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="broken"):
        found[1].result()
    batches.stop()
